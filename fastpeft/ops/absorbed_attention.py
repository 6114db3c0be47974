"""Cross-attention of few queries over many encoder states, without ever forming the states' keys and values.

    head h:   q~ = q_h W_k,h                [T, C]     the key projection, absorbed into the query
              P  = softmax(q~ E^T * scale)  [T, N]     each query over the states of its own image
              o_h = (P E) W_v,h^T + b_v,h   [T, d]     the value projection, after the sum (rows of P sum to one)

A key bias adds the same number to every score of a query, which softmax cancels: it is not needed. LoRA's factors on key and value
absorb likewise: q~ += s (q_h B_k,h) A_k, and o_h += s (P E A_v^T) B_v,h^T.

Against the ordinary form this trades 4 N C^2 FLOPs of projections per image for heads times longer dot products, so it pays where
few queries meet many states; :func:`absorbed_pays` counts both. The ordinary form keeps K and V, [U, N, C] each: 5.5 MB per image
and layer at N = 901, C = 768 in float32; this one keeps q, 61 KB at 20 queries.

Queries lie image by image, as many as each has (``counts``): on the CPU each image is a product of its own size and no padding is
computed; elsewhere, where small products cost their launch, images are padded to the longest.

Shapes: q [T, H, d], T queries of U images; states E [U, N, C]; weights [H d, C]; o [T, H, d]. dtype: that of q; the softmax of half
precision accumulates in float32 (ATen). Source: the absorbed form of DeepSeek-V2's latent attention (2024), for plain cross-attention.

| gradient needed for               | saved                                                                           |
|-----------------------------------|---------------------------------------------------------------------------------|
| anything                          | q [T, H, d] and E (shared by all layers); backward recomputes q~ and P          |
| a trained value weight or lora_A  | nothing more: backward recomputes P E for dW; dA = ((s dO B)^T P) E needs r rows|
| the key's lora_A                  | also q_h B: r elements for each head of a query                                 |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import to_device_async, wants_grad
from fastpeft.ops._gemm import matmul, work_dtype
from fastpeft.ops._recompute import mark_recomputable, recipe_of, recompute, to_save
from fastpeft.ops.dropout import dropped, new_seed
from fastpeft.ops.lora_linear import Projection


def absorbed_attention_reference(
    q: Tensor, states: Tensor, key: Projection, value: Projection, scale: float, counts: Sequence[int] | None = None
) -> Tensor:
    """The ordinary form: project keys and values, then attend, image by image."""
    H, d = q.shape[1:]
    k, v = (_project(states, p).unflatten(-1, (H, d)) for p in (key, value))  # [U, N, H, d]
    outs = []
    for rows, ku, vu in zip(q.split(_counts(q, states, counts)), k, v):
        P = (torch.einsum("mhd,nhd->hmn", rows, ku) * scale).softmax(-1)
        outs.append(torch.einsum("hmn,nhd->mhd", P, vu))
    return torch.cat(outs) if outs else q.clone()


def _project(x: Tensor, p: Projection) -> Tensor:
    y = F.linear(x, p.weight, p.bias)
    return y if p.lora_A is None else y + p.scaling * F.linear(F.linear(x, p.lora_A.to(x.dtype)), p.lora_B.to(x.dtype))


def _counts(q: Tensor, states: Tensor, counts: Sequence[int] | None) -> list[int]:
    """Queries of each image; equally many where nothing is said."""
    if counts is not None:
        return list(counts)
    return [q.shape[0] // states.shape[0]] * states.shape[0] if states.shape[0] else []


@under_autocast("lower")
def absorbed_attention(
    q: Tensor,
    states: Tensor,
    key: Projection,
    value: Projection,
    scale: float,
    dropout_p: float = 0.0,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """softmax(q K^T scale) V with K, V the projections of ``states``, which are never computed.

    q [T, H, d], image by image; states [U, N, C]; key, value: weights [H d, C] -> [T, H, d] in q's dtype. ``counts``: how many queries
    each image has, U integers (equally many by default). ``dropout_p`` falls on the probabilities. ValueError where shapes do not fit.
    """
    T, H, d = q.shape
    if states.dim() != 3 or key.weight.shape != (H * d, states.shape[-1]) or value.weight.shape[0] != H * d:
        raise ValueError(
            f"absorbed_attention: q {tuple(q.shape)}, states {tuple(states.shape)} and weights {tuple(key.weight.shape)}, "
            f"{tuple(value.weight.shape)} do not fit; pass q [T, H, d], states [U, N, C], weights [H * d, C]"
        )
    counts = _counts(q, states, counts)
    if len(counts) != states.shape[0] or sum(counts) != T or any(n < 0 for n in counts):
        raise ValueError(
            f"absorbed_attention: {T} queries over {states.shape[0]} images, and counts {counts}; pass as many queries as counts add up to"
        )
    queries = _spread_heads(scale, q)
    if recipe_of(q) is not None:
        mark_recomputable(queries, partial(_spread_heads, scale), q)
    recipe = (partial(_lift, key.scaling), queries, key.weight.view(H, d, -1), key.lora_B, key.lora_A)
    lifted = mark_recomputable(recipe[0](*recipe[1:]), *recipe, smaller=True)
    out = _attend(lifted, states, value, dropout_p, H, counts)
    if key.bias is not None and key.bias.requires_grad:
        out = out + 0.0 * key.bias.sum()  # its gradient is zero, not absent: an optimiser's view of it stays the ordinary form's
    return out


def _spread_heads(scale: float, q: Tensor) -> Tensor:
    """[T, H, d] -> scaled, [H, T, d]: one product per head serves all images."""
    return (q * scale).transpose(0, 1)


def _lift(scaling: float, q: Tensor, weight: Tensor, lora_B: Tensor | None, lora_A: Tensor | None) -> Tensor:
    """q [H, T, d] through the key projection [H, d, C] -> q~ [T H, C]."""
    lifted = matmul(q, weight)
    if lora_A is not None:
        low = matmul(q, lora_B.to(q.dtype).view(*weight.shape[:2], -1))  # [H, T, r]
        lifted = lifted + scaling * matmul(low, lora_A.to(q.dtype))
    return lifted.transpose(0, 1).flatten(0, 1)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T H, a] by weight [H, a, b] -> [T H, b]."""
    folded = x.unflatten(0, (-1, weight.shape[0])).transpose(0, 1)  # [H, T, a]
    return torch.bmm(folded, weight).transpose(0, 1).flatten(0, 1)


