"""The two gradients of a low-rank branch that read its output's gradient, from one reading of it.

    y += s S^T B^T            dS = s B^T dy^T            dB = s dy^T S^T

Source: Hu et al., "LoRA" (2021), section 4.1, transposed as in lora_linear.py. Shapes: dy [M, N]; B [N, r]; S, dS [r, M]; dB [N, r].
Accumulation: that of dy's dtype, float64 or float32. dy is read from memory once, a block of rows at a time; ATen's two products each read
all of it. What is saved for backward is lora_linear.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _library

# Up to this rank csrc's form serves. Milliseconds, csrc's and ATen's two products (Intel Xeon, Sapphire Rapids, one thread, others busy,
# fp32, interleaved, least of 15): rank 8, 788 x 3072 1.3 and 2.2, 788 x 768 0.37 and 0.58, 1024 x 2752 1.3 and 2.5, 1024 x 1024 0.56 and
# 1.03; rank 16, 1024 x 2752 2.9 and 3.4; rank 32, 6.0 and 6.3.
RANK = 16


def low_rank_grads_reference(dy: Tensor, B: Tensor, S: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The definition."""
    return scaling * (B.t() @ dy.t()), scaling * (dy.t() @ S.t())


def _composite(dy, B, S, scaling, dtype=None):
    """``dtype`` of dB, None for dy's: it is scaled there, as B may be a float32 master over a trunk in 16 bit."""
    dS = dy.new_empty(0 if B is None else B.shape[1], dy.shape[0])
    if B is not None:
        torch.mm(B.t().contiguous(), dy.t(), out=dS).mul_(scaling)
    if S is None:
        return dS, dy.new_empty(0, B.shape[1])
    return dS, dy.new_empty(dy.shape[1], S.shape[0], dtype=dtype).copy_((S @ dy).t()).mul_(scaling)


def _fake(dy, B, S, scaling):
    rank = B.shape[1] if S is None else S.shape[0]
    return dy.new_empty(0 if B is None else rank, dy.shape[0]), dy.new_empty(0 if S is None else dy.shape[1], rank)


_op = _library.define(
    "low_rank_grads(Tensor dy, Tensor? B, Tensor? S, float scaling) -> (Tensor dS, Tensor dB)", fake=_fake, composite=_composite, cuda=False
)


@_library.flop_formula(torch.ops.fastpeft.low_rank_grads)
def _flops(dy, B, S, scaling, *args, out_shape=None, **kwargs) -> int:
    rank = B[1] if S is None else S[0]
    return 2 * dy[0] * dy[1] * rank * ((B is not None) + (S is not None))


def low_rank_grads(
    dy: Tensor, B: Tensor | None, S: Tensor | None, scaling: float, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(dS [r, M], dB [N, r]) of dy [M, N], each where ``B`` [N, r] or ``S`` [r, M], which it takes, is given. All have dy's dtype, but dB
    where ``dtype`` says otherwise."""
    if B is None and S is None:
        return None, None
    usual = dy.device.type == "cpu" and dy.dtype in (torch.float32, torch.float64) and (B.shape[1] if S is None else S.shape[0]) <= RANK
    dS, dB = _op(dy, B, S, scaling) if usual else _composite(dy, B, S, scaling, dtype)
    return None if B is None else dS, None if S is None else dB.to(dtype or dy.dtype)
