"""Attention whose scores are formed: dropout on the probabilities, soft caps, sinks, trained biases. PyTorch's own keeps scores,
probabilities, mask and scaled copies of q, k and v there; this forms them once more in backward.

    S = scale Q K^T        S' = c tanh(S / c) + bias        P = exp(S') / (exp(s) + rowsum exp(S'))        O = (P keep / (1 - p)) V
    dV = (P keep / (1 - p))^T dO        dP = (dO V^T) keep / (1 - p)        D = rowsum(P dP)        dS' = P (dP - D)
    dbias = dS'        ds = -sum P_s D,  P_s the sink's own        dS = dS' (1 - tanh^2)        dQ = scale dS K        dK = scale dS^T Q

Sources: dropout, Vaswani et al. (2017); soft cap c, Gemma 2 (2024), section 2; sinks s [H], one logit per head without a value, gpt-oss
(2025). Shapes as in attention.py; a prefix (P_k, P_v) [H_kv, n, d] stands before the keys of every sample. Accumulation: scores, softmax,
sums in float32 (float64 for float64); products too on the CPU, in q's dtype elsewhere. A query without any key gives 0 and gets gradient 0,
or, ``uniform``, attends to all alike, as in transformers' eager attention.

| gradient needed for           | saved                                                                                      |
|-------------------------------|--------------------------------------------------------------------------------------------|
| q, k, P_k, a bias or a sink   | q, k, v (or what remakes them), the boolean mask, bias, sinks and a seed; P is formed again |
| v or P_v alone                | the same without v                                                                         |
| none                          | nothing                                                                                    |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, no_view, wants_grad
from fastpeft.ops._private import softmax_backward
from fastpeft.ops._recompute import recompute_all, to_save_all
from fastpeft.ops.dropout import keep_mask, new_seed


class Options(NamedTuple):
    """The numbers of a call; ``uniform``: what a query without any key attends to (the module's docstring)."""

    scale: float
    dropout_p: float = 0.0
    softcap: float | None = None
    uniform: bool = False


def _work(q: Tensor) -> torch.dtype:
    """The dtype of products."""
    return accumulator(q.dtype) if q.device.type == "cpu" else q.dtype


def _all_keys(t: Tensor, prefix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, H_kv, N, d] with its prefix, in ``dtype``."""
    if prefix is not None:
        t = torch.cat([prefix.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], 2)
    return t.to(dtype)


def _by_key_head(t: Tensor, heads: int) -> Tensor:
    """[B, H, M, ...] -> [B, H_kv, H / H_kv M, ...]: query heads that share a key head, one after the other. No key is expanded."""
    return t if t.shape[1] == heads else t.reshape(t.shape[0], heads, -1, t.shape[3])


def _probabilities(options: Options, q: Tensor, k: Tensor, allowed, bias, sinks) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(P [B, H, M, N], tanh of the capped scores, the sink's own P [B, H, M, 1]), in the accumulator's dtype."""
    scaled = _by_key_head(q * (options.scale if options.softcap is None else options.scale / options.softcap), k.shape[1])
    scores, tanh, of_sink = (scaled @ k.mT).to(accumulator(q.dtype)).view(*q.shape[:3], -1), None, None
    if options.softcap is not None:
        tanh = scores.tanh_()
        scores = tanh * options.softcap
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    alive = None
    if allowed is not None:
        alive = allowed.any(-1, keepdim=True) if sinks is None else None
        scores = scores.masked_fill_(~(allowed if alive is None else allowed | ~alive), -torch.inf)
        if options.uniform and alive is not None:
            scores, alive = scores.masked_fill_(~alive, 0.0), None
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        P, of_sink = scores.sub_(top).exp_(), (sink - top).exp_()
        total = P.sum(-1, keepdim=True) + of_sink
        return P.div_(total), tanh, of_sink.div_(total)
    P = scores.softmax(-1)
    return P if alive is None else P.masked_fill_(~alive, 0.0), tanh, None


def _forward(options, seed, allowed, bias, sinks, q, k, v, pk, pv) -> Tensor:
    work = _work(q)
    P, *_ = _probabilities(options, q.to(work), _all_keys(k, pk, work), allowed, bias, sinks)
    if options.dropout_p:
        P.mul_(keep_mask(P, options.dropout_p, seed))
    values = _all_keys(v, pv, work)
    return (_by_key_head(P.to(work), values.shape[1]) @ values).view(q.shape).to(q.dtype)


class _AttentionWithScores(Function):
    @staticmethod
    def forward(ctx, options, seed, allowed, bias, sinks, q, k, v, pk, pv):
        ctx.options = options
        need_bias, need_sinks, need_q, need_k, _, need_pk, _ = ctx.needs_input_grad[3:]
        ctx.scores = need_bias or need_sinks or need_q or need_k or need_pk
        ctx.recipe, kept = to_save_all(q, k, v if ctx.scores else None)
        ctx.save_for_backward(seed, allowed, bias, sinks, pk, pv, *kept)
        return no_view(_forward(options, seed, allowed, bias, sinks, q, k, v, pk, pv))

    @staticmethod
    @first_order
    def backward(ctx, do):
        seed, allowed, bias, sinks, pk, pv, *kept = ctx.saved_tensors
        need_bias, need_sinks, need_q, need_k, need_v, need_pk, need_pv = ctx.needs_input_grad[3:]
        (q, k, v), options, work = recompute_all(ctx.recipe, kept), ctx.options, _work(do)
        queries, keys, heads = q.to(work), _all_keys(k, pk, work), k.shape[1]
        P, tanh, of_sink = _probabilities(options, queries, keys, allowed, bias, sinks)
        mask = keep_mask(P, options.dropout_p, seed) if options.dropout_p else None
        do = _by_key_head(do.to(work), heads)
        dbias = dsinks = dq = dk = dv = dpk = dpv = None
        if need_v or need_pv:
            dropped = P if mask is None else P * mask
            dv, dpv = _to_parts(_by_key_head(dropped.to(work), heads).mT @ do, k, pv, need_v, need_pv)  # k has v's shape and dtype
        if ctx.scores:
            dP = (do @ _all_keys(v, pv, work).mT).to(P.dtype).view_as(P)
            dP = dP if mask is None else dP.mul_(mask)
            if need_sinks:
                dsinks = (of_sink * (P * dP).sum(-1, keepdim=True)).sum((0, 2, 3)).neg_().view(sinks.shape).to(sinks.dtype)
            dS = softmax_backward(dP, P, -1, P.dtype)  # P (dP - rowsum(P dP)), whatever a row of P sums to
            dbias = dS.sum_to_size(bias.shape).to(bias.dtype) if need_bias else None
            dS = dS if tanh is None else torch.ops.aten.tanh_backward(dS, tanh)
            dS = _by_key_head(dS.to(work), heads)
            dq = (dS @ keys).view(q.shape).mul_(options.scale).to(q.dtype) if need_q else None
            if need_k or need_pk:
                dk, dpk = _to_parts(dS.mT @ _by_key_head(queries * options.scale, heads), k, pk, need_k, need_pk)
        return None, None, None, dbias, dsinks, dq, dk, dv, dpk, dpv


def _to_parts(grad: Tensor, t: Tensor, prefix: Tensor | None, need: bool, need_prefix: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradient [B, H_kv, n + N, d] of what :func:`_all_keys` returned, as gradients of its arguments."""
    n = 0 if prefix is None else prefix.shape[1]
    return grad[:, :, n:].to(t.dtype) if need else None, grad[:, :, :n].sum(0).to(prefix.dtype) if need_prefix else None


@under_autocast("lower")
def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    *,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    uniform: bool = False,
) -> Tensor:
    """[B, H, M, d]. ``allowed`` bool, broadcastable to [B, H, M, n + N], True = attend; ``sinks`` [H]; ``bias`` broadcastable to
    [B, H, M, n + N], a constant or trained; the others as :func:`fastpeft.ops.attention`'s, checked there."""
    pk, pv = prefix or (None, None)
    seed = new_seed() if dropout_p else None
    call = _AttentionWithScores.apply if wants_grad(q, k, v, pk, pv, bias, sinks) else _forward
    return call(Options(float(scale), dropout_p, softcap, uniform), seed, allowed, bias, sinks, q, k, v, pk, pv)
