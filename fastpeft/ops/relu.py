"""ReLU that keeps its values above zero, packed, and a bit for each element.

    y = max(x, 0)          dx = dy where x > 0, else 0 (NaN passes, as in PyTorch)

Shapes: x, y any; values [n], the elements of y above zero (or NaN) in order; bits [ceil(numel / 8)] uint8, the element 8 b + i at bit i
of byte b. Accumulation: none, every value is moved as it is.

| gradient needed for | saved by relu | by a linear layer behind it that reads y |
|---------------------|---------------|------------------------------------------|
| x                   | bits          | values and bits, in place of y           |
| none                | nothing       |                                          |

PyTorch keeps y. Of drawn weights half of it is zero, of trained OPT and T5 models nine tenths and more (Li et al., "The Lazy Neuron
Phenomenon", 2023; Mirzadeh et al., "ReLU Strikes Back", 2024).

csrc has this for CPUs. On other devices ``values`` would make the host wait for their number. 512 x 3072 in float32, one thread (Intel
Xeon, Sapphire Rapids), milliseconds: y and bits 0.6, values 0.9, y again 1.1, dx 0.6; F.relu 0.4 and its backward 0.7; the linear layer
before it, 768 wide, 13 forward and 26 backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order
from fastpeft.ops._common import FLOATS
from fastpeft.ops._private import in_forward_mode, is_fake, under_func
from fastpeft.ops._recompute import mark_recomputable, recomputes

FEW = 1 << 14  # elements; below, the calls cost more than the memory is worth


def relu_reference(x: Tensor) -> Tensor:
    """The definition."""
    return x.masked_fill(x <= 0, 0.0)


def _weights(like: Tensor) -> Tensor:
    return 1 << torch.arange(8, device=like.device, dtype=torch.uint8)


def _spread(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """[*shape] bool of bits."""
    return (bits[:, None] & _weights(bits)).ne(0).flatten()[: prod(shape)].view(shape)


def _fwd(x):
    y = x.new_empty(x.shape).copy_(F.relu(x))
    above = ~(y <= 0).flatten()
    return y, (F.pad(above, (0, -above.numel() % 8)).view(-1, 8) * _weights(y)).sum(1, dtype=torch.uint8)


_forward = _library.define(
    "relu_fwd(Tensor x) -> (Tensor y, Tensor bits)",
    fake=lambda x: (x.new_empty(x.shape), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)),
    composite=_fwd,
    cuda=False,
)
_pack = _library.define(
    "relu_pack(Tensor y, Tensor bits) -> Tensor",
    fake=lambda y, bits: y.new_empty(torch.library.get_ctx().new_dynamic_size()),
    composite=lambda y, bits: y[_spread(bits, y.shape)],
    cuda=False,
)
_again = _library.define(
    "relu_again(Tensor values, Tensor bits, int[] shape) -> Tensor",
    fake=lambda values, bits, shape: values.new_empty(shape),
    composite=lambda values, bits, shape: values.new_zeros(shape).masked_scatter_(_spread(bits, shape), values),
    cuda=False,
)
_backward = _library.define(
    "relu_bwd(Tensor dy, Tensor bits) -> Tensor",
    fake=lambda dy, bits: dy.new_empty(dy.shape),
    composite=lambda dy, bits: torch.where(_spread(bits, dy.shape), dy, torch.zeros_like(dy)).contiguous(),
    cuda=False,
)
PACKS = _library.backend_of()["relu_fwd"]["CPU"] == "native"


class _ReLU(Function):
    @staticmethod
    def forward(ctx, x):
        y, bits = _forward(x)
        ctx.save_for_backward(bits)
        ctx.mark_non_differentiable(bits)
        return y, bits

    @staticmethod
    @first_order
    def backward(ctx, dy, _):
        return _backward(dy, *ctx.saved_tensors)


def _made(shape: list[int], values: Tensor, bits: Tensor) -> Tensor:
    return _again(values, bits, shape)


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)`` of any shape and floating dtype, as ``F.relu`` gives it."""
    usual = torch.is_grad_enabled() and x.requires_grad and x.dtype in FLOATS and x.is_contiguous() and recomputes()
    if not usual or is_fake(x) or under_func() or in_forward_mode(x):
        return F.relu(x)
    y, bits = _ReLU.apply(x)
    return mark_recomputable(y, partial(_made, list(x.shape)), bits, pack=_pack)


def relu_pays(x: Tensor) -> bool:
    """Whether :func:`relu` of x is what a model is served best with; PyTorch's own function takes less time everywhere."""
    return PACKS and x.device.type == "cpu" and x.numel() >= FEW
