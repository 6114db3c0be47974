"""Linear head and cross entropy in one op: logits only where labels are, in chunks, gradients formed in the forward pass.

    z = h W^T + b        loss = lse(z) - (1 - e) z_y - (e / V) sum_v z_v        e: label smoothing
    G = softmax(z) - (1 - e) onehot(y) - e / V        dh = g G W        dW = (g G)^T h        db = sum_rows g G

Source: the softmax's own derivative; forming gradients chunk by chunk in forward follows Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (2024), section 4, without their filtering of small entries, which would change the result.
Shapes: hidden h [..., C]; weight W [V, C]; bias b [V]; labels y [...] int64; M rows, of which n are labelled.
Accumulation: logits of a chunk, softmax, loss and dW across chunks in float32 (float64 for float64).

| gradient needed for                | saved                                   | matmuls over n rows |
|------------------------------------|-----------------------------------------|---------------------|
| hidden, any reduction              | dh [M, C] before the upstream gradient  | 2                   |
| weight, bias; reduction mean, sum  | dW [V, C], db [V], likewise             | +1 for dW           |
| weight, bias; reduction none       | inputs and labels: rows of G scale apart, so backward remakes z | 2 + 1 + 1 |
| none                               | nothing                                 | 1                   |

A frozen head gets no dW. Logits exist for at most CHUNK_BYTES at a time (but at least MIN_ROWS rows, for the GEMM).
Which rows are labelled is found inside the op: opaque to torch.compile, so fullgraph=True holds and no output's shape depends on
data. On CUDA that is one wait for one integer per loss; on CPU it costs nothing. dh is dense because autograd wants it dense.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function
from torch.utils.flop_counter import register_flop_formula

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, wants_grad
from fastpeft.ops.rescale import _forward as scaled

CHUNK_BYTES = 16 << 20  # of float32 logits
MIN_ROWS = 64


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index=-100, label_smoothing=0.0, reduction="mean"
) -> Tensor:
    """PyTorch's own two calls, in the accumulator's dtype."""
    acc = accumulator(hidden.dtype)
    logits = F.linear(hidden.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    loss = F.cross_entropy(
        logits.view(-1, weight.shape[0]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def chunk_rows(vocabulary: int, rows: int, spare_bytes: int = 0) -> int:
    """Rows of logits at a time: CHUNK_BYTES of them, or as much as dW takes anyway where there is one (each chunk walks all of dW)."""
    return min(max(max(CHUNK_BYTES, spare_bytes) // (4 * vocabulary), MIN_ROWS), max(rows, 1))


def mm_wide(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` in the accumulator's dtype: never rounded where the backend can (CUDA), else once, exactly as F.linear does."""
    acc = accumulator(a.dtype)
    if a.is_cuda and a.dtype != acc:
        out = torch.mm(a, b, out_dtype=acc)
        return out if bias is None else out.add_(bias)
    return (torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)).to(acc)


def _rows(z, labels, smoothing, row_scale, form):
    """Losses of a chunk of logits ``z`` [m, V], which becomes G in place (scaled by row) if ``form``."""
    top = z.amax(1, keepdim=True)
    at = z.gather(1, labels[:, None])
    mean = z.mean(1, keepdim=True) if smoothing else None
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    loss = total.log() + top - (1 - smoothing) * at
    if smoothing:
        loss -= smoothing * mean
    if form:
        z.div_(total)
        if smoothing:
            z.sub_(smoothing / z.shape[1])
        z.scatter_(1, labels[:, None], z.gather(1, labels[:, None]) - (1 - smoothing))
        if row_scale is not None:
            z.mul_(row_scale[:, None])
    return loss[:, 0]


def _chunked(rows_op, hidden, weight, bias, labels, row_scale, ignore_index, smoothing, need_dhidden, need_dweight, need_dbias):
    """The op over any ``rows_op`` (ATen's :func:`_rows`, or the Triton kernel that does the same in one pass)."""
    acc = accumulator(hidden.dtype)
    loss = hidden.new_zeros(labels.shape[0], dtype=acc)
    dhidden = hidden.new_zeros(hidden.shape if need_dhidden else 0)
    dbias = hidden.new_zeros(weight.shape[0] if need_dbias else 0, dtype=acc)
    _check_labels(labels, ignore_index, weight.shape[0])
    labelled = (labels != ignore_index).nonzero()[:, 0]
    chunks = labelled.split(chunk_rows(weight.shape[0], labelled.shape[0], weight.numel() * 4 * need_dweight))
    # summed over chunks in the accumulator's dtype: in bfloat16 each sum would round again
    several = need_dweight and len(chunks) > 1
    dweight = weight.new_zeros(weight.shape if need_dweight else 0, dtype=acc if several else weight.dtype)
    for index in chunks:
        h, y = hidden.index_select(0, index), labels.index_select(0, index)
        z = mm_wide(h, weight.t(), bias)
        scale = None if row_scale is None else row_scale.index_select(0, index).to(acc)
        loss.index_copy_(0, index, rows_op(z, y, smoothing, scale, need_dhidden or need_dweight or need_dbias))
        if need_dbias:
            dbias += z.sum(0)
        if not (need_dhidden or need_dweight):
            continue
        g = z.to(hidden.dtype)
        if need_dhidden:
            dhidden.index_copy_(0, index, g @ weight)
        if need_dweight and g.dtype == dweight.dtype:
            dweight.addmm_(g.t(), h)
        elif need_dweight:
            dweight += mm_wide(g.t(), h)
    return loss, dhidden, dweight.to(weight.dtype), dbias.to(hidden.dtype if bias is None else bias.dtype)


