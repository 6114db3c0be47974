"""A prefix joined to attention that is already done: its keys and values stay [H_kv, n, d], never expanded over the batch.

    O_p, lse_p = attention to the prefix alone      w = sigmoid(lse_p - lse)      O' = O + w (O_p - O)      lse' = logaddexp(lse, lse_p)
    P = exp(scale Q P_k^T - lse')      dS = P (dO P_v^T - rowsum(dO O'))
    dQ' = dQ + scale dS P_k      dP_k = scale dS^T Q      dP_v = P^T dO, both summed over the batch and the heads that share a key head

The tokens' own backward runs on O' and lse' and gives dQ, dK and dV exactly. ``attention`` calls both and keeps what its table says;
these two operators have no gradient of their own.
Sources: Li, Liang, "Prefix-Tuning" (2021); Dao, "FlashAttention-2" (2023), 3.1.
Shapes: q, o, do, dq [B, H, M, d]; lse [B, H, M], -inf where a query has no token (its o counts for nothing then, nan included);
P_k, P_v [H_kv, n, d], H a multiple of H_kv, in q's dtype or float32. Accumulation: float32 (float64 for float64). Composite: ATen's flash
attention, the batch folded into its queries' length.
Moved through memory by the Triton forms, in tensors of q's size: forward 3 (q, o, O') in one launch, backward 5 (do, q, O', dQ, dQ') in
one and two sums of parts; the prefix costs nothing that grows with N (counted by tests/ops/test_traffic.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _library
from fastpeft.ops._common import accumulator
from fastpeft.ops._flash import flash, flash_bwd
from fastpeft.ops._tiled import triton_launcher


def fold(t: Tensor) -> Tensor:
    """[B, H, M, ...] -> [1, H, B M, ...]: a view where t is stored [B, M, H, ...], as projections and ATen leave it."""
    return t.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def unfold(t: Tensor, B: int) -> Tensor:
    """[1, H, B M, ...] -> [B, H, M, ...]."""
    return t[0].transpose(0, 1).unflatten(0, (B, -1)).transpose(1, 2)


def _by_token(t: Tensor) -> Tensor:
    """Empty, of t's shape, laid out [B, M, H, d] as ATen leaves attention's outputs and gradients."""
    return t.new_empty(t.transpose(1, 2).shape).transpose(1, 2)


def _fwd(q, o, lse, pk, pv, scale):
    op, lp = (unfold(t, q.shape[0]) for t in flash(fold(q), pk[None].to(q.dtype), pv[None].to(q.dtype), scale=scale))
    acc, weight, none = accumulator(o.dtype), torch.sigmoid(lp - lse)[..., None], torch.isneginf(lse)
    if o.device.type != "cpu" or none.any():  # on the CPU asking waits for nothing
        o = o.masked_fill(none[..., None], 0.0)
    # into the prefix's own output: at a batch of short questions a new tensor costs as much as what fills it
    op, o_wide = op.to(acc), o.to(acc)
    torch.addcmul(o_wide, op.sub_(o_wide), weight.to(acc), out=op)
    return op.to(o.dtype), torch.logaddexp(lse, lp)


def _fwd_fake(q, o, lse, pk, pv, scale):
    return _by_token(o), torch.empty_like(lse)


def _bwd(do, q, o, lse, pk, pv, dq, scale, need_dp):
    """(dQ', dP_k, dP_v) from the joint o and lse; empty where not needed. dq None: not needed."""
    parts = (fold(do), fold(q), pk[None].to(q.dtype), pv[None].to(q.dtype), fold(o), fold(lse))
    share, dpk, dpv = flash_bwd(*parts, scale=scale)
    out = q.new_empty(0) if dq is None else unfold(share, q.shape[0]).add_(dq)
    if not need_dp:
        return out, pk.new_empty(0), pv.new_empty(0)
    return out, dpk[0].to(pk.dtype).contiguous(), dpv[0].to(pv.dtype).contiguous()


def _bwd_fake(do, q, o, lse, pk, pv, dq, scale, need_dp):
    shape = pk.shape if need_dp else (0,)
    return q.new_empty(0) if dq is None else _by_token(dq), pk.new_empty(shape), pv.new_empty(shape)


join_prefix = _library.define(
    "prefix_attention_fwd(Tensor q, Tensor o, Tensor lse, Tensor pk, Tensor pv, float scale) -> (Tensor o, Tensor lse)",
    fake=_fwd_fake,
    composite=_fwd,
    triton=triton_launcher("prefix_attention", "prefix_attention_fwd", _fwd),
)
join_prefix_bwd = _library.define(
    "prefix_attention_bwd(Tensor do, Tensor q, Tensor o, Tensor lse, Tensor pk, Tensor pv, Tensor? dq, float scale, bool need_dp)"
    " -> (Tensor dq, Tensor dpk, Tensor dpv)",
    fake=_bwd_fake,
    composite=_bwd,
    triton=triton_launcher("prefix_attention", "prefix_attention_bwd", _bwd),
)


@_library.flop_formula(torch.ops.fastpeft.prefix_attention_fwd)
def _fwd_flops(q, o, lse, pk, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * q[0] * q[1] * q[2] * q[3] * pk[1]


@_library.flop_formula(torch.ops.fastpeft.prefix_attention_bwd)
def _bwd_flops(do, q, o, lse, pk, *args, out_shape=None, **kwargs) -> int:
    return 5 * 2 * q[0] * q[1] * q[2] * q[3] * pk[1]  # ATen's forms all three gradients; the kernel leaves out what is not needed
