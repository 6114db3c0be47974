"""Rescaling by learned vectors, (IA)^3's only operation, with the reduction of its gradient in the same pass.

    y = x l        dx = dy l        dl = sum over l's broadcast dimensions of dy x

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (2022), eq. 1.
Shapes: x, y [...]; scale broadcastable to x: [N] rescales columns, [..., 1] rows, [H, 1, d] keys or values of [B, H, M, d].
Accumulation: float32 (float64 for float64). No division by l anywhere: exact zeros are fine.

| gradient needed for | saved                  | written in backward |
|---------------------|------------------------|---------------------|
| x only              | scale (the parameter)  | dx                  |
| scale only          | x, or what recomputes it  | dscale; no dx       |
| both                | x, scale               | dx, dscale, one pass over dy and x; dy x never exists |
| none                | nothing                |                     |

Moved through memory, in tensors of x's size: forward 2, backward 3 (dy, x, dx) with both gradients, one launch each on csrc
(counted by tests/ops/test_traffic.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, wants_grad
from fastpeft.ops._recompute import mark_recomputable, recipe_of, recompute, to_save


def rescale_reference(x: Tensor, scale: Tensor) -> Tensor:
    acc = accumulator(x.dtype)
    return (x.to(acc) * scale.to(acc)).to(x.dtype)


def _fwd(x, scale):
    return torch.mul(x, scale, out=x.new_empty(x.shape)) if x.dtype == scale.dtype else x.new_empty(x.shape).copy_(x * scale)


def _bwd(dy, x, scale, need_dx, need_dscale):
    dx = _fwd(dy, scale) if need_dx else dy.new_empty(0)
    if not need_dscale:
        return dx, scale.new_empty(0)
    acc = accumulator(dy.dtype)
    return dx, (dy.to(acc) * x.to(acc)).sum_to_size(scale.shape).to(scale.dtype)


_forward = _library.define("rescale_fwd(Tensor x, Tensor scale) -> Tensor", fake=lambda x, scale: x.new_empty(x.shape), composite=_fwd)
_backward = _library.define(
    "rescale_bwd(Tensor dy, Tensor? x, Tensor scale, bool need_dx, bool need_dscale) -> (Tensor dx, Tensor dscale)",
    fake=lambda dy, x, scale, need_dx, need_dscale: (
        dy.new_empty(dy.shape if need_dx else 0),
        scale.new_empty(scale.shape if need_dscale else 0),
    ),
    composite=_bwd,
)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """The product alone is ATen's on a CPU, where dtypes are alike; csrc has what ATen takes several passes for. Measured, one thread of an
    AMD EPYC with AVX-512, csrc's time over ATen's at 128x768, 2048x768, 2048x4096: float32 1.9, 1.1, 1.0; bfloat16 2.2, 1.0, 1.1; float16
    3.2, 3.4, 3.5. (Both gradients: 0.5 to 0.6 of ATen's.)"""
    alike = x.device.type == "cpu" and x.dtype == scale.dtype
    return _fwd(x, scale) if alike else _forward(x, scale)


class _Rescale(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.recipe, kept = to_save(x if ctx.needs_input_grad[1] else None)
        ctx.save_for_backward(scale, *kept)
        return _times(x, scale)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        need_dx, need_dscale = ctx.needs_input_grad
        scale, *kept = ctx.saved_tensors
        if not need_dscale:
            return _times(dy, scale), None
        dx, dscale = _backward(dy, recompute(ctx.recipe, kept), scale, need_dx, need_dscale)
        return dx if need_dx else None, dscale


@under_autocast("promote")
def rescale(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale`` in x's dtype, contiguous; ``scale`` broadcasts to x, in x's dtype or float32.

    Raises ValueError where scale does not broadcast to x's shape, TypeError where dtypes do not fit.
    """
    check_floating("rescale", x=x, scale=scale)
    if scale.dtype not in (x.dtype, accumulator(x.dtype)):
        raise TypeError(f"rescale: scale is {scale.dtype} and x is {x.dtype}; cast scale to {x.dtype} or {accumulator(x.dtype)}")
    if x.dim() == 0:
        raise ValueError("rescale: x needs at least one dimension; view it as [1]")
    trailing = x.shape[x.dim() - scale.dim() :]
    if scale.dim() > x.dim() or any(s not in (1, n) for s, n in zip(scale.shape, trailing)):
        raise ValueError(f"rescale: scale {tuple(scale.shape)} does not broadcast to x {tuple(x.shape)}; view it as [N] or [..., 1]")
    if not wants_grad(x, scale):
        return _times(x, scale)
    y = _Rescale.apply(x, scale)
    return mark_recomputable(y, _times, x, scale) if scale.requires_grad or recipe_of(x) is not None else y