def _sum_by_head(a: Tensor, b: Tensor, H: int) -> Tensor:
    """Sum over queries of a_h b_h^T: a [T H, n], b [T H, m] -> [H, n, m]."""
    a, b = (t.unflatten(0, (-1, H)).transpose(0, 1) for t in (a, b))
    return torch.bmm(a.mT, b)


def _pads(device: torch.device) -> bool:
    """Whether one product of padded rows beats one for each image: where each costs a launch."""
    return device.type != "cpu"


class _Images:
    """Products between rows that lie image by image, [R, .], and a matrix of each image, [U, ., .]."""

    def __init__(self, counts: list[int], H: int, device: torch.device):
        self.counts, self.most = [n * H for n in counts], max(counts) * H if counts else 0
        self.equal = self.most * len(counts) == sum(self.counts)
        self.cells = None
        if not self.equal and _pads(device):
            image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(self.counts))
            starts = torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)
            self.cells = to_device_async(image * self.most + torch.arange(len(image)) - starts[image], device)

    def _table(self, x: Tensor) -> Tensor:
        """[R, a] -> [U, rows of the image with most, a]."""
        if self.cells is not None:
            x = x.new_zeros(len(self.counts) * self.most, x.shape[1]).index_copy_(0, self.cells, x)
        return x.view(len(self.counts), self.most, x.shape[1])

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """x [R, a], matrices [U, a, b] -> [R, b]."""
        if self.equal or self.cells is not None:
            y = torch.bmm(self._table(x), matrices).flatten(0, 1)
            return y if self.cells is None else y.index_select(0, self.cells)
        y = x.new_empty(x.shape[0], matrices.shape[2])
        for rows, matrix, out in zip(x.split(self.counts), matrices, y.split(self.counts)):
            torch.mm(rows, matrix, out=out)
        return y

    def sums(self, x: Tensor, y: Tensor) -> Tensor:
        """x [R, a], y [R, b] -> x^T y of each image, [U, a, b]."""
        if self.equal or self.cells is not None:
            return torch.bmm(self._table(x).mT, self._table(y))
        sums = x.new_empty(len(self.counts), x.shape[1], y.shape[1])
        for a, b, out in zip(x.split(self.counts), y.split(self.counts), sums):
            torch.mm(a.t(), b, out=out)
        return sums


def _mix(P: Tensor, states: Tensor, weight, bias, lora_A, lora_B, scaling: float, images: _Images, H: int) -> Tensor:
    """P [T H, N] over states, through the value projection [H d, C] -> [T H, d]."""
    mixed, per_head = images.times(P, states), (H, -1)
    out = _by_head(mixed, weight.unflatten(0, per_head).mT)
    if lora_A is not None:
        out = out + scaling * _by_head(mixed @ lora_A.to(P.dtype).mT, lora_B.to(P.dtype).unflatten(0, per_head).mT)
    if bias is not None:  # dropped rows no longer sum to one
        out = out + (P.sum(-1, keepdim=True).unflatten(0, (-1, H)) * bias.view(H, -1)).flatten(0, 1)
    return out


