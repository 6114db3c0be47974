"""Hugging Face's Trainer on an optimised PEFT model: evaluation with a metric that reads logits, a saved adapter."""

import argparse

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a transformers folder; default: a small BERT with random weights")
parser.add_argument("--out", default="runs/hf_trainer", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=12)
options = parser.parse_args()

torch.manual_seed(0)
if options.model:
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
else:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
    model = AutoModelForSequenceClassification.from_config(BertConfig(**small, num_labels=2))
model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
fastpeft.optimize(model)


def sample(index: int) -> dict[str, torch.Tensor]:
    """A sentence of ten words of one of two vocabularies, and which."""
    label = index % 2
    ids = torch.randint(10 + 95 * label, 105 + 95 * label, (10,), generator=torch.Generator().manual_seed(index))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(label)}


def accuracy(prediction) -> dict[str, float]:
    """What a user computes from logits: they are all there."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


arguments = TrainingArguments(
    output_dir=options.out,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=1e-2,
    logging_steps=3,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
samples = [sample(i) for i in range(128)]
trainer = Trainer(model, arguments, train_dataset=samples[:96], eval_dataset=samples[96:], compute_metrics=accuracy)
trainer.train()
print(trainer.evaluate())
model.save_pretrained(options.out)  # an adapter as PEFT writes it: optimize changes no name
print(f"adapter in {options.out}")
