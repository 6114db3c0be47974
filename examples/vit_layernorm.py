"""An image classifier that trains its norms and its head alone: PEFT's LN tuning, or plain requires_grad, on an optimised ViT."""

import argparse

import torch
from transformers import AutoModelForImageClassification, ViTConfig

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a transformers folder; default: a small ViT with random weights")
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()

torch.manual_seed(0)
if options.model:
    model = AutoModelForImageClassification.from_pretrained(options.model)
else:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    model = AutoModelForImageClassification.from_config(ViTConfig(**small, patch_size=8, num_labels=2))

model.requires_grad_(False)
for module in model.modules():
    if isinstance(module, torch.nn.LayerNorm):
        module.requires_grad_(True)
model.classifier.requires_grad_(True)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{trained:,} of {model.num_parameters():,} parameters are trained")

fastpeft.optimize(model)  # backward keeps what the norms' gradients need, and no more

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
labels = torch.arange(16) % 2
size = model.config.image_size
images = torch.randn(16, 3, size, size) + labels[:, None, None, None]  # brighter is class 1
model.train()
for step in range(options.steps):
    output = model(pixel_values=images, labels=labels)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    hits = (output.logits.argmax(-1) == labels).float().mean().item()
    print(f"step {step}: loss {output.loss.item():.4f}, accuracy {hits:.2f}")