def _forward(q, states, weight, bias, lora_A, lora_B, scaling: float, p: float, seed: Tensor | None, images: _Images, H: int) -> Tensor:
    narrow, work = q.dtype, work_dtype(q)
    q, states, weight = q.to(work), states.to(work), weight.to(work)
    P = images.times(q, states.mT).softmax(-1)
    P = P if seed is None else dropped(P, p, seed)
    return _mix(P, states, weight, bias, lora_A, lora_B, scaling, images, H).to(narrow)


class _Attend(Function):
    """dropout(softmax(q~ E^T)) E through the value projection. Backward recomputes the probabilities."""

    @staticmethod
    def forward(ctx, q, states, weight, bias, lora_A, lora_B, scaling, p, seed, images, H):
        ctx.scaling, ctx.p, ctx.images, ctx.H = scaling, p, images, H
        ctx.recipe, kept = to_save(q)
        ctx.save_for_backward(states, weight, bias, lora_A, lora_B, seed, *kept)
        return _forward(q, states, weight, bias, lora_A, lora_B, scaling, p, seed, images, H)

    @staticmethod
    @first_order
    def backward(ctx, dout):
        states, weight, bias, A, B, seed, *kept = ctx.saved_tensors
        need_q, need_states, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        images, H, per_head, need_P = ctx.images, ctx.H, (ctx.H, -1), any(ctx.needs_input_grad[:2])
        narrow, work = dout.dtype, work_dtype(dout)
        q, dW, db, dA, dB = recompute(ctx.recipe, kept).to(work), None, None, None, None
        dout, states, weight = dout.to(work), states.to(work), weight.to(work)
        P = images.times(q, states.mT).softmax(-1)
        D = P if seed is None else dropped(P, ctx.p, seed)
        dlow = None
        if A is not None and (need_P or need_A):
            dlow = ctx.scaling * _by_head(dout, B.to(P.dtype).unflatten(0, per_head))  # [T H, r]
        if need_weight:
            dW = _sum_by_head(dout, images.times(D, states), H).flatten(0, 1).to(narrow)
        if need_bias:
            db = (dout * D.sum(-1, keepdim=True)).unflatten(0, (-1, H)).sum(0).flatten().to(bias.dtype)
        if need_A:
            dA = (images.sums(dlow, D) @ states).sum(0).to(A.dtype)  # not dlow^T (D E): r rows instead of T H
        if need_B:
            dB = ctx.scaling * _sum_by_head(dout, images.times(D, states @ A.to(P.dtype).mT), H).flatten(0, 1).to(B.dtype)
        if not need_P:
            return None, None, dW, db, dA, dB, *[None] * 5
        dmixed = _by_head(dout, weight.unflatten(0, per_head))
        if dlow is not None:
            dmixed = dmixed.add_(dlow @ A.to(P.dtype))
        dP = images.times(dmixed, states.mT)
        if seed is not None:
            if bias is not None:
                dP += (dout.unflatten(0, (-1, H)) * bias.view(H, -1)).sum(-1, keepdim=True).flatten(0, 1)
            dP = dropped(dP, ctx.p, seed)
        dstates = images.sums(D, dmixed) if need_states else None
        dS = dP.sub_((P * dP).sum(-1, keepdim=True)).mul_(P)
        if need_states:
            dstates += images.sums(dS, q)
        dq = images.times(dS, states).to(narrow) if need_q else None
        return dq, None if dstates is None else dstates.to(narrow), dW, db, dA, dB, *[None] * 5


def _attend(q: Tensor, states: Tensor, value: Projection, dropout_p: float, H: int, counts: list[int]) -> Tensor:
    """q~ [T H, C] over states [U, N, C] -> [T, H, d]."""
    seed, images = new_seed() if dropout_p > 0 else None, _Images(counts, H, q.device)
    weight, bias, A, B, scaling = value
    if wants_grad(q, states, weight, bias, A, B):
        out = _Attend.apply(q, states, weight, bias, A, B, scaling, dropout_p, seed, images, H)
    else:
        out = _forward(q, states, weight, bias, A, B, scaling, dropout_p, seed, images, H)
    return out.unflatten(0, (-1, H))


def absorbed_pays(queries: float, states: int, width: int, heads: int, *, training: bool, states_need_grad: bool) -> bool:
    """Whether absorbing takes fewer FLOPs, forward and (in training) backward, per image: ``queries`` M (their mean over images),
    ``states`` N, ``width`` C.

    The ordinary backward is flash attention's, which recomputes the scores and returns all three gradients (10 M N C).
    At N = 901, C = 768, 12 heads: below 64 queries in inference, 28 in training with frozen states, 39 with trained ones.
    """
    M, N, C, H = queries, states, width, heads
    ordinary, absorbed = 4 * N * C * C + 4 * M * N * C, 4 * M * C * C + 4 * M * H * N * C
    if training:
        ordinary += 10 * M * N * C + (4 * N * C * C if states_need_grad else 0)
        absorbed += 4 * M * C * C + (10 if states_need_grad else 6) * M * H * N * C
    return absorbed < ordinary
