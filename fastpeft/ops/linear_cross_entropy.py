"""Linear head and cross entropy in one op: logits only where labels are, in chunks, gradients computed in the forward pass.

    z = h W^T + b        loss = lse(z) - (1 - e) z_y - (e / V) sum_v z_v        e: label smoothing
    G = softmax(z) - (1 - e) onehot(y) - e / V        dh = g G W        dW = (g G)^T h        db = sum_rows g G
    with a soft cap c (Gemma 2): z = c tanh(u / c), u = h W^T + b, and G times 1 - (z / c)^2 in place of G

Source: the softmax's own derivative; computing gradients chunk by chunk in forward follows Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (2024), section 4, without their filtering of small entries, which would change the result.
Shapes: hidden h [..., C]; weight W [V, C]; bias b [V]; labels y [...] int64; M rows, of which n are labelled.
Accumulation: logits of a chunk, softmax, loss and dW across chunks in float32 (float64 for float64).

| gradient needed for                | saved                                                     | matmuls over n rows |
|------------------------------------|-----------------------------------------------------------|---------------------|
| hidden, any reduction              | dh [n, C] of the labelled rows, before the upstream       | 2                   |
|                                    | gradient; where n < M also their index, 8 n bytes         |                     |
| weight, bias; reduction mean, sum  | dW [V, C], db [V], likewise before the upstream gradient  | +1 for dW           |
| weight, bias; reduction none       | h and y (their labelled rows and the index where n < M;   | 2 + 1 + 1           |
|                                    | or h's recipe): rows of G scale apart,                    |                     |
|                                    | so backward recomputes z                                  |                     |
| none                               | nothing                                                   | 1                   |

A frozen head gets no dW. Logits exist for at most CHUNK_BYTES at a time (but at least MIN_ROWS rows, for the GEMM; up to ROWS
rows may take a quarter of W's bytes; with a trained head as many bytes as dW takes anyway). The mean's 1/n is put into G, except in
float16, where small entries would vanish.
The number of labelled rows sizes the GEMMs, so the host must know it: labels on the host (a collator's) tell it and nothing waits for the
GPU; for labels on the GPU there is one wait for one integer per loss. Under torch.compile, and for labels without values (meta, fake), no
shape may depend on data: there the operator finds the labelled rows itself and dh is dense, [M, C], zero at the others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._chunked_loss import chunked, labelled_rows, rows_of_aten, select_rows
from fastpeft.ops._common import accumulator, check_floating, to_device_async, wants_grad
from fastpeft.ops._private import graph_is_kept, is_fake
from fastpeft.ops._recompute import recipe_of, recompute, to_save
from fastpeft.ops._tiled import on_device_of
from fastpeft.ops.rescale import _forward as scaled
from fastpeft.static_shapes import sizes


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    softcap=0.0,
) -> Tensor:
    """PyTorch's own two calls, in the accumulator's dtype."""
    acc = accumulator(hidden.dtype)
    logits = F.linear(hidden.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.view(-1, weight.shape[0]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def _composite(*args):
    return chunked(rows_of_aten, *args)


def _triton(*args):
    from fastpeft.kernels.linear_cross_entropy import cross_entropy_rows

    with on_device_of(args[:1]):
        return chunked(cross_entropy_rows, *args)


def _fake(hidden, weight, bias, labels, row_scale, ignore_index, smoothing, need_dhidden, need_dweight, need_dbias, softcap=0.0):
    return (
        hidden.new_empty(labels.shape, dtype=accumulator(hidden.dtype)),
        hidden.new_empty(hidden.shape if need_dhidden else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if need_dbias else 0),
    )


_op = _library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_scale, int? ignore_index,"
    " float label_smoothing, bool need_dhidden, bool need_dweight, bool need_dbias, float softcap=0.0)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    composite=_composite,
    triton=_triton,
)


@_library.flop_formula(torch.ops.fastpeft.linear_cross_entropy, get_raw=True)
def _flops(hidden, weight, bias, labels, row_scale, ignore_index, smoothing, need_dhidden, need_dweight, need_dbias, softcap=0.0, **_):
    """Labelled rows only; all of them where labels have no values."""
    known = ignore_index is not None and _has_values(labels)
    n = int((labels != ignore_index).sum()) if known else labels.shape[0]
    return 2 * n * weight.shape[0] * weight.shape[1] * (1 + need_dhidden + need_dweight)


def _has_values(labels: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or is_fake(labels))


class _LinearCrossEntropy(Function):
    """Over hidden [..., C] and labels [M]; the losses are [M] for "none"."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, smoothing, reduction, softcap):
        need_dhidden, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        rows, M, index = hidden.reshape(-1, hidden.shape[-1]), labels.shape[0], None
        if _has_values(labels):  # from here on there are labelled rows only
            index, ignore_index = labelled_rows(labels, ignore_index), None
            labels, rows = select_rows(labels, index), select_rows(rows, index)
        index = None if index is None else to_device_async(index, rows.device)
        ctx.shape, ctx.config = hidden.shape, (ignore_index, smoothing, softcap)
        ctx.recomputes_logits = reduction == "none" and (need_dweight or need_dbias)
        needs = (False,) * 3 if ctx.recomputes_logits else (need_dhidden, need_dweight, need_dbias)
        factor = _share(rows, labels, ignore_index) if reduction == "mean" else None
        late = factor is not None and hidden.dtype == torch.float16
        row_scale = None if factor is None or late else factor.expand(labels.shape[0])
        loss, *grads = _op(rows, weight, bias, labels, row_scale, ignore_index, smoothing, *needs, softcap)
        if ctx.recomputes_logits:
            ctx.recipe, kept = to_save(hidden) if index is None or recipe_of(hidden) is not None else (None, (rows,))
            ctx.save_for_backward(index, weight, bias, labels, *kept)
        else:
            ctx.save_for_backward(index, factor if late else None, *(grad if need else None for grad, need in zip(grads, needs)))
        if reduction != "none":
            return _reduce(loss, labels, ignore_index, reduction)
        return loss if index is None else loss.new_zeros(M).index_copy_(0, index, loss)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:3]
        index, *saved = ctx.saved_tensors
        if grad.dim():  # reduction none: rows scale apart
            grad = select_rows(grad, index)
        if ctx.recomputes_logits:
            weight, bias, labels, *kept = saved
            hidden = recompute(ctx.recipe, kept).reshape(-1, ctx.shape[-1])
            rows = hidden if ctx.recipe is None else select_rows(hidden, index)
            _, *grads = _op(rows, weight, bias, labels, grad, *ctx.config[:2], *needs, ctx.config[2])
            grads = [d if need else None for d, need in zip(grads, needs)]
        else:
            factor, *grads = saved
            grad = grad if factor is None else grad * factor
            grad = grad[:, None] if grad.dim() else grad.view(1)
            grads = [None if d is None else _scaled(d, grad) for d in grads]
        dhidden, *rest = grads
        if dhidden is not None:
            if index is not None:
                dhidden = dhidden.new_zeros(ctx.shape).view(-1, ctx.shape[-1]).index_copy_(0, index, dhidden)
            dhidden = dhidden.view(ctx.shape)
        return dhidden, *rest, None, None, None, None, None


