"""Attention's backward where only q asks for a gradient (k and v frozen): three products instead of ATen's five, where that is faster.

    P = exp(scale Q K^T - lse)        dP = dO V^T        dQ = scale P (dP - rowsum(dO O)) K        by blocks of BLOCK queries

Under causality a block takes only the keys it may see, where ATen's backward masks blocks that are empty.
Shapes as in attention.py; float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def dq_alone_pays(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """The measured rule. ATen's time over ours, float32, one thread (B x H x M x N x d): 1x32x512x512x128 1.6, causal 2.1;
    1x12x100x901x64 1.6; 2x12x901x901x64 0.84, 4x12x20x901x64 0.65, 4x12x128x128x64 0.95: only wide heads gain at every length.
    In 16 bit the scores would be rounded before the exponential.
    """
    return mask is None and q.dtype in (torch.float32, torch.float64) and q.shape[1] == k.shape[1] and q.shape[3] >= 128


def dq_alone(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float) -> Tensor:
    """dq [B, H, M, d]. ``causal`` here implies M = N; without a mask every query has a key."""
    M, N = q.shape[2], k.shape[2]
    dq = torch.empty_like(q)
    delta = (do * o).sum(-1, keepdim=True)
    for start in range(0, M, BLOCK):
        rows = slice(start, min(start + BLOCK, M))
        seen = slice(0, rows.stop if causal else N)
        P = (q[:, :, rows] * scale) @ k[:, :, seen].mT
        if causal:
            later = torch.ones(P.shape[2:], dtype=torch.bool, device=q.device).triu_(start + 1)
            P.masked_fill_(later, -torch.inf)
        P.sub_(lse[:, :, rows, None]).exp_()
        dP = do[:, :, rows] @ v[:, :, seen].mT
        dP.sub_(delta[:, :, rows]).mul_(P)
        dq[:, :, rows] = (dP @ k[:, :, seen]).mul_(scale)
    return dq
