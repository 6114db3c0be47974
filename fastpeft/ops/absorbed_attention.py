"""Cross-attention of few queries over many encoder states, without ever forming the states' keys and values.

    head h:   q~ = q_h W_k,h                [M, C]     the key projection, absorbed into the query
              P  = softmax(q~ E^T * scale)  [M, N]
              o_h = (P E) W_v,h^T + b_v,h   [M, d]     the value projection, after the sum (rows of P sum to one)

A key bias adds the same number to every score of a query, which softmax cancels: it is not needed. LoRA's factors on key and value
absorb likewise: q~ += s (q_h B_k,h) A_k, and o_h += s (P E A_v^T) B_v,h^T.

Against the ordinary form this trades 4 N C^2 FLOPs of projections per image for heads times longer dot products, so it pays where
few queries meet many states; :func:`absorbed_pays` counts both. The ordinary form keeps K and V, [U, N, C] each: 5.5 MB per image
and layer at N = 901, C = 768 in float32; this one keeps q, 61 KB at M = 20.

Shapes: q [U, H, M, d]; states E [U, N, C]; weights [H d, C]; o [U, H, M, d]. dtype: that of q; the softmax of half precision
accumulates in float32 (ATen). Source: the absorbed form of DeepSeek-V2's latent attention (2024), for plain cross-attention.

| gradient needed for               | saved                                                                           |
|-----------------------------------|---------------------------------------------------------------------------------|
| anything                          | q [U, H, M, d] and E (shared by all layers); q~ and P are formed again          |
| a trained value weight or lora_A  | nothing more: dW takes P E formed again, dA = ((s dO B)^T P) E takes r rows of it |
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import wants_grad
from fastpeft.ops._remade import again, keep, recipe_of, remade
from fastpeft.ops.dropout import keep_mask, new_seed
from fastpeft.ops.lora_linear import Projection


def absorbed_attention_reference(q: Tensor, states: Tensor, key: Projection, value: Projection, scale: float) -> Tensor:
    """The ordinary form: project keys and values, then attend."""
    U, H, _, d = q.shape
    k, v = (_project(states, p).view(U, -1, H, d).transpose(1, 2) for p in (key, value))
    return (q @ k.mT * scale).softmax(-1) @ v


def _project(x: Tensor, p: Projection) -> Tensor:
    y = F.linear(x, p.weight, p.bias)
    return y if p.lora_A is None else y + p.scaling * F.linear(F.linear(x, p.lora_A.to(x.dtype)), p.lora_B.to(x.dtype))


@under_autocast("lower")
def absorbed_attention(q: Tensor, states: Tensor, key: Projection, value: Projection, scale: float, dropout_p: float = 0.0) -> Tensor:
    """softmax(q K^T scale) V with K, V the projections of ``states``, which are never formed.

    q [U, H, M, d]; states [U, N, C]; key, value: weights [H d, C] -> [U, H, M, d] in q's dtype. ``dropout_p`` falls on the
    probabilities. ValueError where shapes do not fit.
    """
    U, H, _, d = q.shape
    if states.dim() != 3 or states.shape[0] != U or key.weight.shape != (H * d, states.shape[-1]) or value.weight.shape[0] != H * d:
        raise ValueError(
            f"absorbed_attention: q {tuple(q.shape)}, states {tuple(states.shape)} and weights {tuple(key.weight.shape)}, "
            f"{tuple(value.weight.shape)} do not fit; pass q [U, H, M, d], states [U, N, C], weights [H * d, C]"
        )
    queries = _spread_heads(scale, q)
    if recipe_of(q) is not None:
        remade(queries, partial(_spread_heads, scale), q)
    how = (partial(_lift, U, key.scaling), queries, key.weight.view(H, d, -1), key.lora_B, key.lora_A)
    lifted = remade(how[0](*how[1:]), *how, smaller=True)
    out = _attend(lifted, states, value, dropout_p, H)
    if key.bias is not None and key.bias.requires_grad:
        out = out + 0.0 * key.bias.sum()  # its gradient is zero, not absent: an optimiser's view of it stays the ordinary form's
    return out


def _spread_heads(scale: float, q: Tensor) -> Tensor:
    """[U, H, M, d] -> scaled, [H, U M, d]: one product per head then serves all images; broadcasting would copy weights U times."""
    return (q * scale).transpose(0, 1).flatten(1, 2)


def _lift(images: int, scaling: float, q: Tensor, weight: Tensor, lora_B: Tensor | None, lora_A: Tensor | None) -> Tensor:
    """q [H, U M, d] through the key projection [H, d, C] -> q~ [U, H M, C]."""
    lifted = torch.bmm(q, weight)
    if lora_A is not None:
        low = torch.bmm(q, lora_B.to(q.dtype).view(*weight.shape[:2], -1))  # [H, U M, r]
        lifted = lifted + scaling * (low @ lora_A.to(q.dtype))
    return lifted.unflatten(1, (images, -1)).transpose(0, 1).flatten(1, 2)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [U, H M, a] by weight [H, a, b] -> [U, H M, b]."""
    U, H = x.shape[0], weight.shape[0]
    folded = x.unflatten(1, (H, -1)).transpose(0, 1).flatten(1, 2)  # [H, U M, a]
    return torch.bmm(folded, weight).unflatten(1, (U, -1)).transpose(0, 1).flatten(1, 2)