class _SumOfCounted(Function):
    """The sum over ``counted`` rows, [M] bool of [M, C]. In a step of static shapes the device alone knows which: all are computed."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, counted, smoothing, softcap):
        needs, row_scale = ctx.needs_input_grad[:3], counted.to(accumulator(hidden.dtype))
        loss, *grads = _op(hidden, weight, bias, labels.where(counted, 0), row_scale, None, smoothing, *needs, softcap)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs)))
        return loss.where(counted, 0.0).sum()

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return *(None if d is None else _scaled(d, grad.view(1)) for d in ctx.saved_tensors), None, None, None, None


def _scaled(d: Tensor, grad: Tensor) -> Tensor:
    """d grad. The last backward of a graph may have d itself, which nobody reads after it: with a trained head on the CPU a new tensor of
    dW's size costs as much as a third of the product that made it."""
    eager = type(d) is Tensor and not torch.compiler.is_compiling()
    if eager and grad.numel() == 1 and not graph_is_kept():
        if d.device.type == "cpu" and float(grad) == 1.0:  # loss.backward(): on the CPU asking waits for nothing
            return d
        if d.dtype == grad.dtype:
            return d.mul_(grad)
    return scaled(d, grad)  # one pass with a float32 factor; a 0-dim one would be rounded to bfloat16 first


