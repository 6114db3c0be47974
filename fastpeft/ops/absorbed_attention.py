"""Cross-attention of few queries over many encoder states, without ever forming the states' keys and values.

    head h:   q~ = q_h W_k,h                [M, C]     the key projection, absorbed into the query
              P  = softmax(q~ E^T * scale)  [M, N]
              o_h = (P E) W_v,h^T + b_v,h   [M, d]     the value projection, after the sum (rows of P sum to one)

A key bias adds the same number to every score of a query, which softmax cancels: it is not needed. LoRA's factors on key and value
absorb likewise: q~ += s (q_h B_k,h) A_k, and o_h += s (P E A_v^T) B_v,h^T.

Against the ordinary form this trades 4 N C^2 FLOPs of projections per image for heads times longer dot products, so it pays where
few queries meet many states; :func:`absorbed_pays` counts both. The ordinary form keeps K and V, [U, N, C] each: 5.5 MB per image
and layer at N = 901, C = 768 in float32; this one keeps q~, 0.7 MB at M = 20.

Shapes: q [U, H, M, d]; states E [U, N, C]; weights [H d, C]; o [U, H, M, d]. dtype: that of q; the softmax of half precision
accumulates in float32 (ATen). Source: the absorbed form of DeepSeek-V2's latent attention (2024), for plain cross-attention.

| gradient needed for           | saved                                                     |
|-------------------------------|-----------------------------------------------------------|
| q, states, or a key factor    | q~ [U, H M, C] and E (shared by all layers); P is formed again |
| value weight or lora_A        | also P E [U, H, M, C]                                     |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._common import wants_grad
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


def absorbed_attention(q: Tensor, states: Tensor, key: Projection, value: Projection, scale: float, dropout_p: float = 0.0) -> Tensor:
    """softmax(q K^T scale) V with K, V the projections of ``states``, which are never formed.

    q [U, H, M, d]; states [U, N, C]; key, value: weights [H d, C] -> [U, H, M, d] in q's dtype. ``dropout_p`` falls on the
    probabilities. ValueError where shapes do not fit.
    """
    U, H, M, d = q.shape
    if states.dim() != 3 or states.shape[0] != U or key.weight.shape != (H * d, states.shape[-1]) or value.weight.shape[0] != H * d:
        raise ValueError(
            f"absorbed_attention: q {tuple(q.shape)}, states {tuple(states.shape)} and weights {tuple(key.weight.shape)}, "
            f"{tuple(value.weight.shape)} do not fit; pass q [U, H, M, d], states [U, N, C], weights [H * d, C]"
        )
    q = q * scale
    lifted = _per_head(q, key.weight.view(H, d, -1))  # [U, H, M, C]
    if key.lora_A is not None:
        low = _per_head(q, key.lora_B.to(q.dtype).view(H, d, -1))  # [U, H, M, r]
        lifted = lifted + key.scaling * (low @ key.lora_A.to(q.dtype))
    mixed, mass = attend_states(lifted.flatten(1, 2), states, dropout_p)
    mixed = mixed.unflatten(1, (H, M))  # [U, H, M, C]
    out = _per_head(mixed, value.weight.view(H, d, -1).mT)
    if value.lora_A is not None:
        low = mixed @ value.lora_A.to(q.dtype).mT
        out = out + value.scaling * _per_head(low, value.lora_B.to(q.dtype).view(H, d, -1).mT)
    if key.bias is not None and key.bias.requires_grad:
        out = out + 0.0 * key.bias.sum()  # its gradient is zero, not absent: an optimiser's view of it stays the ordinary form's
    if value.bias is not None:
        bias = value.bias.view(H, 1, d)
        out = out + (bias if dropout_p == 0.0 else bias * mass.view(U, H, M, 1))  # dropped rows no longer sum to one
    return out


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [U, H, M, a] by weight [H, a, b] -> [U, H, M, b], one product per head over all images: broadcasting copies weights U times."""
    U, H, M, _ = x.shape
    return torch.bmm(x.transpose(0, 1).reshape(H, U * M, -1), weight).view(H, U, M, -1).transpose(0, 1)


class _AttendStates(Function):
    """(P' E, row sums of P') with P = softmax(q E^T) and P' = dropout(P). Backward forms P again from q and E."""

    @staticmethod
    def forward(ctx, q, states, p, seed):
        ctx.p, ctx.seeded = p, seed is not None
        ctx.save_for_backward(q, states, *(() if seed is None else (seed,)))
        P = (q @ states.mT).softmax(-1)
        if seed is not None:
            P = P.mul_(keep_mask(P, p, seed))
        return P @ states, P.sum(-1)

    @staticmethod
    def backward(ctx, dmixed, dmass):
        q, states, *seed = ctx.saved_tensors
        P = (q @ states.mT).softmax(-1)
        dP = dmixed @ states.mT
        if ctx.seeded:
            keep = keep_mask(P, ctx.p, seed[0])
            dP = dP.add_(dmass[..., None]).mul_(keep)
        dstates = None
        if ctx.needs_input_grad[1]:
            dstates = (P * keep if ctx.seeded else P).mT @ dmixed
        dS = dP.sub_((P * dP).sum(-1, keepdim=True)).mul_(P)
        if ctx.needs_input_grad[1]:
            dstates = torch.baddbmm(dstates, dS.mT, q)
        return dS @ states if ctx.needs_input_grad[0] else None, dstates, None, None


def attend_states(q: Tensor, states: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """q [U, R, C], states [U, N, C] -> (softmax(q E^T) E [U, R, C], the rows' sums after dropout [U, R])."""
    seed = new_seed() if dropout_p > 0 else None
    if wants_grad(q, states):
        return _AttendStates.apply(q, states, dropout_p, seed)
    P = (q @ states.mT).softmax(-1)
    P = P if seed is None else P.mul_(keep_mask(P, dropout_p, seed))
    return P @ states, P.sum(-1)


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
