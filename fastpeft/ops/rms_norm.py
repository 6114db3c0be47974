"""RMSNorm, optionally with the residual addition before it, and only the gradients that are asked for.

    h = x (+ residual)        rstd = (sum(h^2) / N + eps)^-1/2        x_hat = h rstd        y = x_hat weight

    wd = dy weight            dweight = sum_rows dy x_hat
    dx = rstd (wd - x_hat mean_N(wd x_hat)) (+ dh),   dresidual = dx

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4.
Shapes: x, residual, h, y [..., N]; weight [N] (x's dtype or the accumulator's); rstd [rows].
Accumulation: float32 (float64 for float64); one rounding, at the store (transformers' LlamaRMSNorm rounds x_hat as well).

| gradient needed for  | saved                                                                | written in backward |
|----------------------|----------------------------------------------------------------------|---------------------|
| x or residual        | h (x itself without residual), rstd, weight (the parameter, no copy) | dx                  |
| weight, not x        | the same                                                             | dweight; no dx      |
| none                 | nothing; no autograd node at all                                     |                     |

On a CPU csrc/norm.h's loops serve both norms: layer_norm.py has the figures.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_norm, in_cpp, wants_grad
from fastpeft.ops._recompute import mark_recomputable, recipe_of


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The definition, in the accumulator's dtype, rounded once."""
    h = x.to(accumulator(x.dtype))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(h.dtype)).to(x.dtype)


def _fwd(x, residual, weight, eps, keep):
    h = x if residual is None else (x + residual).contiguous()
    acc = h.to(accumulator(x.dtype))
    rstd = torch.rsqrt(acc.square().mean(-1, keepdim=True).add_(eps))
    y = acc * rstd
    y = y if weight is None else y.mul_(weight)
    y = x.new_empty(x.shape).copy_(y)  # contiguous, whatever x's strides are
    return y, x.new_empty(0) if residual is None else h, rstd.reshape(-1) if keep else acc.new_empty(0)


def _fwd_fake(x, residual, weight, eps, keep):
    rows = x.numel() // x.shape[-1] if keep and x.shape[-1] else 0
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), h, x.new_empty(rows, dtype=accumulator(x.dtype))


def _bwd(dy, h, weight, rstd, dh, need_dx, need_dweight):
    n = h.shape[-1]
    rstd = rstd.view(*h.shape[:-1], 1)
    x_hat, dy = h.to(rstd.dtype) * rstd, dy.to(rstd.dtype)
    like = h if weight is None else weight
    dweight = (dy * x_hat).reshape(-1, n).sum(0).to(like.dtype) if need_dweight else like.new_empty(0)
    if not need_dx:
        return h.new_empty(0), dweight
    wd = dy if weight is None else dy * weight
    dx = (wd - x_hat * (wd * x_hat).mean(-1, keepdim=True)).mul_(rstd)
    if dh is not None:
        dx += dh
    return h.new_empty(h.shape).copy_(dx), dweight


def _bwd_fake(dy, h, weight, rstd, dh, need_dx, need_dweight):
    like = h if weight is None else weight
    return h.new_empty(h.shape if need_dx else 0), like.new_empty(h.shape[-1] if need_dweight else 0)


_forward = _library.define(
    "rms_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, float eps, bool keep) -> (Tensor y, Tensor h, Tensor rstd)",
    fake=_fwd_fake,
    composite=_fwd,
)
_backward = _library.define(
    "rms_norm_bwd(Tensor dy, Tensor h, Tensor? weight, Tensor rstd, Tensor? dh, bool need_dx, bool need_dweight)"
    " -> (Tensor dx, Tensor dweight)",
    fake=_bwd_fake,
    composite=_bwd,
)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        ctx.set_materialize_grads(False)
        y, h, rstd = _forward(x, residual, weight, eps, True)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        if residual is None:
            return y
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    @first_order
    def backward(ctx, dy, dh=None):
        need_x, need_residual, need_weight, _ = ctx.needs_input_grad
        if dy is None:  # only the sum was used
            return dh if need_x else None, dh if need_residual else None, None, None
        h, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(dy, h, weight, rstd, dh, need_x or need_residual, need_weight)
        return dx if need_x else None, dx if need_residual else None, dweight if need_weight else None, None


def _again(eps, h, weight):
    """y, for the backward of an op that took it."""
    return _forward(h, None, weight, eps, False)[0]


def norm_inputs(y: Tensor) -> tuple[Tensor, Tensor | None, float] | None:
    """(x, weight, eps) of the call that made ``y``, unchanged since; None where that is not known."""
    recipe = recipe_of(y)
    known = recipe is not None and isinstance(recipe.function, partial) and recipe.function.func is _again
    return (*recipe.inputs, recipe.function.args[0]) if known else None


@under_autocast("promote")
def _checked(op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float):
    """(y, h) of any call, by the Function in Python where there is a gradient; h is None without ``residual``."""
    check_norm(op, x, residual, eps, weight=weight)
    if not wants_grad(x, residual, weight):
        y, h, *_ = _forward(x, residual, weight, eps, False)
        return y, None if residual is None else h
    if (made := in_cpp("rms_norm", x, residual, weight, eps)) is None:
        made = _RMSNorm.apply(x, residual, weight, eps)
    return _marked(made, x, residual, weight, eps)


def _marked(made, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float):
    """(y, h) of what a Function returned, y with its recipe."""
    y, h = (made, None) if residual is None else made
    return mark_recomputable(y, partial(_again, eps), x if h is None else h, weight), h


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension of ``x`` [..., N]; returns y of x's shape and dtype.

    ``weight`` is [N] or None, in x's dtype or float32. A frozen one costs nothing: its gradient is not computed.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    if (made := in_cpp("rms_norm", x, None, weight, eps)) is not None:
        return _marked(made, x, None, weight, eps)[0]
    return _checked("rms_norm", x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``y = rms_norm(h)`` in one pass; returns (y, h), both of x's shape [..., N]."""
    if residual is not None and (made := in_cpp("rms_norm", x, residual, weight, eps)) is not None:
        return _marked(made, x, residual, weight, eps)
    return _checked("add_rms_norm", x, residual, weight, eps)
