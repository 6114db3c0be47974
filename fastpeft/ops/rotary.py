"""Rotary position embedding in the rotate-half convention (LLaMA), on the first ``rot`` channels of a head.

    y1 = x1 c1 - x2 s1        y2 = x2 c2 + x1 s2        halves 1, 2 of the rotated channels; the rest passes through
    dx1 = dy1 c1 + dy2 s2     dx2 = dy2 c2 - dy1 s1     the transposed map, with the same tables

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), eq. 34.
Shapes: x, y [..., d]; cos, sin broadcastable to [..., rot], rot <= d and even (transformers gives [B, M, d]: unsqueeze the head).
Accumulation: float32 (float64 for float64), one rounding; x may be any view, and y has its strides.

Moved through memory by csrc's form: 2 (x, y) and the tables, one launch, in either direction (counted by tests/ops/test_traffic.py).

Saved for backward: cos and sin (tables of the caller, no copy), and nothing of x. Where backward can recompute x (a norm of queries or
keys), it can recompute y: the attention after it saves neither.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, wants_grad
from fastpeft.ops._recompute import mark_recomputable, recipe_of


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it: ``x * cos + rotate_half(x) * sin``, in the accumulator's dtype."""
    acc, rot = accumulator(x.dtype), cos.shape[-1]
    turn, rest = x[..., :rot].to(acc), x[..., rot:]
    half = torch.cat((-turn[..., rot // 2 :], turn[..., : rot // 2]), -1)
    return torch.cat(((turn * cos.to(acc) + half * sin.to(acc)).to(x.dtype), rest), -1)


def _empty(x):
    """x's strides where its channels are adjacent (heads not yet split from tokens stay so), else contiguous."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


def _rotate(x, cos, sin, transpose):
    acc, half = accumulator(x.dtype), cos.shape[-1] // 2
    (c1, c2), (s1, s2) = (t.to(acc).split(half, -1) for t in (cos, sin))
    x1, x2 = (x[..., i * half : (i + 1) * half].to(acc) for i in (0, 1))
    y = _empty(x)
    y[..., :half] = x1 * c1 + x2 * s2 if transpose else x1 * c1 - x2 * s1
    y[..., half : 2 * half] = x2 * c2 - x1 * s1 if transpose else x2 * c2 + x1 * s2
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


_op = _library.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool transpose) -> Tensor",
    fake=lambda x, cos, sin, transpose: _empty(x),
    composite=_rotate,
)


class _Rotary(Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _op(x, cos, sin, False)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return _op(dy, *ctx.saved_tensors, True), None, None


@under_autocast("promote")
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [..., d] by tables ``cos``, ``sin``, broadcastable to [..., rot], in x's dtype or float32.

    Raises ValueError where shapes do not fit or a table requires a gradient, TypeError for dtypes.
    """
    check_floating("rotary", x=x, cos=cos, sin=sin)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"rotary: cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype} must match")
    if cos.dtype not in (x.dtype, accumulator(x.dtype)):
        raise TypeError(f"rotary: cos is {cos.dtype} and x is {x.dtype}; cast cos and sin to {x.dtype} or {accumulator(x.dtype)}")
    rot = cos.shape[-1]
    if rot % 2 or rot > x.shape[-1]:
        raise ValueError(f"rotary: tables turn {rot} channels; use an even number of at most x's last dimension, {x.shape[-1]}")
    lead, trailing = cos.shape[:-1], x.shape[x.dim() - cos.dim() : -1]
    if cos.dim() > x.dim() or any(c not in (1, n) for c, n in zip(lead, trailing)):
        raise ValueError(f"rotary: cos {tuple(cos.shape)} does not broadcast to x {tuple(x.shape)}; for [B, H, M, d] unsqueeze(1)")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: cos and sin are constants; detach() them")
    if not wants_grad(x):
        return _op(x, cos, sin, False)
    y = _Rotary.apply(x, cos, sin)
    return y if recipe_of(x) is None else mark_recomputable(y, _turned, x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _op(x, cos, sin, False)