def _sum_by_head(a: Tensor, b: Tensor, H: int) -> Tensor:
    """Sum over images and queries of a_h b_h^T: a [U, H M, n], b [U, H M, m] -> [H, n, m]."""
    a, b = (t.unflatten(1, (H, -1)).transpose(0, 1).flatten(1, 2) for t in (a, b))
    return torch.bmm(a.mT, b)


def _probabilities(q: Tensor, states: Tensor) -> Tensor:
    return (q @ states.mT).softmax(-1)


def _mix(P: Tensor, states: Tensor, weight, bias, lora_A, lora_B, scaling: float, H: int) -> Tensor:
    """P [U, H M, N] over states, through the value projection [H d, C] -> [U, H M, d]."""
    mixed, per_head = P @ states, (H, -1)
    out = _by_head(mixed, weight.unflatten(0, per_head).mT)
    if lora_A is not None:
        out = out + scaling * _by_head(mixed @ lora_A.to(P.dtype).mT, lora_B.to(P.dtype).unflatten(0, per_head).mT)
    if bias is not None:  # dropped rows no longer sum to one
        out = out + (P.sum(-1, keepdim=True).unflatten(1, per_head) * bias.view(H, 1, -1)).flatten(1, 2)
    return out


class _Attend(Function):
    """dropout(softmax(q~ E^T)) E through the value projection. Backward forms the probabilities again."""

    @staticmethod
    def forward(ctx, q, states, weight, bias, lora_A, lora_B, scaling, p, seed, H):
        ctx.scaling, ctx.p, ctx.H = scaling, p, H
        ctx.remake, kept = keep(q)
        ctx.save_for_backward(states, weight, bias, lora_A, lora_B, seed, *kept)
        P = _probabilities(q, states)
        P = P if seed is None else P.mul_(keep_mask(P, p, seed))
        return _mix(P, states, weight, bias, lora_A, lora_B, scaling, H)

    @staticmethod
    @first_order
    def backward(ctx, dout):
        states, weight, bias, A, B, seed, *kept = ctx.saved_tensors
        need_q, need_states, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        H, per_head, need_P = ctx.H, (ctx.H, -1), any(ctx.needs_input_grad[:2])
        q, dW, db, dA, dB = again(ctx.remake, kept), None, None, None, None
        P = _probabilities(q, states)
        mask = None if seed is None else keep_mask(P, ctx.p, seed)
        D = P if mask is None else P * mask
        dlow = None
        if A is not None and (need_P or need_A):
            dlow = ctx.scaling * _by_head(dout, B.to(P.dtype).unflatten(0, per_head))  # [U, H M, r]
        if need_weight:
            dW = _sum_by_head(dout, D @ states, H).flatten(0, 1)
        if need_bias:
            db = (dout * D.sum(-1, keepdim=True)).unflatten(1, per_head).sum((0, 2)).flatten().to(bias.dtype)
        if need_A:
            dA = ((dlow.mT @ D) @ states).sum(0).to(A.dtype)  # not dlow^T (D E): r rows instead of H M
        if need_B:
            dB = ctx.scaling * _sum_by_head(dout, D @ (states @ A.to(P.dtype).mT), H).flatten(0, 1).to(B.dtype)
        if not need_P:
            return None, None, dW, db, dA, dB, None, None, None, None
        dmixed = _by_head(dout, weight.unflatten(0, per_head))
        if dlow is not None:
            dmixed = dmixed.add_(dlow @ A.to(P.dtype))
        dP = dmixed @ states.mT
        if mask is not None:
            if bias is not None:
                dP += (dout.unflatten(1, per_head) * bias.view(H, 1, -1)).sum(-1, keepdim=True).flatten(1, 2)
            dP *= mask
        dstates = D.mT @ dmixed if need_states else None
        dS = dP.sub_((P * dP).sum(-1, keepdim=True)).mul_(P)
        if need_states:
            dstates = torch.baddbmm(dstates, dS.mT, q)
        return dS @ states if need_q else None, dstates, dW, db, dA, dB, None, None, None, None


def _attend(q: Tensor, states: Tensor, value: Projection, dropout_p: float, H: int) -> Tensor:
    """q~ [U, H M, C] over states [U, N, C] -> [U, H, M, d]."""
    seed = new_seed() if dropout_p > 0 else None
    weight, bias, A, B, scaling = value
    if wants_grad(q, states, weight, bias, A, B):
        out = _Attend.apply(q, states, weight, bias, A, B, scaling, dropout_p, seed, H)
    else:
        P = _probabilities(q, states)
        out = _mix(P if seed is None else P.mul_(keep_mask(P, dropout_p, seed)), states, weight, bias, A, B, scaling, H)
    return out.unflatten(1, (H, -1))


def absorbed_pays(queries: int, states: int, width: int, heads: int, *, training: bool, states_need_grad: bool) -> bool:
    """Whether absorbing takes fewer FLOPs, forward and (in training) backward, per image: ``queries`` M, ``states`` N, ``width`` C.

    The ordinary backward is flash attention's, which recomputes the scores and returns all three gradients (10 M N C).
    At N = 901, C = 768, 12 heads: below 64 queries in inference, 28 in training with frozen states, 39 with trained ones.
    """
    M, N, C, H = queries, states, width, heads
    ordinary, absorbed = 4 * N * C * C + 4 * M * N * C, 4 * M * C * C + 4 * M * H * N * C
    if training:
        ordinary += 10 * M * N * C + (4 * N * C * C if states_need_grad else 0)
        absorbed += 4 * M * C * C + (10 if states_need_grad else 6) * M * H * N * C
    return absorbed < ordinary
