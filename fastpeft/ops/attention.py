"""Attention with key padding, causality, grouped heads, prefixes and (IA)^3, each folded into one ordinary flash attention.

    O = softmax(Q K^T / sqrt(d)) V                     lse = logsumexp of the scaled scores

    (IA)^3   softmax(Q (K l_k)^T) (V l_v) = attention(Q l_k, K, V) l_v          K, V are never scaled, nothing is divided by l
             dl_k = sum Q dQ',  dQ = dQ' l_k           dl_v = sum dO' O,  dO = dO' l_v
    prefix   keys [P_k; K], values [P_v; V]: the parts' outputs meet by their lse,
             O = O_r + w (O_p - O_r),  w = sigmoid(lse_p - lse_r)
             There the prefix has no batch dimension and is never expanded (prefix_attention.py). Backward runs once per part, each
             with the merged O and lse; dP is summed over the batch inside.

Sources: Liu et al., "(IA)^3" (2022), section 3.3; Li, Liang, "Prefix-Tuning" (2021); Dao, "FlashAttention-2" (2023), 3.1.
Shapes: q, o [B, H, M, d]; k, v [B, H_kv, N, d], H a multiple of H_kv; key_padding_mask [B, N], True = attend; attn_mask and bias (no copy
is kept: layers that share one keep it once), broadcastable to [B, H, M, N];
P_k, P_v [H_kv, n, d]; l_k, l_v [H_kv, d]; lse [B, H, M]. Accumulation: float32 (float64 for float64). Where a CPU
lacks 16-bit arithmetic, backward is computed in float32 (_gemm.py, _flash.py); what is saved stays in 16 bit.

One strategy is chosen for a call (:func:`_strategy`), each with its own autograd function:

| strategy | taken for                                                        | saved for backward                                      |
|----------|------------------------------------------------------------------|---------------------------------------------------------|
| plain    | CPU, no prefix                                                   | for q, k, v or l_k: q, k, v, o, lse (q and o unscaled); |
|          |                                                                  | for l_v alone: o                                        |
| joined   | CPU, a prefix: put before the keys for the call, and once more   | q, k, v, o, lse, P_k, P_v                               |
|          | in backward                                                      |                                                         |
| split    | a prefix, on CUDA, and on the CPU where it alone is trained      | q, o, lse, P_k, P_v; for q, k or v also k and v         |
|          | (float32, float64) or a LONG one is read without any gradient:   |                                                         |
|          | parts that meet by their lse                                     |                                                         |
| dropout  | CPU, dropout on the probabilities                                | attention_scores.py: a seed in place of o and lse       |
| rows     | CUDA, a prefix put before the keys by reserved_prefix.py's rule  | as SDPA does, the prefix in k and v                     |
| sdpa     | CUDA without a prefix, with dropout or in float64; few scores    | as that backend does (attention_backends.py), with a    |
|          | with a prefix on the CPU (FEW); no queries or keys               | prefix the joined keys                                  |

Moved through memory by plain, in tensors of q's size (k's are as large without grouped heads): forward 4, backward 8; (IA)^3's factors
add 4 and 8 (tests/ops/test_traffic.py).

plain and split form dq, dk and dv together, in ATen's flash backward (its efficient one on CUDA in float32 or where there is padding,
_flash.py); plain forms dq alone by three products of its five (attention_dq.py), split leaves out the tokens' part for P_k and P_v alone.
With a prefix, l_k and l_v scale the projected keys and values: the prefix is not rescaled. In dropout and sdpa they scale q and o outside.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, wants_grad
from fastpeft.ops._flash import flash, flash_bwd, kernel_of
from fastpeft.ops._gemm import widened
from fastpeft.ops._recompute import recompute_all, to_save_all
from fastpeft.ops.attention_backends import CHOICE, allowed_keys, around_sdpa
from fastpeft.ops.attention_dq import dq_alone, dq_alone_pays
from fastpeft.ops.attention_inputs import factors, one_pass
from fastpeft.ops.attention_scores import attention_with_scores
from fastpeft.ops.prefix_attention import join_prefix, join_prefix_bwd
from fastpeft.ops.rescale import _backward as rescale_bwd
from fastpeft.ops.rescale import rescale as times
from fastpeft.ops.reserved_prefix import in_reserved_rows, reserved_pays

# Scores below which a prefix's call on the CPU goes to SDPA, as autograd's Python would show; a quarter of them where the prefix alone
# is trained. Forward and backward over torch.cat and SDPA (AMD EPYC, one thread, fp32, n10 d64, interleaved, least of many, the middle of
# three runs), this file's own first: B4 H12 M20 1.19, 1.03; B20 H12 M10 1.13, 1.02; M20 1.03, 1.00.
FEW = 1 << 18
LONG = 64  # tokens of a prefix that generation reads where it lies: put before the keys, it is copied for every sample and token


def attention_reference(q, k, v, *, causal=False, key_padding_mask=None, scale=None, prefix=None, rescale=None) -> Tensor:
    """The definition, every matrix computed in full."""
    B, H, _, d = q.shape
    groups = H // k.shape[1]
    if rescale is not None:
        k, v = k * rescale[0][:, None], v * rescale[1][:, None]
    allowed = allowed_keys(q, k, causal, key_padding_mask)
    n = 0 if prefix is None else prefix[0].shape[1]
    if prefix is not None:
        k, v = (torch.cat([p.expand(B, -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        allowed = None if allowed is None else torch.nn.functional.pad(allowed, (n, 0), value=True)
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.mT * (d**-0.5 if scale is None else scale)
    if allowed is None:
        return scores.softmax(-1) @ v
    alive = allowed.any(-1, keepdim=True)
    return scores.masked_fill(~(allowed | ~alive), -torch.inf).softmax(-1).masked_fill(~alive, 0.0) @ v


def _plan(q: Tensor, k: Tensor, causal: bool, padding: Tensor | None, bias: Tensor | None = None) -> tuple[bool, Tensor | None]:
    """(is_causal, additive mask) for ATen, whose own causality is aligned at the first query: right for M = N only."""
    is_causal = causal and q.shape[2] == k.shape[2]
    mask = allowed_keys(q, k, causal and not is_causal, padding)
    if bias is not None:
        bias = bias.to(q.dtype)
        return is_causal, bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    return is_causal, mask


def _per_query_head(l: Tensor, q: Tensor) -> Tensor:
    return l.to(q.dtype).repeat_interleave(q.shape[1] // l.shape[0], 0)[:, None]  # [H, 1, d]


def _factor_grads(dy: Tensor, x: Tensor | None, l: Tensor, need_dx: bool, need_dl: bool) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dl) of y = x l for x [B, H, M, d], where dl sums over the query heads that share a key head: one pass over dy and x on csrc,
    by tokens as projections lay them. ATen's products and sums take twice the time (20 x 12 x 577 x 64, one thread: 17 and 34 ms)."""
    if not need_dl:
        return dy * _per_query_head(l, dy) if need_dx else None, None
    scale = l.to(accumulator(dy.dtype)).repeat_interleave(dy.shape[1] // l.shape[0], 0)  # [H, d]
    by_token = not dy.is_contiguous()
    turned = (t.transpose(1, 2) if by_token else t for t in (dy, x))
    dx, dl = rescale_bwd(*turned, scale if by_token else scale[:, None], need_dx, True)
    dl = dl.view(l.shape[0], -1, l.shape[1]).sum(1).to(l.dtype)
    return (dx.transpose(1, 2) if by_token else dx) if need_dx else None, dl


def _few(q, k, v, prefix) -> bool:
    """Whether a call with a prefix is so small that keys joined by PyTorch's own functions cost less (see FEW)."""
    if q.device.type != "cpu" or widened(q):
        return False
    scores = q.shape[0] * q.shape[1] * q.shape[2] * (k.shape[2] + prefix[0].shape[1])
    return scores < (FEW // 4 if _trains_prefix_alone(q, k, v, prefix) else FEW)


def _trains_prefix_alone(q, k, v, prefix) -> bool:
    return wants_grad(*prefix) and not wants_grad(q, k, v)


def _joined(q: Tensor, alone: bool) -> bool:
    """Whether a prefix is put before the keys for the call; ``alone``: it alone needs a gradient.

    Measured on the CPU, forward and backward, as FEW above, the time of joined keys and of parts that meet over torch.cat's and SDPA's:
    fp32 1.04 and 1.23 (B20 H12 M35 n10 d64, padded), 1.00 and 1.13 (M64), 1.01 and 1.12 (B4 H32 M256 d128); the prefix alone 1.02 and
    0.72, 1.02 and 0.63, 1.03 and 0.45, without keeping k and v. In 16 bit, rounding each part's output before they meet doubles the
    error: there parts are for CUDA, whose kernel rounds the tokens' part alone and saves the copy."""
    if q.device.type != "cpu":
        return False
    return not alone or q.dtype in (torch.bfloat16, torch.float16)


def _before(p: Tensor, t: Tensor) -> Tensor:
    """[p; t]: [B, H_kv, n + N, d] of p [H_kv, n, d] and t [B, H_kv, N, d], laid out [B, n + N, H_kv, d], as projections and ATen leave
    theirs: the kernels take 0.91-0.95 of the time that they take on one head after the other (fp32, H12 d64, M 20 to 128; 1.08 at H32
    d128 M512, whose rows, whole pages apart, share few sets of the cache: heads one after the other there)."""
    pages = t.shape[1] * t.shape[3] * t.element_size() % 4096 == 0
    both = p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t
    return torch.cat(both, 2) if pages else torch.cat([x.transpose(1, 2) for x in both], 1).transpose(1, 2)


def _join(q, k, v, pk, pv, causal, padding):
    """[P_k; K], [P_v; V] and their additive mask; recomputed in backward, not saved."""
    mask = allowed_keys(q, k, causal, padding)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (pk.shape[1], 0), value=True)
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    return _before(pk, k), _before(pv, v), mask


def _strategy(q, k, v, causal: bool, padding: Tensor | None, prefix, dropout_p: float) -> str:
    """The row of the module's table that this call takes."""
    on_cpu = q.device.type == "cpu"
    if 0 in (q.numel(), k.numel()):
        return "sdpa"
    if dropout_p > 0.0:
        return "dropout" if on_cpu else "sdpa"
    if not on_cpu and (others := _for_others(q, k, v, causal, padding, prefix)):
        return others
    in_place = on_cpu and prefix is not None and prefix[0].shape[1] >= LONG and not wants_grad(q, k, v, *prefix)
    if prefix is not None and not in_place and _few(q, k, v, prefix):
        return "sdpa"
    is_causal = causal and q.shape[2] == k.shape[2]
    masked = padding is not None or (causal and not is_causal and q.shape[2] > 1)
    if kernel_of(q, k, v, is_causal, masked) == "":
        return "sdpa"
    if prefix is None:
        return "plain"
    return "joined" if not in_place and _joined(q, alone=_trains_prefix_alone(q, k, v, prefix)) else "split"


def _for_others(q, k, v, causal: bool, padding: Tensor | None, prefix) -> str:
    apart = prefix is None or CHOICE not in ("", "sdpa")
    return "sdpa" if apart else "rows" if reserved_pays(q, k, v, causal, padding) else ""


def _plain(causal, scale, padding, bias, q, k, v, lk):
    """(o, lse), without l_v."""
    is_causal, mask = _plan(q, k, causal, padding, bias)
    return flash(q if lk is None else q * _per_query_head(lk, q), k, v, is_causal, mask, scale)


class _Plain(Function):
    @staticmethod
    def forward(ctx, causal, scale, padding, bias, q, k, v, lk, lv):
        need_q, need_k, need_v, need_lk, need_lv = ctx.needs_input_grad[4:]
        o, lse = _plain(causal, scale, padding, bias, q, k, v, lk)
        ctx.causal, ctx.scale, ctx.inner = causal, scale, need_q or need_k or need_v or need_lk
        ctx.recipe, kept = to_save_all(*((q, k, v) if ctx.inner else ()))
        inner = (lse, padding, bias) if ctx.inner else (None, None, None)
        ctx.save_for_backward(o if ctx.inner or need_lv else None, *inner, lk, lv, *kept)
        return o if lv is None else o * _per_query_head(lv, q)

    @staticmethod
    @first_order
    def backward(ctx, do):
        o, lse, padding, bias, lk, lv, *kept = ctx.saved_tensors
        need_q, need_k, need_v, need_lk, need_lv = ctx.needs_input_grad[4:]
        dq = dk = dv = dlk = dlv = None
        if lv is not None:
            do, dlv = _factor_grads(do, o, lv, ctx.inner, need_lv)
        if ctx.inner:
            q, k, v = recompute_all(ctx.recipe, kept)
            is_causal, mask = _plan(q, k, ctx.causal, padding, bias)
            scaled = q if lk is None else q * _per_query_head(lk, q)
            if not (need_k or need_v) and dq_alone_pays(q, k, mask):
                dq = dq_alone(do, scaled, k, v, o, lse, is_causal, ctx.scale)
            else:
                dq, dk, dv = flash_bwd(do, scaled, k, v, o, lse, is_causal, mask, ctx.scale)
            if lk is not None:
                dq, dlk = _factor_grads(dq, q, lk, need_q, need_lk)
        return None, None, None, None, dq, dk, dv, dlk, dlv


def _with_joined(causal, scale, padding, q, k, v, pk, pv):
    """(o, lse)"""
    k, v, mask = _join(q, k, v, pk, pv, causal, padding)
    return flash(q, k, v, mask=mask, scale=scale)


class _Joined(Function):
    @staticmethod
    def forward(ctx, causal, scale, padding, q, k, v, pk, pv):
        o, lse = _with_joined(causal, scale, padding, q, k, v, pk, pv)
        ctx.causal, ctx.scale = causal, scale
        ctx.recipe, kept = to_save_all(q, k, v)
        ctx.save_for_backward(o, lse, padding, pk, pv, *kept)
        return o

    @staticmethod
    @first_order
    def backward(ctx, do):
        o, lse, padding, pk, pv, *kept = ctx.saved_tensors
        q, k, v = recompute_all(ctx.recipe, kept)
        n = pk.shape[1]
        k, v, mask = _join(q, k, v, pk, pv, ctx.causal, padding)
        dq, dk, dv = flash_bwd(do, q, k, v, o, lse, False, mask, ctx.scale)
        dpk, dpv = (t[:, :, :n].sum(0, dtype=accumulator(t.dtype)).to(p.dtype) for t, p in ((dk, pk), (dv, pv)))
        return None, None, None, dq, dk[:, :, n:], dv[:, :, n:], dpk, dpv


def _split(causal, scale, padding, q, k, v, pk, pv):
    """(o, lse)"""
    o, lse = _plain(causal, scale, padding, None, q, k, v, None)
    if padding is not None or (causal and q.shape[2] > k.shape[2]):
        alive = allowed_keys(q, k, causal, padding).any(-1)  # where every key is masked lse is 0 on the CPU, whatever it is on CUDA
        lse = lse.masked_fill(~alive, -torch.inf)
    return join_prefix(q, o, lse, pk, pv, scale)


class _Split(Function):
    @staticmethod
    def forward(ctx, causal, scale, padding, q, k, v, pk, pv):
        o, lse = _split(causal, scale, padding, q, k, v, pk, pv)
        ctx.causal, ctx.scale, ctx.tokens = causal, scale, any(ctx.needs_input_grad[3:6])
        ctx.recipe, kept = to_save_all(q, *((k, v) if ctx.tokens else ()))
        ctx.save_for_backward(o, lse, padding if ctx.tokens else None, pk, pv, *kept)
        return o

    @staticmethod
    @first_order
    def backward(ctx, do):
        o, lse, padding, pk, pv, *kept = ctx.saved_tensors
        q, *tokens = recompute_all(ctx.recipe, kept)
        need_q, need_prefix = ctx.needs_input_grad[3], any(ctx.needs_input_grad[6:])
        dq = dk = dv = dpk = dpv = None
        if ctx.tokens:
            is_causal, mask = _plan(q, tokens[0], ctx.causal, padding)
            dq, dk, dv = flash_bwd(do, q, *tokens, o, lse, is_causal, mask, ctx.scale)
        if need_q or need_prefix:
            share, *of_prefix = join_prefix_bwd(do, q, o, lse, pk, pv, dq if need_q else None, ctx.scale, need_prefix)
            dq = share if need_q else None
            dpk, dpv = of_prefix if need_prefix else (None, None)
        return None, None, None, dq, dk, dv, dpk, dpv


def _with_dropout(q, k, v, causal, padding, scale, prefix, dropout_p, bias=None) -> Tensor:
    """The strategy "dropout", which takes its allowed keys with the prefix before them."""
    allowed = allowed_keys(q, k, causal, padding)
    if allowed is not None and prefix is not None:
        allowed = torch.nn.functional.pad(allowed, (prefix[0].shape[1], 0), value=True)
    return attention_with_scores(q, k, v, allowed, scale, dropout_p=dropout_p, prefix=prefix, bias=bias)


OTHERS = {"dropout": _with_dropout, "sdpa": around_sdpa, "rows": in_reserved_rows}  # strategies with a gradient of their own


def _dense(t: Tensor) -> Tensor:
    """ATen's flash reads the last dimension as if it were dense."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _check(q, k, v, causal, padding, prefix, rescale, dropout_p) -> None:
    check_floating("attention", q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention: {shapes} do not fit; pass q [B, H, M, d] and k, v [B, H_kv, N, d]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads cannot share {k.shape[1]} key heads; H must be a multiple of H_kv")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"attention: key_padding_mask is {padding.dtype} {tuple(padding.shape)}; pass bool [B, N] ="
            f" [{k.shape[0]}, {k.shape[2]}], True = attend"
        )
    _check_method_parameters(k, prefix, rescale)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p is {dropout_p}; it must lie in [0, 1)")


def _check_masks(q, k, padding, attn_mask, bias, prefix) -> None:
    scores = (*q.shape[:3], k.shape[2])
    for name, mask in (("attn_mask", attn_mask), ("bias", bias)):
        if mask is not None and (mask.dim() != 4 or any(n not in (1, size) for n, size in zip(mask.shape, scores))):
            raise ValueError(f"attention: {name} {tuple(mask.shape)} does not broadcast to [B, H, M, N] = {list(scores)}")
    if attn_mask is not None and (attn_mask.dtype != torch.bool or padding is not None):
        raise ValueError("attention: attn_mask is bool, True = attend, and stands in place of key_padding_mask; pass one of the two")
    if bias is not None and (not bias.is_floating_point() or bias.requires_grad):
        raise ValueError(f"attention: bias is a constant of a floating dtype, not {bias.dtype}{' that is trained' * bias.requires_grad}")
    if prefix is not None and (attn_mask is not None or bias is not None):
        raise ValueError("attention: attn_mask and bias do not cover the prefix's keys; pass key_padding_mask")


def _check_method_parameters(k, prefix, rescale) -> None:
    if prefix is not None and any(p.dim() != 3 or p.shape[::2] != k.shape[1::2] or p.shape != prefix[0].shape for p in prefix):
        raise ValueError(f"attention: prefix shapes {[tuple(p.shape) for p in prefix]}; pass (P_k, P_v), each [H_kv, n, d]")
    if rescale is not None and any(l.shape != k.shape[1::2] for l in rescale):
        raise ValueError(f"attention: rescale shapes {[tuple(l.shape) for l in rescale]}; pass (l_k, l_v), each [H_kv, d]")


def _prepared(q, k, v, scale, prefix, rescale, bias):
    """(q, k, v, scale, prefix, rescale) as every strategy takes them."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0.0:  # ATen masks before it scales (torch 2.13, CPU, causal): -inf times such a scale is nan or inf
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    q, k, v = (_dense(t) for t in (q, k, v))
    if prefix is not None:
        prefix = tuple(_dense(p) for p in prefix) if prefix[0].shape[1] else None
    if rescale is not None and (prefix is not None or bias is not None):  # q cannot take what is for a part of the scores
        k, v = (times(t, l.to(t.dtype)[:, None]) for t, l in zip((k, v), rescale))  # kept once: as they were before
        rescale = None
    return q, k, v, scale, prefix, rescale


@under_autocast("lower")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    rescale: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [B, H, M, d] to k, v [B, H_kv, N, d]; returns [B, H, M, d].

    ``causal``: query i sees keys j <= i + N - M. ``key_padding_mask`` [B, N] bool, True = attend. ``scale``: 1/sqrt(d).
    ``prefix`` = (P_k, P_v) [H_kv, n, d]: keys and values every query sees, before the others.
    ``rescale`` = (l_k, l_v) [H_kv, d]: (IA)^3's factors on k and v, not on the prefix. ``dropout_p`` falls on the
    probabilities. ``attn_mask`` bool, broadcastable to [B, H, M, N], True = attend: any other pattern, instead of key_padding_mask.
    ``bias`` floating, a constant broadcastable to [B, H, M, N]: added to the scaled scores. With a prefix neither is taken.
    A query without any key gives 0 and gets gradient 0.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check(q, k, v, causal, key_padding_mask, prefix, rescale, dropout_p)
    _check_masks(q, k, key_padding_mask, attn_mask, bias, prefix)
    key_padding_mask = key_padding_mask if attn_mask is None else attn_mask
    q, k, v, scale, prefix, rescale = _prepared(q, k, v, scale, prefix, rescale, bias)
    pk, pv = prefix or (None, None)
    lk, lv = rescale or (None, None)
    if (strategy := _strategy(q, k, v, causal, key_padding_mask, prefix, dropout_p)) != "plain" and bias is not None:
        return _with_dropout(q, k, v, causal, key_padding_mask, scale, None, dropout_p, bias)
    if strategy in OTHERS:
        if lk is not None and one_pass(k, k):
            k, v, lk, lv = *factors(k, v, lk, lv), None, None
        q = q if lk is None else times(q, _per_query_head(lk, q))
        o = OTHERS[strategy](q, k, v, causal, key_padding_mask, scale, prefix, dropout_p)
        return o if lv is None else times(o, _per_query_head(lv, o))
    options = (causal, scale, key_padding_mask)
    if strategy == "plain":
        if wants_grad(q, k, v, lk, lv):
            return _Plain.apply(*options, bias, q, k, v, lk, lv)
        o, _ = _plain(*options, bias, q, k, v, lk)
        return o if lv is None else o * _per_query_head(lv, o)
    function, forward = (_Joined, _with_joined) if strategy == "joined" else (_Split, _split)
    return function.apply(*options, q, k, v, pk, pv) if wants_grad(q, k, v, pk, pv) else forward(*options, q, k, v, pk, pv)[0]
