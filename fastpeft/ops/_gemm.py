"""Matrix products where a CPU lacks 16-bit arithmetic: in float32, operands converted on the way, rounded once.

Without bfloat16 or float16 instructions (AVX2 alone has neither, AVX-512 alone neither) PyTorch multiplies in plain loops, or oneDNN
emulates them. Measured on an Intel Xeon (Sapphire Rapids, one thread) under ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2``, GFLOP/s
at 256^3:

| dtype    | x W^T | dy W | dy^T x | batched |
|----------|-------|------|--------|---------|
| float32  | 168   | 114  | 192    | 195     |
| bfloat16 | 16    | 1.7  | 29     | 1.7     |
| float16  | 14    | 1.9  | 4.4    | 1.5     |

An op converts each activation once per call and reads weights through :func:`mm`, which converts BLOCK elements of them at a time. Sums
stay in float32 until the op's own result is rounded. What is saved for backward stays in 16 bit. On GPUs, on CPUs with the instructions,
and in float32 and float64, every function here is PyTorch's own call.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import autocast_dtype, first_order
from fastpeft.ops._common import wants_grad
from fastpeft.ops._private import avx512_without_bfloat16, onednn_accepts

BLOCK = 1 << 18  # elements of a weight converted at a time: 1 MB of float32 stays in a core's cache until it is multiplied
# Rows of x up to which x W^T is PyTorch's: it reads a weight once then, and the conversion costs more than it saves (measured as above,
# 2048 x 2048, bfloat16, time of PyTorch's and ours in ms: 1 row 0.5, 1.6; 2 rows 0.9, 1.4; 4 rows 1.7, 1.6; 64 rows 28, 6.7).
FEW_ROWS = 2


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of ``dtype`` that oneDNN uses (ONEDNN_MAX_CPU_ISA counts). oneDNN also accepts
    bfloat16 on AVX-512 without them, and emulates it at a fifth of float32's rate."""
    accepts = onednn_accepts(dtype)
    if accepts and dtype == torch.bfloat16:
        most = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
        accepts = not avx512_without_bfloat16() and most not in ("AVX512_CORE", "AVX512_CORE_VNNI")
    return accepts


# dtypes whose products this process computes in float32 on the CPU
LACKING = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not _multiplies(dtype))


def work_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which products of ``t`` are computed: its own, or float32 on a CPU that lacks it."""
    return torch.float32 if t.dtype in LACKING and t.device.type == "cpu" else t.dtype


def widened(t: Tensor) -> bool:
    """Whether products of ``t`` are computed in another dtype than its own; under autocast, than autocast's."""
    return t.device.type == "cpu" and (autocast_dtype(t) or t.dtype) in LACKING


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in a's dtype: a [M, K]; b [K, N] in a's dtype, or in 16 bit where a is in the working dtype."""
    if a.dtype == b.dtype:
        return torch.mm(a, b)
    (M, K), N = a.shape, b.shape[1]
    if b.stride(0) == 1 or K == 1:  # a weight transposed: its rows are b's columns
        if M <= FEW_ROWS:
            return torch.mm(a.to(b.dtype), b).to(a.dtype)
        out, step = a.new_empty(M, N), max(1, BLOCK // max(K, 1))
        for i in range(0, N, step):
            torch.mm(a, b[:, i : i + step].to(a.dtype), out=out[:, i : i + step])
        return out
    out, step = a.new_zeros(M, N), max(1, BLOCK // max(N, 1))
    for i in range(0, K, step):
        out.addmm_(a[:, i : i + step], b[i : i + step].to(a.dtype))
    return out


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out += a @ b`` in out's dtype, which is a's; b as in :func:`mm`."""
    return out.addmm_(a, b) if a.dtype == b.dtype else out.add_(mm(a, b))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` in x's dtype, the working one: x [M, in]; weight and bias may be in 16 bit."""
    if x.dtype == weight.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    y = mm(x, weight.t())
    return y if bias is None else y.add_(bias)


class _Matmul(Function):
    """Saves its factors as they are; each product is computed in the working dtype."""

    @staticmethod
    def forward(ctx, a, b):
        need_a, need_b = ctx.needs_input_grad
        ctx.shapes = a.shape, b.shape
        ctx.save_for_backward(a if need_b else None, b if need_a else None)
        return _matmul(a, b)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        da, db = None if b is None else _matmul(dy, b.mT), None if a is None else _matmul(a.mT, dy)
        return (*(None if d is None else d.sum_to_size(shape) for d, shape in zip((da, db), ctx.shapes)),)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.to(work_dtype(a)), b.to(work_dtype(b))).to(a.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``torch.matmul`` of a [..., M, K] and b [..., K, N], with its gradients."""
    if work_dtype(a) == a.dtype:
        return torch.matmul(a, b)
    return _Matmul.apply(a, b) if wants_grad(a, b) else _matmul(a, b)
