"""Attention's backward where only q asks for a gradient (k and v frozen): three products instead of ATen's five, where that is faster.

    P = exp(scale Q K^T - lse)        dP = dO V^T        dQ = scale P (dP - rowsum(dO O)) K        by blocks of BLOCK queries

Under causality a block takes only the keys it may see, where ATen's backward masks blocks that are empty.
Shapes as in attention.py; float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpeft import _library

BLOCK = 128


def dq_alone_pays(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """The measured rule. ATen's time over ours, float32, one thread (B x H x M x N x d): 1x32x512x512x128 1.6, causal 2.1;
    1x12x100x901x64 1.6; 2x12x901x901x64 0.84, 4x12x20x901x64 0.65, 4x12x128x128x64 0.95: only wide heads gain at every length.
    In 16 bit the scores would be rounded before the exponential.
    """
    return mask is None and q.dtype in (torch.float32, torch.float64) and q.shape[1] == k.shape[1] and q.shape[3] >= 128


def _blocks(M: int, N: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that they see."""
    for start in range(0, M, BLOCK):
        stop = min(start + BLOCK, M)
        yield slice(start, stop), slice(0, stop if causal else N)


def _dq(do, q, k, v, o, lse, causal, scale):
    dq = torch.empty_like(q)
    delta = (do * o).sum(-1, keepdim=True)
    for rows, seen in _blocks(q.shape[2], k.shape[2], causal):
        P = (q[:, :, rows] * scale) @ k[:, :, seen].mT
        if causal:
            later = torch.ones(P.shape[2:], dtype=torch.bool, device=q.device).triu_(rows.start + 1)
            P.masked_fill_(later, -torch.inf)
        P.sub_(lse[:, :, rows, None]).exp_()
        dP = do[:, :, rows] @ v[:, :, seen].mT
        dP.sub_(delta[:, :, rows]).mul_(P)
        dq[:, :, rows] = (dP @ k[:, :, seen]).mul_(scale)
    return dq


# An operator, so that torch.compile keeps one graph for every length. dq [B, H, M, d]; `causal` here implies M = N, and without a mask
# every query has a key.
dq_alone = _library.define(
    "attention_dq(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, float scale) -> Tensor",
    fake=lambda do, q, *_: torch.empty_like(q),
    composite=_dq,
    native=False,
)


@_library.flop_formula(torch.ops.fastpeft.attention_dq)
def _flops(do, q, k, v, o, lse, causal, *args, out_shape=None, **kwargs) -> int:
    pairs = sum((rows.stop - rows.start) * seen.stop for rows, seen in _blocks(q[2], k[2], causal))
    return 3 * 2 * q[0] * q[1] * pairs * q[3]