def _check_labels(labels, ignore_index, vocabulary):
    """On CUDA the assertion is the device's own, as in PyTorch: nothing waits for it."""
    bad = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if labels.is_cuda:
        torch._assert_async(~bad.any())
    elif bad.any():
        raise IndexError(f"linear_cross_entropy: label {int(labels[bad][0])} is outside [0, {vocabulary})")


def _composite(*args):
    return _chunked(_rows, *args)


def _triton(*args):
    from fastpeft.kernels.linear_cross_entropy import cross_entropy_rows

    return _chunked(cross_entropy_rows, *args)


def _fake(hidden, weight, bias, labels, row_scale, ignore_index, smoothing, need_dhidden, need_dweight, need_dbias):
    return (
        hidden.new_empty(labels.shape, dtype=accumulator(hidden.dtype)),
        hidden.new_empty(hidden.shape if need_dhidden else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if need_dbias else 0),
    )


_op = _library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_scale, int ignore_index,"
    " float label_smoothing, bool need_dhidden, bool need_dweight, bool need_dbias)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    composite=_composite,
    triton=_triton,
)


@register_flop_formula(torch.ops.fastpeft.linear_cross_entropy, get_raw=True)
def _flops(hidden, weight, bias, labels, row_scale, ignore_index, smoothing, need_dhidden, need_dweight, need_dbias, **_):
    """Labelled rows only; all of them where labels have no values (meta, fake)."""
    concrete = type(labels) is Tensor and labels.device.type != "meta"
    n = int((labels != ignore_index).sum()) if concrete else labels.shape[0]
    return 2 * n * weight.shape[0] * weight.shape[1] * (1 + need_dhidden + need_dweight)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, smoothing, reduction):
        need_dhidden, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        ctx.config = ignore_index, smoothing
        ctx.remake = reduction == "none" and (need_dweight or need_dbias)
        needs = (False,) * 3 if ctx.remake else (need_dhidden, need_dweight, need_dbias)
        loss, *grads = _op(hidden, weight, bias, labels, None, ignore_index, smoothing, *needs)
        loss, factor = _reduce(loss, labels, ignore_index, reduction)
        if ctx.remake:
            ctx.save_for_backward(hidden, weight, bias, labels)
        else:
            ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs)), factor)
        return loss

    @staticmethod
    @first_order
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:3]
        if ctx.remake:
            _, *grads = _op(*ctx.saved_tensors, grad, *ctx.config, *needs)
            return *(d if need else None for d, need in zip(grads, needs)), None, None, None, None
        *grads, factor = ctx.saved_tensors
        grad = grad if factor is None else grad * factor
        grad = grad[:, None] if grad.dim() else grad.view(1)  # reduction none: rows scale apart
        # rescale: one pass with a float32 factor; a 0-dim one would be rounded to bfloat16 first
        return *(None if d is None else scaled(d, grad) for d in grads), None, None, None, None


def _reduce(loss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, and what backward multiplies by: 1/n, or 0 if nothing is labelled (and the loss nan, as in PyTorch)."""
    if reduction == "none":
        return loss, None
    total = loss.sum()
    if reduction == "sum":
        return total, None
    n = (labels != ignore_index).sum().to(loss.dtype)
    return total / n, torch.where(n > 0, 1 / n, torch.zeros_like(n))


def _alike(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the dtype that hidden and weight promote to; the bias may also have its accumulator's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if bias is not None and bias.dtype not in (dtype, accumulator(dtype)):
        bias = bias.to(dtype)
    return hidden.to(dtype), weight.to(dtype), bias


def _check(hidden, weight, bias, labels, label_smoothing, reduction) -> None:
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
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), labels)`` without the logits.

    hidden [..., C], weight [V, C], bias [V] or None, labels [...] int64. Returns a scalar, or losses of labels' shape for "none",
    in float32 (float64 for float64): bfloat16 has 3 digits. Where hidden and weight differ in dtype, the narrower one is cast for the
    call (a bfloat16 head under float32 states: a copy of it, 4 V C bytes); gradients have their own dtypes.
    Nothing labelled: nan for "mean" and zero gradients, as in PyTorch.
    Raises ValueError or TypeError where arguments do not fit. IndexError for a label outside [0, V).
    """
    _check(hidden, weight, bias, labels, label_smoothing, reduction)
    hidden, weight, bias = _alike(hidden, weight, bias)
    flat, y = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if wants_grad(hidden, weight, bias):
        loss = _LinearCrossEntropy.apply(flat, weight, bias, y, ignore_index, label_smoothing, reduction)
    else:
        loss = _op(flat, weight, bias, y, None, ignore_index, label_smoothing, False, False, False)[0]
        loss, _ = _reduce(loss, y, ignore_index, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss
