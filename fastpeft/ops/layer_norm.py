"""LayerNorm, optionally with the residual addition before it, and only the gradients that are asked for.

    h = x (+ residual)        mean = sum(h) / N        rstd = (sum((h - mean)^2) / N + eps)^-1/2
    x_hat = (h - mean) rstd   y = x_hat weight + bias

    wd = dy weight            dbias = sum_rows dy      dweight = sum_rows dy x_hat
    dx = rstd (wd - mean_N(wd) - x_hat mean_N(wd x_hat)) (+ dh),   dresidual = dx

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), eq. 4.
Shapes: x, residual, h, y [..., N]; weight, bias [N] (x's dtype or the accumulator's); mean, rstd [rows].
Accumulation: float32 (float64 for float64), statistics by two passes over the row; one rounding, at the store.

| gradient needed for  | saved                                  | written in backward |
|----------------------|----------------------------------------|---------------------|
| x or residual        | h (x itself without residual), mean, rstd, weight (the parameter, no copy) | dx |
| weight, not x        | the same                               | dweight; no dx      |
| bias only            | nothing                                | dbias               |
| none                 | nothing; no autograd node at all       |                     |

x_hat is never rebuilt from y by dividing by weight: a zero weight would lose it.

csrc on a CPU (AMD EPYC, one thread, AVX-512; time of ATen over ours, interleaved, least of 23, the middle of three runs; outputs allocated
as they come, in a heap that holds them; rows of 128x768 lie in the second-level cache, those of 4096x768 in fp32 in none):

| rows x width | fp32 fwd, all, dx, params | bf16 fwd, all, dx, params | fp16 fwd, all, dx, params |
|--------------|---------------------------|---------------------------|---------------------------|
| 128 x 768    | 1.16, 1.3, 1.13, 1.02     | 1.04, 1.9, 1.13, 2.1      | 1.2, 2.0, 1.4, 1.8        |
| 2048 x 768   | 1.3, 1.35, 1.5, 0.94      | 1.14, 2.1, 1.19, 2.9      | 1.5, 2.5, 1.6, 2.8        |
| 4096 x 768   | 1.09, 1.6, 1.2, 0.97      | 1.13, 2.0, 1.18, 2.6      | 1.5, 2.3, 1.6, 2.5        |
| 2048 x 2048  | 1.10, 1.55, 1.45, 1.16    | 1.15, 1.7, 1.17, 1.75     | 1.5, 1.9, 1.55, 1.6       |
| 1024 x 4096  | 1.11, 1.75, 1.6, 1.2      | 1.07, 1.85, 1.24, 2.1     | 1.01, 2.1, 1.4, 1.8       |
| 2048 x 4096  | 1.09, 1.7, 1.5, 1.24      | 1.02, 1.9, 1.20, 2.2      | 0.99, 2.0, 1.4, 1.8       |

That is the operators alone. What bounds the larger fp32 ones is memory: "all" runs at 0.9, 0.7 and 0.8 of the rate of a plain
c = a + b over dy, h and dx in the same run (4096x768, 2048x2048, 1024x4096; ATen at 0.57, 0.44 and 0.45), "params" at 0.7 of that of a sum
of both. 2048x768, which the last-level cache holds, runs at 0.6 of it. Between these widths: "all" 1.44 at 2048x1280 and 1.55 at
2048x1536, where "params" still loses, 0.85 and 0.91. What a call costs the host besides is in bench/results/host_cpu.md: csrc/autograd
has the Function below in C++, for calls that are plain.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_norm, in_cpp, wants_grad
from fastpeft.ops._recompute import mark_recomputable

aten = torch.ops.aten


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, in the accumulator's dtype, rounded once."""
    h = x.to(accumulator(x.dtype))
    centred = h - h.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(h.dtype)
    y = y if bias is None else y + bias.to(h.dtype)
    return y.to(x.dtype)


def _affine(x: Tensor, p: Tensor | None) -> Tensor | None:
    """ATen mixes dtypes on CPU, and then keeps its statistics in float32; on CUDA it wants parameters of x's dtype."""
    return None if p is None else p.to(accumulator(x.dtype) if x.device.type == "cpu" else x.dtype)


def _fwd(x, residual, weight, bias, eps, keep):
    h = x.contiguous() if residual is None else (x + residual).contiguous()
    acc, n = accumulator(x.dtype), x.shape[-1]
    if weight is None and acc != x.dtype and x.device.type == "cpu":
        weight = x.new_ones(n)
    y, mean, rstd = aten.native_layer_norm(h, [n], _affine(x, weight), _affine(x, bias), eps)
    stats = [s.to(acc).view(-1) if keep else x.new_empty(0, dtype=acc) for s in (mean, rstd)]
    return y, x.new_empty(0) if residual is None else h, *stats


