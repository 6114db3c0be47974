"""Cross entropy in chunks of rows, shared by both backends of linear_cross_entropy: logits and gradients of one chunk at a time.

Equations, shapes and what is saved: linear_cross_entropy.py.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops._common import accumulator, to_device_async
from fastpeft.ops._gemm import mm, work_dtype
from fastpeft.ops._private import assert_async

CHUNK_BYTES = 48 << 20  # of float32 logits
# A frozen W's logits may also take a quarter of what W takes in float32, up to ROWS rows: with few, W is waited for. Measured on an Intel
# Xeon (Sapphire Rapids, one thread, fp32), C = 1024 and V = 32,000, GFLOP/s of x W^T and of dz W:
#   rows   64        128        192        256        384        512        1024
#          110, 91   133, 108   151, 151   147, 155   155, 164   158, 163   162, 164
ROWS = 256
# Each chunk reads W twice, so a GPU needs rows enough to be busy meanwhile: an H100 some 220 a read (650 TFLOP/s over 3 TB/s; modelled,
# not measured). 524 rows of 32,000 logits, where 16 MB would be 131.
CUDA_CHUNK_BYTES = 64 << 20
MIN_ROWS = 64
CACHED = 1 << 18  # logits that stay in a core's cache from pass to pass


def chunk_rows(vocabulary: int, rows: int, width: int = 0, need_dweight: bool = False, device: str = "cpu") -> int:
    """Rows of logits at a time, all chunks alike: CHUNK_BYTES of them, or as much as dW takes anyway where there is one (each chunk walks
    all of dW), or a share of what W [vocabulary, width] takes."""
    most = (CUDA_CHUNK_BYTES if device == "cuda" else CHUNK_BYTES) // (4 * vocabulary)
    most = max(most, width if need_dweight else min(width // 4, ROWS) if device == "cpu" else 0, MIN_ROWS)
    return max(1, -(-rows // -(-rows // most))) if rows else 1


def mm_wide(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` in the accumulator's dtype: never rounded where the backend can (CUDA), else once, exactly as F.linear does."""
    acc = accumulator(a.dtype)
    if a.is_cuda and a.dtype != acc:
        out = torch.mm(a, b, out_dtype=acc)
        return out if bias is None else out.add_(bias)
    if a.dtype != b.dtype:  # a is in the working dtype already
        out = mm(a, b)
        return out if bias is None else out.add_(bias)
    return (torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)).to(acc)


