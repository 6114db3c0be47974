"""A training loop of one's own: a backbone by name, a method for each part, the adapter saved, loaded and merged."""

import argparse
import tempfile

import torch

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="llama-tiny", help="a name such as llama-7b, or a transformers folder")
parser.add_argument("--plan", default="LoRA", help="a treatment for each part: LoRA, IA3, LayerNorm, Prefix, Excitor, ...")
parser.add_argument("--steps", type=int, default=5)
options = parser.parse_args()

model = fastpeft.build(options.model)
fastpeft.adapt(model, options.plan)
numbers = fastpeft.count(model)
print(f"{numbers['trainable']:,} of {numbers['total']:,} parameters are trained ({numbers['percent']:.3f}%)")

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, model.config.vocab_size, (4, 16), generator=generator)
mask = torch.arange(16) < torch.tensor([[16], [9], [12], [5]])  # padding is not computed
batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}
model.train()
for step in range(options.steps):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    fastpeft.save_adapter(model, f"{folder}/adapter")
    again = fastpeft.load_adapter(fastpeft.build(options.model), f"{folder}/adapter").eval()
    difference = (again(**batch).loss - model(**batch).loss).abs().item()
    print(f"loaded into a fresh base, the loss differs by {difference:.1e}")
    if options.plan in ("LoRA", "IA3"):
        fastpeft.merge(again)
        print(f"merged, it is {again(**batch).loss.item():.4f}")
