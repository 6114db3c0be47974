"""Linear layers of experts, each with a low-rank branch: rows lie expert by expert, and each expert multiplies its own.

    y_s = W_e x_s + b_e + c U_e D_e x_s                          e: the expert of row s
    dS = c U_e^T dy       dx = W_e^T dy + D_e^T dS                S = D_e x
    dD_e = sum dS x^T     dU_e = c sum dy S^T     dW_e = sum dy x^T     db_e = sum dy        sums over the rows of e

and rows times a factor each, which for an expert's input is the factor on its output, as the layer is linear but for b:

    y_s = f_s x_s         dx = f dy               df_s = sum_j dy_j x_j

Source: Hu et al., "LoRA" (2021), section 4.1. PEFT forms W_e + c U_e D_e instead: as much memory as the experts' own weights, and in
backward their full gradient, a third product as large as the other two, of which the rank-r part is kept.
Shapes: x [S, in]; W [E, out, in] (a transposed view serves); b [E, out]; D [E, r, in]; U [E, out, r]; S [r, rows]; f [S].
Accumulation: the GEMM's. ``ends`` lies on the host: how many rows an expert has is a size of its products.

| gradient needed for | saved                                     |
|---------------------|-------------------------------------------|
| x                   | nothing (W, D, U are parameters, no copy) |
| D, W                | x, or its recipe                          |
| U                   | S                                         |
| f                   | x, or its recipe                          |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops import _gemm
from fastpeft.ops._autocast import first_order
from fastpeft.ops._common import check_floating, wants_grad
from fastpeft.ops._recompute import mark_recomputable, recompute, to_save
from fastpeft.ops.low_rank_grads import low_rank_grads


class Experts(NamedTuple):
    """The linear layers of all experts; ``down`` and ``up`` are both None where they have no branch."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scaling: float = 1.0


def expert_linear_reference(x: Tensor, ends: Sequence[int], experts: Experts) -> Tensor:
    """The definition, of some rows."""
    parts = []
    for e, rows in _by_expert(ends):
        weight = experts.weight[e]
        if experts.down is not None:
            weight = weight + experts.scaling * (experts.up[e] @ experts.down[e])
        y = x[rows] @ weight.t()
        parts.append(y if experts.bias is None else y + experts.bias[e])
    return torch.cat(parts)