def rows_of_aten(z, labels, smoothing, row_scale, form):
    """Losses of a chunk of logits ``z`` [m, V], which becomes G in place (scaled by row) if ``form``."""
    step = max(1, CACHED // z.shape[1]) if z.device.type == "cpu" else z.shape[0]
    losses = []
    for start in range(0, z.shape[0], max(step, 1)):
        rows = slice(start, start + step)
        block, y = z[rows], labels[rows, None]
        log_p = block.log_softmax(1)
        loss = log_p.gather(1, y).mul_(smoothing - 1)
        if smoothing:
            loss -= smoothing * log_p.mean(1, keepdim=True)
        losses.append(loss)
        if form:
            g = torch.exp(log_p, out=block)
            if smoothing:
                g.sub_(smoothing / z.shape[1])
            g.scatter_add_(1, y, torch.full_like(loss, smoothing - 1))
            if row_scale is not None:
                g.mul_(row_scale[rows, None])
    return torch.cat(losses)[:, 0] if losses else z.new_empty(0)


def labelled_rows(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """The index [n] of labelled rows, on labels' device; None where every row is labelled. The host reads their number."""
    if ignore_index is None:
        return None
    index = (labels != ignore_index).nonzero()[:, 0]
    return None if index.shape[0] == labels.shape[0] else index


def select_rows(t: Tensor, index: Tensor | None) -> Tensor:
    """Rows ``index`` of ``t``, on t's device; ``t`` itself for None."""
    return t if index is None else t.index_select(0, to_device_async(index, t.device))


class _LabelledRows(NamedTuple):
    """Reads and writes labelled rows, a chunk at a time. ``index`` [n]: where they are; None where every row is labelled."""

    index: Tensor | None

    def take(self, t: Tensor, chunk: slice) -> Tensor:
        return t[chunk] if self.index is None else t.index_select(0, self.index[chunk])

    def put(self, target: Tensor, chunk: slice, values: Tensor) -> None:
        if self.index is None:
            target[chunk] = values
        else:
            target.index_copy_(0, self.index[chunk], values)


def _add_product(total: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """``total += g^T h`` in total's dtype, the accumulator's."""
    return total.addmm_(g.t(), h) if g.dtype == total.dtype else total.add_(mm_wide(g.t(), h))


def _capped(rows_op, softcap: float, z, labels, smoothing, row_scale, form):
    """``rows_op`` of ``softcap tanh(z / softcap)``; z becomes the gradient of what came before the cap."""
    z.div_(softcap).tanh_()
    slope = 1 - z.square() if form else None
    losses = rows_op(z.mul_(softcap), labels, smoothing, row_scale, form)
    if form:
        z.mul_(slope)
    return losses


def chunked(rows_op, hidden, weight, bias, labels, row_scale, ignore_index, smoothing, need_dhidden, need_dweight, need_dbias, softcap=0.0):
    """The op over any ``rows_op`` (ATen's :func:`rows_of_aten`, or the Triton kernel that does the same in one pass)."""
    acc, work, device = accumulator(hidden.dtype), work_dtype(hidden), hidden.device
    rows_op = partial(_capped, rows_op, softcap) if softcap else rows_op
    _check_labels(labels, ignore_index, weight.shape[0])
    index = labelled_rows(labels, ignore_index)
    new = hidden.new_empty if index is None else hidden.new_zeros
    loss, dhidden = new(labels.shape[0], dtype=acc), new(hidden.shape if need_dhidden else 0)
    dbias = hidden.new_zeros(weight.shape[0] if need_dbias else 0, dtype=acc)
    y = to_device_async(select_rows(labels, index), device).contiguous()  # the kernel reads both by address
    scale = None if row_scale is None else to_device_async(select_rows(row_scale, index), device).to(acc).contiguous()
    rows, n = _LabelledRows(None if index is None else to_device_async(index, device)), y.shape[0]
    size = chunk_rows(weight.shape[0], n, weight.shape[1], need_dweight, device.type)
    # summed over chunks in the accumulator's dtype: in bfloat16 each sum would round again
    several = need_dweight and n > size
    dweight = weight.new_zeros(weight.shape if several or (need_dweight and n == 0) else 0, dtype=acc if several else weight.dtype)

    for start in range(0, n, size):
        chunk = slice(start, start + size)
        h = rows.take(hidden, chunk).to(work)
        z = mm_wide(h, weight.t(), bias)
        chunk_scale = None if scale is None else scale[chunk]
        rows.put(loss, chunk, rows_op(z, y[chunk], smoothing, chunk_scale, any((need_dhidden, need_dweight, need_dbias))))
        if need_dbias:
            dbias += z.sum(0)
        if not (need_dhidden or need_dweight):
            continue
        g = z.to(work)
        if need_dhidden:
            rows.put(dhidden, chunk, mm(g, weight).to(dhidden.dtype))
        if need_dweight:
            dweight = _add_product(dweight, g, h) if several else g.t() @ h
    return loss, dhidden, dweight.to(weight.dtype), dbias.to(hidden.dtype if bias is None else bias.dtype)


def _check_labels(labels, ignore_index, vocabulary):
    """On a GPU the assertion is the device's own, as in PyTorch: nothing waits for it."""
    bad = (labels < 0) | (labels >= vocabulary)
    bad = bad if ignore_index is None else bad & (labels != ignore_index)
    if labels.device.type != "cpu":
        assert_async(~bad.any())
    elif bad.any():
        raise IndexError(f"linear_cross_entropy: label {int(labels[bad][0])} is outside [0, {vocabulary})")
