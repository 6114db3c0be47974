"""RMSNorm and LaVIN's adapter as one op: one read of the residual stream, and nothing saved between the two.

    y = rms_norm(x) gamma           x' = y + s (w_0 B_0 + w_1 B_1)(A y + a_0)                   (mm_adapter.py has the adapter)

    dA = (rstd da)^T x gamma        dgamma = sum dx' x_hat + sum_j A_j [(rstd da)^T x]_j        (y is x scaled by rows and columns)

Source: as mm_adapter.py and rms_norm.py. Shapes: x [B, M, C]; gamma [C]; rstd [B M] float32; the rest as in mm_adapter.py.
Accumulation: float32 (float64 for float64).

| gradient needed for          | saved                                                            | computed in backward         |
|------------------------------|------------------------------------------------------------------|------------------------------|
| x, gamma or w_down           | x (which is the residual stream, kept once), rstd, a: h a token  | the adapter's, then dx       |
| w_up, b_up, routing          | a                                                                | e or dE                      |
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_norm, no_view, wants_grad
from fastpeft.ops.dropout import new_seed
from fastpeft.ops.rms_norm import rms_norm_reference

adapter = import_module("fastpeft.ops.mm_adapter")  # the module: fastpeft.ops has the function under that name


def norm_mm_adapter_reference(x, gamma, eps, w_down, b_down, w_up, b_up, routing, scale=1.0, groups=2) -> Tensor:
    """The one after the other."""
    y = rms_norm_reference(x, gamma, eps)
    return adapter.mm_adapter_reference(y, w_down, b_down, w_up, b_up, routing, scale, groups)


def _fwd(x, gamma, eps, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    y, _, rstd = torch.ops.fastpeft.rms_norm_fwd(x, None, gamma, eps, True)
    out, a = adapter._fwd(y, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed)
    return out, a, rstd


def _fwd_fake(x, gamma, eps, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    out, a = adapter._fwd_fake(x, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed)
    return out, a, x.new_empty(a.shape[0], dtype=accumulator(x.dtype))


def _bwd(g, x, gamma, rstd, a, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed, *needs):
    need_x, need_gamma, need_down, need_up, need_routing = needs
    args = (g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x or need_gamma, need_down, need_up, need_routing)
    dy, *rest = adapter._bwd(*args, rstd=rstd, gamma=gamma)
    dx, dgamma = g.new_empty(0), gamma.new_empty(0)
    if need_x or need_gamma:
        dx, dgamma = torch.ops.fastpeft.rms_norm_bwd(dy, x, gamma, rstd, None, need_x, need_gamma)
    return dx, dgamma, *rest


def _bwd_fake(g, x, gamma, rstd, a, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed, *needs):
    need_x, need_gamma, need_down, need_up, need_routing = needs
    args = (g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_down, need_up, need_routing)
    dx, *rest = adapter._bwd_fake(*args)
    return dx, gamma.new_empty(gamma.shape if need_gamma else 0), *rest


_forward, _backward = adapter.define_adapter("norm_mm_adapter", (_fwd, _fwd_fake), (_bwd, _bwd_fake), normed=True)


@_library.flop_formula(torch.ops.fastpeft.norm_mm_adapter_fwd)
def _fwd_flops(x, gamma, eps, w_down, b_down, w_up, *args, out_shape=None, **kwargs) -> int:
    return adapter._fwd_flops(x, w_down, b_down, w_up)


@_library.flop_formula(torch.ops.fastpeft.norm_mm_adapter_bwd)
def _bwd_flops(
    g, x, gamma, rstd, a, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_gamma, *needs, **kwargs
) -> int:
    return adapter._bwd_flops(g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x or need_gamma, *needs)


class _NormMMAdapter(Function):
    @staticmethod
    def forward(ctx, eps, scale, groups, p, seed, x, gamma, w_down, b_down, w_up, b_up, routing):
        out, a, rstd = _forward(x, gamma, eps, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed)
        need_x, need_gamma, *down, need_w_up, need_b_up, need_routing = ctx.needs_input_grad[5:]
        ctx.args = (scale, groups, p)
        ctx.needs = (need_x, need_gamma, any(down), need_w_up or need_b_up, need_routing)
        keep = any(ctx.needs[:3])
        ctx.save_for_backward(x if keep else None, gamma, rstd if keep else None, a, w_down, b_down, w_up, b_up, routing, seed)
        return no_view(out)

    @staticmethod
    @first_order
    def backward(ctx, g):
        *tensors, seed = ctx.saved_tensors
        grads = _backward(g, *tensors, *ctx.args, seed, *ctx.needs)
        return *(None,) * 5, *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[5:]))


@under_autocast("promote")
def norm_mm_adapter(
    x: Tensor,
    gamma: Tensor,
    eps: float,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    routing: Tensor,
    scale: float = 1.0,
    groups: int = 2,
    dropout_p: float = 0.0,
) -> Tensor:
    """``mm_adapter(rms_norm(x, gamma, eps), ...)`` as one op: x [B, M, C], gamma [C], the rest as in :func:`mm_adapter`.

    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    check_norm("norm_mm_adapter", x, None, eps, gamma=gamma)
    adapter._check(x, w_down, b_down, w_up, b_up, routing, groups, dropout_p)
    seed = new_seed() if dropout_p > 0.0 else None
    tensors, p = (w_down, b_down, w_up, b_up, routing), float(dropout_p)
    if wants_grad(x, gamma, *tensors):
        return _NormMMAdapter.apply(float(eps), float(scale), groups, p, seed, x, gamma, *tensors)
    return _forward(x, gamma, float(eps), *tensors, float(scale), groups, p, seed)[0]
