"""A PEFT script made faster by one line: `fastpeft.optimize(model)`. The losses stay what they are."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a transformers folder; default: a small LLaMA with random weights")
parser.add_argument("--steps", type=int, default=5)
options = parser.parse_args()

torch.manual_seed(0)
if options.model:
    model = AutoModelForCausalLM.from_pretrained(options.model)
else:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**small))
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

print(fastpeft.optimize(model))  # the one line; what it prints says which modules it exchanged, and why not the others

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids = torch.randint(0, 200, (4, 32))
answers = torch.where(torch.arange(32) >= 24, ids, -100)  # only labelled positions reach the head
model.train()
for step in range(options.steps):
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=answers).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