def _fwd_fake(x, residual, weight, bias, eps, keep):
    rows = x.numel() // x.shape[-1] if keep and x.shape[-1] else 0
    y, acc = x.new_empty(x.shape), accumulator(x.dtype)
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return y, h, x.new_empty(rows, dtype=acc), x.new_empty(rows, dtype=acc)


def _bwd(dy, h, weight, mean, rstd, dh, need_dx, need_dweight, need_dbias):
    n = h.shape[-1]
    affine = _affine(h, weight if weight is not None else h.new_ones(n))
    stats = [s.view(*h.shape[:-1], 1) for s in (mean, rstd)]
    mask = [need_dx, need_dweight, need_dbias]
    dx, dweight, dbias = aten.native_layer_norm_backward(dy.contiguous(), h.contiguous(), [n], *stats, affine, affine, mask)
    if need_dx and dh is not None:
        dx = dx + dh
    like = h if weight is None else weight
    dparams = [d.to(like.dtype) if need else like.new_empty(0) for d, need in zip((dweight, dbias), mask[1:])]
    return dx if need_dx else h.new_empty(0), *dparams


def _bwd_fake(dy, h, weight, mean, rstd, dh, need_dx, need_dweight, need_dbias):
    like = h if weight is None else weight
    dparam = [like.new_empty(h.shape[-1] if need else 0) for need in (need_dweight, need_dbias)]
    return h.new_empty(h.shape if need_dx else 0), *dparam


_forward = _library.define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool keep)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    fake=_fwd_fake,
    composite=_fwd,
)
_backward = _library.define(
    "layer_norm_bwd(Tensor dy, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dh,"
    " bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_bwd_fake,
    composite=_bwd,
)


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        keep = need_x or need_residual or need_weight
        y, h, mean, rstd = _forward(x, residual, weight, bias, eps, keep)
        ctx.param_dtype = bias.dtype if need_bias else None
        if keep:
            ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)
        if residual is None:
            return y
        if not (need_x or need_residual):
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    @first_order
    def backward(ctx, dy, dh=None):
        need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        need_dx = need_x or need_residual
        if dy is None:  # only the sum was used
            return dh if need_x else None, dh if need_residual else None, None, None, None
        if not (need_dx or need_weight):
            flat = dy.reshape(-1, dy.shape[-1])
            return None, None, None, flat.sum(0, dtype=accumulator(dy.dtype)).to(ctx.param_dtype), None
        h, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy, h, weight, mean, rstd, dh, need_dx, need_weight, need_bias)
        dweight, dbias = dweight if need_weight else None, dbias if need_bias else None
        return dx if need_x else None, dx if need_residual else None, dweight, dbias, None


def _again(eps, h, weight, bias):
    """y, for the backward of an op that took it."""
    return _forward(h, None, weight, bias, eps, False)[0]


@under_autocast("promote")
def _checked(op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float):
    """(y, h) of any call, by the Function in Python where there is a gradient; h is None without ``residual``."""
    check_norm(op, x, residual, eps, weight=weight, bias=bias)
    if not wants_grad(x, residual, weight, bias):
        y, h, *_ = _forward(x, residual, weight, bias, eps, False)
        return y, None if residual is None else h
    if (made := in_cpp("layer_norm", x, residual, weight, bias, eps)) is None:
        made = _LayerNorm.apply(x, residual, weight, bias, eps)
    return _marked(made, x, residual, weight, bias, eps)


def _marked(made, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float):
    """(y, h) of what a Function returned, y with its recipe."""
    y, h = (made, None) if residual is None else made
    return mark_recomputable(y, partial(_again, eps), x if h is None else h, weight, bias), h


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension of ``x`` [..., N]; returns y of x's shape and dtype.

    ``weight`` and ``bias`` are [N] or None, in x's dtype or float32. Frozen ones cost nothing: their gradients are not computed.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    if (made := in_cpp("layer_norm", x, None, weight, bias, eps)) is not None:
        return _marked(made, x, None, weight, bias, eps)[0]
    return _checked("layer_norm", x, None, weight, bias, eps)[0]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``y = layer_norm(h)`` in one pass; returns (y, h), both of x's shape [..., N].

    h is what backward keeps: neither x nor residual is saved. Post-norm blocks (BERT) drop h, pre-norm blocks carry it on.
    """
    if residual is not None and (made := in_cpp("layer_norm", x, residual, weight, bias, eps)) is not None:
        return _marked(made, x, residual, weight, bias, eps)
    return _checked("add_layer_norm", x, residual, weight, bias, eps)