def _share(rows: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    """1/n, 0 where nothing is labelled, in the accumulator's dtype; where the host knows n, on rows' device, else on labels'."""
    dtype = accumulator(rows.dtype)
    if ignore_index is None:
        return rows.new_full((), 1 / max(labels.shape[0], 1), dtype=dtype)
    n = (labels != ignore_index).sum().to(dtype)
    return torch.where(n > 0, 1 / n, torch.zeros_like(n))


def _reduce(loss: Tensor, labels: Tensor, ignore_index: int | None, reduction: str) -> Tensor:
    """Of losses [M]; the mean of none is nan, as in PyTorch. (A count on the host divides on a GPU without being sent there.)"""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (labels.shape[0] if ignore_index is None else (labels != ignore_index).sum().to(loss.dtype))


def _alike(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the dtype that hidden and weight promote to; the bias may also have its accumulator's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if bias is not None and bias.dtype not in (dtype, accumulator(dtype)):
        bias = bias.to(dtype)
    return hidden.to(dtype), weight.to(dtype), bias


def _check(hidden, weight, bias, labels, label_smoothing, reduction, softcap) -> None:
    op = "linear_cross_entropy"
    check_floating(op, hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; pass [..., C] and [V, C]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; pass [{weight.shape[0]}], one per row of weight")
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels are {labels.dtype}; call labels.long()")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{op}: labels {tuple(labels.shape)} must have hidden's leading shape {tuple(hidden.shape[:-1])}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it lies between 0 and 1")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; it is a positive number, or 0 for none")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction={reduction!r}; use 'mean', 'sum' or 'none'")


@under_autocast("lower")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float = 0.0,
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), labels)`` without the logits.

    hidden [..., C], weight [V, C], bias [V] or None, labels [...] int64, on hidden's device, or on the host, so that no GPU is waited
    for. Returns a scalar, or losses of labels' shape for "none", in float32 (float64 for float64): bfloat16 has 3 digits. Where hidden
    and weight differ in dtype, the narrower one is cast for the call (a bfloat16 head under float32 states: a copy of it, 4 V C bytes);
    gradients have their own dtypes.
    ``softcap`` c: logits are c tanh(z / c) of these (Gemma 2's ``final_logit_softcapping``); 0: they are not capped.
    Nothing labelled: nan for "mean" and zero gradients, as in PyTorch.
    Raises ValueError or TypeError where arguments do not fit. IndexError for a label outside [0, V).
    """
    _check(hidden, weight, bias, labels, label_smoothing, reduction, softcap)
    hidden, weight, bias = _alike(hidden, weight, bias)
    y = labels.reshape(-1)
    y = y if y.device.type == "cpu" else y.to(hidden.device)
    if sizes() is not None and reduction != "none" and wants_grad(hidden, weight, bias):
        counted = y != ignore_index
        total = _SumOfCounted.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, y, counted, label_smoothing, softcap)
        return total if reduction == "sum" else total / counted.sum().to(total.dtype)
    if wants_grad(hidden, weight, bias):
        loss = _LinearCrossEntropy.apply(hidden, weight, bias, y, ignore_index, label_smoothing, reduction, softcap)
    else:
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss = _op(flat, weight, bias, y, None, ignore_index, label_smoothing, False, False, False, softcap)[0]
        loss = _reduce(loss, y, ignore_index, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss
