"""Models with a cache of image features beside plain ones: a step of each, what is equal, and how often an encoder runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from vision_models import build

import fastpeft as fp
from fastpeft.caching.images import image_caches


def results(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def encoder(model: nn.Module) -> nn.Module:
    """The module that sees pixels first."""
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    return convolutions[0]


class Rows:
    """Counts what an image encoder is given, in rows of its first convolution."""

    def __init__(self, model: nn.Module):
        self.count, module = 0, encoder(model)
        forward = type(module)._conv_forward
        forward = getattr(forward, "own", forward)

        def counted(this, value, *rest):
            self.count += len(value) * (this is module)
            return forward(this, value, *rest)

        counted.own = forward
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(type(module), "_conv_forward", counted)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


def owner_name(model: nn.Module) -> str:
    cache, *_ = image_caches(model)
    return next(name for name, module in model.named_modules() if module is cache.owner)


def same(mine, theirs) -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        same(list(mine.values()), list(theirs.values()))
    elif isinstance(theirs, (list, tuple)):
        assert type(mine) is type(theirs) and len(mine) == len(theirs)
        for a, b in zip(mine, theirs):
            same(a, b)
    else:
        assert mine == theirs


def cached(name: str = "llava", where="1GB"):
    model, batch = build(name)
    plain = copy.deepcopy(model)
    fp.optimize(model, lambda module, name: False, cache_images=where)
    return model, plain, batch


def agree(model, plain, batch, pixels) -> None:
    with torch.no_grad():
        same(model(**batch(pixels)).logits, plain(**batch(pixels)).logits)