def _by_expert(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of each that has some."""
    begin = 0
    for e, end in enumerate(ends):
        if end > begin:
            yield e, slice(begin, end)
        begin = end


def _fwd(x, ends, weight, bias, down, up, scaling) -> tuple[Tensor, Tensor]:
    """(y, S)"""
    work = _gemm.work_dtype(x)
    y = x.new_empty(x.shape[0], weight.shape[1])
    low = x.new_empty(0 if down is None else down.shape[1], x.shape[0])
    for e, rows in _by_expert(ends):
        own, out = x[rows].to(work), y[rows]
        if down is not None:
            s = down[e].to(work) @ own.t()
            low[:, rows] = s
        if work != x.dtype:
            wide = _gemm.mm(own, weight[e].t())
            out.copy_(wide if down is None else wide.addmm_(s.t(), up[e].to(work).t(), alpha=scaling))
        elif down is None:
            torch.mm(own, weight[e].t(), out=out)
        else:  # a GEMM adds at no cost, the branch is one more pass over y (lora_linear.py)
            torch.mm(s.t(), up[e].t() * scaling, out=out).addmm_(own, weight[e].t())
        if bias is not None:
            out += bias[e]
    return y, low


def _fwd_fake(x, ends, weight, bias, down, up, scaling):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(0 if down is None else down.shape[1], x.shape[0])


def _bwd(dy, x, ends, weight, down, up, low, scaling, needs) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order x, weight, bias, down, up."""
    need_x, need_weight, need_bias, need_down, need_up = needs
    work = _gemm.work_dtype(dy)
    shapes = _shapes_of_gradients(dy, weight, down, up)
    made = [dy.new_zeros(shape) if need else None for shape, need in zip(shapes, needs)]
    dx, dweight, dbias, ddown, dup = made
    for e, rows in _by_expert(ends):
        own = dy[rows].to(work)
        branch = up[e].to(work) if up is not None and (need_x or need_down) else None
        s, grad = low_rank_grads(own, branch, low[:, rows].to(work) if need_up else None, scaling)
        if need_up:
            dup[e] = grad
        if need_x and work == dy.dtype and s is not None:
            torch.mm(s.t(), down[e], out=dx[rows]).addmm_(own, weight[e])
        elif need_x:
            part = _gemm.mm(own, weight[e])
            dx[rows] = part if s is None else part.addmm_(s.t(), down[e].to(work))
        if need_down:
            ddown[e] = s @ x[rows].to(work)
        if need_weight:
            dweight[e] = own.t() @ x[rows].to(work)
        if need_bias:
            dbias[e] = own.sum(0)
    return [grad for grad in made if grad is not None]


def _shapes_of_gradients(dy, weight, down, up):
    return (dy.shape[0], weight.shape[2]), weight.shape, weight.shape[:2], *(None if t is None else t.shape for t in (down, up))


def _bwd_fake(dy, x, ends, weight, down, up, low, scaling, needs):
    return [dy.new_empty(shape) for shape, need in zip(_shapes_of_gradients(dy, weight, down, up), needs) if need]


_forward = _library.define(
    "expert_linear_fwd(Tensor x, int[] ends, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, float scaling)"
    " -> (Tensor y, Tensor low)",
    fake=_fwd_fake,
    composite=_fwd,
    native=False,
)
_backward = _library.define(
    "expert_linear_bwd(Tensor dy, Tensor? x, int[] ends, Tensor weight, Tensor? down, Tensor? up, Tensor? low, float scaling,"
    " bool[] needs) -> Tensor[]",
    fake=_bwd_fake,
    composite=_bwd,
    native=False,
)


@_library.flop_formula(torch.ops.fastpeft.expert_linear_fwd)
def _fwd_flops(x, ends, weight, bias, down, up, scaling, *args, out_shape=None, **kwargs) -> int:
    _, out, width = weight
    return 2 * x[0] * (out * width + (0 if down is None else down[1] * (out + width)))


@_library.flop_formula(torch.ops.fastpeft.expert_linear_bwd)
def _bwd_flops(dy, x, ends, weight, down, up, low, scaling, needs, *args, out_shape=None, **kwargs) -> int:
    need_x, need_weight, _, need_down, need_up = needs
    (_, out, width), rank = weight, 0 if down is None else down[1]
    per_row = out * width * (need_x + need_weight) + rank * width * (need_x + need_down)
    return 2 * dy[0] * (per_row + rank * out * (bool(need_x or need_down) + need_up))


class _ExpertLinear(Function):
    @staticmethod
    def forward(ctx, ends, scaling, x, weight, bias, down, up):
        y, low = _forward(x, ends, weight, bias, down, up, scaling)
        ctx.needs = list(ctx.needs_input_grad[2:])
        _, need_weight, _, need_down, need_up = ctx.needs
        ctx.ends, ctx.scaling = ends, scaling
        ctx.recipe, kept = to_save(x if need_weight or need_down else None)
        ctx.save_for_backward(weight, down, up, low if need_up else None, *kept)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        weight, down, up, low, *kept = ctx.saved_tensors
        x = recompute(ctx.recipe, kept)
        grads = iter(_backward(dy, x, ctx.ends, weight, down, up, low, ctx.scaling, ctx.needs))
        return None, None, *(next(grads) if need else None for need in ctx.needs)


def expert_linear(x: Tensor, ends: Sequence[int], experts: Experts) -> Tensor:
    """[S, out] of x [S, in], whose rows of expert e are those from ``ends[e - 1]`` (0 for the first) to ``ends[e]``.

    All tensors have one dtype. Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check(x, ends, experts)
    weight, bias, down, up, scaling = experts
    if wants_grad(x, weight, bias, down, up):
        return _ExpertLinear.apply(list(ends), float(scaling), x, weight, bias, down, up)
    return _forward(x, list(ends), weight, bias, down, up, float(scaling))[0]


def _check(x: Tensor, ends: Sequence[int], experts: Experts) -> None:
    weight, bias, down, up, _ = experts
    check_floating("expert_linear", x=x, weight=weight, bias=bias, down=down, up=up)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"expert_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; pass [S, in] and [E, out, in]")
    cut = [0, *ends]
    if len(ends) != weight.shape[0] or cut[-1] != x.shape[0] or cut != sorted(cut):
        raise ValueError(f"expert_linear: ends {list(ends)} do not cut {x.shape[0]} rows into {weight.shape[0]} experts'")
    if (down is None) != (up is None):
        raise ValueError("expert_linear: one of down, up is None; pass both, or neither for plain linear layers")
    E, out, width = weight.shape
    if down is not None and (down.dim() != 3 or down.shape[::2] != (E, width) or up.shape != (E, out, down.shape[1])):
        raise ValueError(f"expert_linear: down {tuple(down.shape)} and up {tuple(up.shape)} do not fit weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != (E, out):
        raise ValueError(f"expert_linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if {t.dtype for t in (weight, bias, down, up) if t is not None} != {x.dtype}:
        raise TypeError("expert_linear: x, weight, bias, down and up must have one dtype; cast them to x's")


def _times(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors[:, None].to(x.dtype)


class _RowFactors(Function):
    @staticmethod
    def forward(ctx, x, factors):
        ctx.recipe, kept = to_save(x if ctx.needs_input_grad[1] else None)
        ctx.save_for_backward(factors, *kept)
        return _times(x, factors)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        factors, *kept = ctx.saved_tensors
        need_x, need_factors = ctx.needs_input_grad
        x = recompute(ctx.recipe, kept)
        dfactors = torch.linalg.vecdot(dy.to(factors.dtype), x.to(factors.dtype)) if need_factors else None
        return _times(dy, factors) if need_x else None, dfactors


def row_factors(x: Tensor, factors: Tensor) -> Tensor:
    """x [S, N] times ``factors`` [S], in x's dtype; a linear layer behind it need not keep what backward can form x from."""
    if not wants_grad(x, factors):
        return _times(x, factors)
    return mark_recomputable(_RowFactors.apply(x, factors), _times, x, factors, smaller=True)
