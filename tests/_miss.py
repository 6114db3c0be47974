"""The smallest MISS, batches for it, and comparisons: shared by the tests of plans, methods, models and adapters."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import fastpeft as fp
from fastpeft.models.miss import DropPath

SMALL = {"image_size": 32, "vocab_size": 64, "hidden_size": 32, "heads": 2, "vision_layers": 2, "text_layers": 2}
SMALL |= {"initializer_range": 0.3}  # large: answers then depend on images and questions
ENC, DEC = 63, 62  # [ENC] opens a question, [DEC] an answer
PARTS = {"vit": "vision_model", "jtm": "text_encoder", "dec": "text_decoder"}


@functools.cache
def _base(dtype: torch.dtype) -> nn.Module:
    return fp.build("miss-tiny", pretrained=False, seed=1, dtype=dtype, **SMALL)


def build(plan: str | None = None, *, dtype: torch.dtype = torch.float64, scatter: float = 0.1, **options) -> nn.Module:
    """The small model, adapted; ``scatter`` moves what is trained away from its start, where adapters change nothing."""
    model = copy.deepcopy(_base(dtype))
    if plan is not None:
        torch.manual_seed(2)
        fp.adapt(model, plan, **options)
        scatter_trained(model, scatter)
    return model


@torch.no_grad()
def scatter_trained(model: nn.Module, scale: float = 0.1, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and scale:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)


def batch(samples: int = 3, *, padded: bool = False, dtype: torch.dtype = torch.float64, seed: int = 5) -> dict[str, torch.Tensor]:
    """Questions of 7 tokens and answers of 5 with [DEC] first; ``padded`` cuts sample 1 to 4 and 3, and the last to 5 and 4."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (samples, 7), generator=generator)
    labels = torch.randint(5, 60, (samples, 5), generator=generator)
    pixels = torch.randn(samples, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    ids[:, 0], labels[:, 0] = ENC, DEC
    mask = torch.ones_like(ids)
    for i, (question, answer) in {1: (4, 3), samples - 1: (5, 4)}.items() if padded else ():
        ids[i, question:], mask[i, question:], labels[i, answer:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def alone(inputs: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """Sample i of a batch without its padding."""
    question, answer = int(inputs["attention_mask"][i].sum()), int((inputs["labels"][i] != -100).sum())
    cut = {"input_ids": question, "attention_mask": question, "labels": answer}
    return {name: t[i : i + 1, : cut[name]] if name in cut else t[i : i + 1] for name, t in inputs.items()}


def questions(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What generate() takes of a batch."""
    return {name: t for name, t in inputs.items() if name != "labels"}


def without_dropout(model: nn.Module) -> nn.Module:
    """The model in training mode, where nothing is random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for hook in module._forward_hooks.values():
            if isinstance(hook, DropPath):
                hook.rate = 0.0
    return model.train()


def plain(model: nn.Module) -> nn.Module:
    """A copy on transformers' own modules."""
    model = copy.deepcopy(model)
    fp.restore(model)
    return model


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    """Gradients by name, each up to ``tolerance`` of the largest of all (a key's bias has none but rounding)."""
    assert got.keys() == want.keys()
    largest = max(float(t.abs().max()) for t in want.values())
    wrong = {name: float((got[name] - t).abs().max()) / largest for name, t in want.items()}
    assert max(wrong.values()) < tolerance, max(wrong.items(), key=lambda item: item[1])
