"""Dropout that keeps a seed, not a mask.

    y = x * keep / (1 - p),  keep ~ Bernoulli(1 - p)        dx = dy * keep / (1 - p), with keep redrawn from the same seed

| gradient needed for | saved                                     |
|---------------------|-------------------------------------------|
| x                   | one int64 seed; PyTorch keeps a mask (CPU: of x's own dtype) |

The seed comes from PyTorch's CPU generator, so torch.manual_seed rules it, a run resumed with its random state draws the same masks, and
no device is waited for. Shapes: any; dtype: that of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._common import wants_grad


def dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition, given the seed."""
    return x * keep_mask(x, p, seed)


def new_seed() -> Tensor:
    """An int64 seed, [1], on the CPU: reading it never waits for a device."""
    return torch.randint(0, 2**31, (1,))


def draw(x: Tensor, p: float, seed: Tensor, index: int = 0) -> Tensor:
    """1 with probability 1 - p, else 0, in x's shape and dtype: the mask number ``index`` of a seed. Not for torch.compile to look into."""
    generator = torch.Generator(x.device).manual_seed(int(seed) + index)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)


# an operator, because torch.compile cannot look into a generator
_keep_mask = _library.define(
    "keep_mask(Tensor x, float p, Tensor seed) -> Tensor",
    fake=lambda x, p, seed: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    composite=lambda x, p, seed: draw(x, p, seed).mul_(1 / (1 - p)),
    native=False,
)


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """0 or 1 / (1 - p) per element, of x's shape and dtype; the same for the same seed, shape and device."""
    return _keep_mask(x.detach(), p, seed)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p = p
        ctx.save_for_backward(seed)
        return keep_mask(x, p, seed).mul_(x)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return keep_mask(dy, ctx.p, seed).mul_(dy), None, None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """``x`` with each element zero with probability ``p``, else divided by 1 - p. ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}; it must lie in [0, 1)")
    if not training or p == 0.0:
        return x
    seed = new_seed()
    return _Dropout.apply(x, p, seed) if wants_grad(x) else keep_mask(x, p, seed).mul_(x)
