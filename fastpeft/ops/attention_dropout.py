"""Attention with dropout on its probabilities, for the CPU: PyTorch's own keeps probabilities, mask and scaled copies of q, k and v there.

    P = softmax(scale Q K^T)        D = P keep / (1 - p)        O = D V
    dV = D^T dO        dP = (dO V^T) keep / (1 - p)        dS = P (dP - rowsum(P dP))        dQ = scale dS K        dK = scale dS^T Q

Shapes as in attention.py; a prefix (P_k, P_v) [H_kv, n, d] stands before the keys of every sample. Accumulation: scores, softmax and
products in float32 (float64 for float64). A query without any key gives 0 and gets gradient 0.

| gradient needed for        | saved                                                                          |
|----------------------------|--------------------------------------------------------------------------------|
| q, k or P_k                | q, k, v (or what recomputes them), the boolean mask and a seed; P is recomputed   |
| v or P_v alone             | the same without v                                                             |
| none                       | nothing                                                                        |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import first_order
from fastpeft.ops._common import accumulator, wants_grad
from fastpeft.ops._recompute import recompute_all, to_save_all
from fastpeft.ops.dropout import keep_mask, new_seed


def _all_keys(t: Tensor, prefix: Tensor | None, heads: int) -> Tensor:
    """[B, H_kv, N, d] with its prefix, for every query head, in the accumulator's dtype."""
    if prefix is not None:
        t = torch.cat([prefix.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], 2)
    return t.to(accumulator(t.dtype)).repeat_interleave(heads // t.shape[1], 1)


def _probabilities(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.mT).mul_(scale)
    if allowed is None:
        return scores.softmax(-1)
    alive = allowed.any(-1, keepdim=True)
    return scores.masked_fill_(~(allowed | ~alive), -torch.inf).softmax(-1).masked_fill_(~alive, 0.0)


def _forward(scale, p, seed, allowed, q, k, v, pk, pv) -> Tensor:
    wide = q.to(accumulator(q.dtype))
    P = _probabilities(wide, _all_keys(k, pk, q.shape[1]), allowed, scale)
    return (P.mul_(keep_mask(P, p, seed)) @ _all_keys(v, pv, q.shape[1])).to(q.dtype)


class _DroppedAttention(Function):
    @staticmethod
    def forward(ctx, scale, p, seed, allowed, q, k, v, pk, pv):
        ctx.scale, ctx.p = scale, p
        need_q, need_k, _, need_pk, _ = ctx.needs_input_grad[4:]
        ctx.recipe, kept = to_save_all(q, k, v if need_q or need_k or need_pk else None)
        ctx.save_for_backward(seed, allowed, pk, pv, *kept)
        return _forward(scale, p, seed, allowed, q, k, v, pk, pv)

    @staticmethod
    @first_order
    def backward(ctx, do):
        seed, allowed, pk, pv, *kept = ctx.saved_tensors
        (q, k, v), H = recompute_all(ctx.recipe, kept), do.shape[1]
        wide, do, keys = q.to(accumulator(q.dtype)), do.to(accumulator(q.dtype)), _all_keys(k, pk, H)
        P = _probabilities(wide, keys, allowed, ctx.scale)
        mask = keep_mask(P, ctx.p, seed)
        need_q, need_k, need_v, need_pk, need_pv = ctx.needs_input_grad[4:]
        dq = dk = dv = dpk = dpv = None
        if need_v or need_pv:
            dv, dpv = _to_parts((P * mask).mT @ do, k, pv, need_v, need_pv)  # k has v's shape and dtype
        if need_q or need_k or need_pk:
            dP = (do @ _all_keys(v, pv, H).mT).mul_(mask)
            dS = dP.sub_((P * dP).sum(-1, keepdim=True)).mul_(P).mul_(ctx.scale)
            dq = (dS @ keys).to(q.dtype) if need_q else None
            if need_k or need_pk:
                dk, dpk = _to_parts(dS.mT @ wide, k, pk, need_k, need_pk)
        return None, None, None, None, dq, dk, dv, dpk, dpv


def _to_parts(grad: Tensor, t: Tensor, prefix: Tensor | None, need: bool, need_prefix: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradient [B, H, n + N, d] of what :func:`_all_keys` returned, as gradients of its arguments."""
    grad = grad.unflatten(1, (t.shape[1], -1)).sum(2)
    n = 0 if prefix is None else prefix.shape[1]
    return grad[:, :, n:].to(t.dtype) if need else None, grad[:, :, :n].sum(0).to(prefix.dtype) if need_prefix else None


def attention_with_dropout(q, k, v, allowed: Tensor | None, scale: float, prefix, dropout_p: float) -> Tensor:
    """[B, H, M, d]; ``allowed`` [B or 1, 1, M or 1, n + N] bool, True = attend. Arguments are :func:`attention`'s, checked there."""
    pk, pv = prefix or (None, None)
    seed = new_seed()
    call = _DroppedAttention.apply if wants_grad(q, k, v, pk, pv) else _forward
    return call(scale, dropout_p, seed, allowed, q, k, v, pk, pv)
