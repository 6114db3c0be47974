"""Dropout that keeps a seed, not a mask.

    y = x * keep / (1 - p),  keep ~ Bernoulli(1 - p)        dx = dy * keep / (1 - p), with keep redrawn from the same seed

| gradient needed for | saved                                     |
|---------------------|-------------------------------------------|
| x                   | one int64 seed; PyTorch keeps a mask (CPU: of x's own dtype) |

The seed comes from PyTorch's CPU generator, so torch.manual_seed rules it, a run resumed with its random state draws the same masks, and
no device is waited for. In a step of static shapes it comes from a counter on the device (fastpeft/static_shapes.py), where ATen's form
hashes positions in place of a generator, whose seed the host would have to read. csrc's CUDA kernel is one launch for either seed: Philox
4x32-10 under the key seed + index, element i of x taking number i % 4 of the counter i / 4. Shapes: any; dtype: that of x.
Moved through memory by it: 2 (x, y), and 2 in backward, one launch each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._common import wants_grad
from fastpeft.static_shapes import device_seed, mixed


def dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition, given the seed."""
    return x * keep_mask(x, p, seed)


def new_seed() -> Tensor:
    """An int64 seed, [1], on the CPU: reading it never waits for a device. In a step of static shapes on the device: nobody reads it."""
    seed = device_seed()
    return torch.randint(0, 2**31, (1,)) if seed is None else seed


def draw(x: Tensor, p: float, seed: Tensor, index: int = 0) -> Tensor:
    """1 with probability 1 - p, else 0, in x's shape and dtype: the mask number ``index`` of a seed. Not for torch.compile to look into."""
    if seed.device.type != "cpu":  # nobody reads it
        numbers = mixed(mixed(seed + index) + torch.arange(x.numel(), device=x.device))
        return ((numbers >> 33 & 0x7FFFFFFF) >= int(p * 2**31)).to(x.dtype).view(x.shape)
    generator = torch.Generator(x.device).manual_seed(int(seed) + index)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)


def _composite(x: Tensor, p: float, seed: Tensor, index: int = 0) -> Tensor:
    return draw(x, p, seed, index).mul_(1 / (1 - p)).mul_(x)


# an operator, because torch.compile cannot look into a generator
_op = _library.define(
    "dropout(Tensor x, float p, Tensor seed, int index=0) -> Tensor",
    fake=lambda x, p, seed, index=0: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    composite=_composite,
)


def masked(x: Tensor, p: float, seed: Tensor, index: int) -> Tensor:
    """``x`` under the mask number ``index`` of a seed; no gradient."""
    return _op(x, p, seed, index)


def keep_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """0 or 1 / (1 - p) per element, of x's shape and dtype; the same for the same seed, shape and device."""
    return _op(torch.ones_like(x), p, seed)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p = p
        ctx.save_for_backward(seed)
        return _op(x, p, seed)

    @staticmethod
    def backward(ctx, dy):
        return dropped(dy, ctx.p, *ctx.saved_tensors), None, None


def dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``x`` under the mask of a seed."""
    return _Dropout.apply(x, p, seed) if wants_grad(x) else _op(x, p, seed)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """``x`` with each element zero with probability ``p``, else divided by 1 - p. ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}; it must lie in [0, 1)")
    if not training or p == 0.0:
        return x
    return dropped(x, p, new_seed())
