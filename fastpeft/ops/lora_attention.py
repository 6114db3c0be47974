"""A whole attention layer with adapters, from its input to its output projection: one door to the operators it is made of.

    q, k, v = x W^T + b + s (x A^T) B^T      each with or without LoRA; k l_k, v l_v with (IA)^3
    q, k = rotary(norm(q)), rotary(norm(k))  each where it is given
    k = k + g K_x                            Excitor's keys
    c = softmax(scale q [P_k; k]^T) [P_v; v] causal or not, under padding, behind a prefix
    y = c W_o^T + b_o + s_o (c A_o^T) B_o^T

Sources: those of lora_linear.py, rms_norm.py, rotary.py, excitor_keys.py, attention.py, which compute it.
Shapes: x [B, M, C]; W_q [H d, C]; W_k, W_v [H_kv d, C]; W_o [C', H d]; q, c [B, H, M, d]; k, v [B, H_kv, M, d]; lse [B, H, M].
Accumulation, and what autocast casts: theirs.

| gradient needed for                   | saved                                                                                          |
|---------------------------------------|------------------------------------------------------------------------------------------------|
| x, or anything before the scores      | q, k, v as attention reads them, c, lse; with norms q and k as they read them instead          |
| lora_A or a weight of q, k or v       | also x, or its recipe                                                                          |
| lora_B of q, k or v                   | also S: r elements a token                                                                     |
| o alone: lora_A or its weight; lora_B | c; S. Nothing of q, k and v                                                                    |
| l_v alone (CPU)                       | c                                                                                              |
| prefix, Excitor                       | what prefix attention and excitor_keys save besides (their tables)                             |
| any of the first, ``recompute``       | x, c, lse in place of q, k, v, which backward forms again; with norms also q and k before them |

It is these operators' Functions, not one around them; so are the fused attentions of all backbones (fused/attention_*.py), where layouts
without padding, caches, labelled queries and hooks come between one operator and the next. Such a Function was measured (CPU, one thread,
float32, causal with rotary, LoRA of rank 8 on q, v and o; forward and backward, its time over the parts', middle of 5 s interleaved):
20 x 35 x 768 0.99, 4 x 128 x 768 1.01, 2 x 256 x 1024 0.98, 1 x 512 x 2048 0.96, with the same bytes saved to the byte; only where the
host's time is all, at 2 x 4 x 32, it was 0.72 (0.64 and 0.47 ms), which a captured graph does not pay either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops._common import check_floating
from fastpeft.ops._quantized_weight import QuantizedWeight
from fastpeft.ops._recompute import recomputed
from fastpeft.ops.attention import attention
from fastpeft.ops.attention_inputs import attention_inputs, without_rows
from fastpeft.ops.excitor_keys import excitor_keys, excitor_keys_reference
from fastpeft.ops.excitor_turn import excitor_turn, turns
from fastpeft.ops.lora_linear import Projection, lora_linear, lora_linear_reference, lora_linears
from fastpeft.ops.reserved_prefix import reserved_pays
from fastpeft.ops.rms_norm import rms_norm_reference
from fastpeft.ops.rotary import rotary_reference


class _Keys(NamedTuple):
    """What lies between the projections and the scores; each None where there is none."""

    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    rotary: tuple[Tensor, Tensor] | None = None
    ia3: tuple[Tensor, Tensor] | None = None
    excitor: tuple | None = None

    def tensors(self) -> list[Tensor]:
        flat = [self.q_norm, self.k_norm, *(self.rotary or ()), *(self.ia3 or ())]
        for t in self.excitor or ():
            flat += t if isinstance(t, tuple) else [t]
        return [t for t in flat if t is not None]


def lora_attention_reference(
    x, q, k, v, o, heads, *, q_norm=None, k_norm=None, norm_eps=1e-6, rotary=None, ia3=None, excitor=None, prefix=None, causal=False,
    key_padding_mask=None, scale=None
) -> Tensor:  # fmt: skip
    """The definition, scores and all, without dropout."""
    q, k, v = (lora_linear_reference(x, *Projection(*p)) for p in (q, k, v))
    if ia3 is not None:
        k, v = k * ia3[0], v * ia3[1]
    q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
    q, k = (t if w is None else rms_norm_reference(t, w, norm_eps) for t, w in ((q, q_norm), (k, k_norm)))
    if rotary is not None:
        q, k = (rotary_reference(t, *(table.unsqueeze(-3) for table in rotary)) for t in (q, k))
    groups = heads // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    if excitor is not None:
        k = excitor_keys_reference(k, x, *excitor)
    M = q.shape[2]
    seen = torch.ones(M, M, dtype=torch.bool, device=x.device)
    seen = (seen.tril() if causal else seen)[None, None]
    seen = seen if key_padding_mask is None else seen & key_padding_mask[:, None, None]
    if prefix is not None:
        prefix = [p.repeat_interleave(groups, 0).expand(len(x), -1, -1, -1) for p in prefix]
        k, v = (torch.cat([p, t], 2) for p, t in zip(prefix, (k, v)))
        seen = torch.nn.functional.pad(seen, (prefix[0].shape[2], 0), value=True)
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
    c = torch.nan_to_num(scores.softmax(-1)) @ v
    return lora_linear_reference(c.transpose(1, 2).flatten(2), *Projection(*o))


def _queries_keys_values(
    x, projections, heads: int, keys: _Keys, rescaled: bool, dropout_p: float, prefix, causal: bool, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As attention reads them, each [B, heads, M, d]; all with rows for ``prefix`` before, and its keys and values there, where that pays.
    ``rescaled``: (IA)^3's factors on keys and values are applied here."""
    q, k, v = lora_linears(x, projections, dropout_p)
    d = q.shape[-1] // heads
    q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))  # [B, M, heads, d]
    factors = tuple(l.view(-1, d) for l in keys.ia3) if rescaled and keys.ia3 is not None else None
    norms = {"q_norm": keys.q_norm, "k_norm": keys.k_norm, "norm_eps": keys.norm_eps}
    if prefix is not None and (keys.excitor is not None or not causal or not reserved_pays(*map(_by_heads, (q, k, v)), True, padding)):
        prefix = None
    if _turns_with_keys(q, k, keys, factors):
        q, k = (t.transpose(1, 2) for t in (q, k))
        return *excitor_turn(q, k, keys.rotary, x, *keys.excitor), _for_each_head(v.transpose(1, 2), heads)
    q, k, v = attention_inputs(q, k, v, rotary=keys.rotary, ia3=factors, prefix=prefix, rows_for_queries=True, **norms)
    if keys.excitor is not None:
        k, v = excitor_keys(k, x, *keys.excitor), _for_each_head(v, heads)
    return q, k, v


def _for_each_head(v: Tensor, heads: int) -> Tensor:
    """Values of grouped heads beside Excitor's keys: its gate is one number for each query head, so groups do not share their keys."""
    return v if v.shape[1] == heads else v.repeat_interleave(heads // v.shape[1], 1)


def _turns_with_keys(q: Tensor, k: Tensor, keys: _Keys, factors) -> bool:
    """Whether the rotary embedding of q and k [B, M, heads, d] and Excitor's keys are one pass: nothing else is done to either."""
    alone = keys.q_norm is keys.k_norm is factors is None
    return keys.excitor is not None and keys.rotary is not None and alone and turns(q, q.shape[-1], keys.rotary[0])


def _by_heads(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _check(x, q: Projection, k: Projection, v: Projection, o: Projection, heads: int, keys: _Keys, dropout_p: float) -> None:
    check_floating("lora_attention", x=x)
    if x.dim() != 3:
        raise ValueError(f"lora_attention: x has shape {tuple(x.shape)}; pass [B, M, C]")
    wide, narrow = q.weight.shape[0], k.weight.shape[0]
    if heads < 1 or wide % heads:
        raise ValueError(f"lora_attention: {heads} heads do not divide the {wide} rows of q's weight")
    d = wide // heads
    if narrow % d or not narrow or heads % (narrow // d) or v.weight.shape[0] != narrow:
        rows = f"q, k and v have {wide}, {narrow} and {v.weight.shape[0]} rows"
        raise ValueError(f"lora_attention: {rows}; with heads of {d}, those of k and v must be a divisor of {heads} times {d}, and alike")
    if o.weight.shape[1] != wide:
        raise ValueError(f"lora_attention: o's weight {tuple(o.weight.shape)} reads another width than q's {wide} rows")
    if keys.ia3 is not None and any(l.shape != (narrow,) for l in keys.ia3):
        raise ValueError(f"lora_attention: ia3 shapes {[tuple(l.shape) for l in keys.ia3]}; pass (l_k, l_v), each [{narrow}]")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_attention: dropout_p is {dropout_p}; it must lie in [0, 1)")


def _parameters(projections: tuple[Projection, ...]) -> list[Tensor]:
    return [t for p in projections for t in p[:4] if t is not None and not isinstance(t, QuantizedWeight)]


def lora_attention(
    x: Tensor,
    q: Projection | tuple,
    k: Projection | tuple,
    v: Projection | tuple,
    o: Projection | tuple,
    heads: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
    ia3: tuple[Tensor, Tensor] | None = None,
    excitor: tuple | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    lora_dropout_p: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """Self-attention of x [B, M, C] with adapters; returns [B, M, C'], in x's dtype.

    ``q``, ``k``, ``v``, ``o``: :class:`Projection` or (weight, bias, lora_A, lora_B, scaling), the last four optional. ``heads``: of q;
    k and v have rows for as many, or for a divisor of it (grouped heads). ``q_norm``, ``k_norm`` [d]: weights of an RMSNorm of each head.
    ``rotary`` = (cos, sin), each [B or 1, M, rot]. ``ia3`` = (l_k, l_v), each [H_kv d]; not on the prefix. ``excitor`` = (w_down, w_up,
    prompt, gate) and, with an image, its visual, as :func:`excitor_keys` takes them. ``prefix``, ``causal``, ``key_padding_mask``,
    ``scale``, ``dropout_p`` (on the probabilities) as :func:`attention` takes them. ``lora_dropout_p``: on the input of q's, k's and v's
    branches and of o's, as in PEFT. ``recompute``: backward forms q, k and v again from x, instead of keeping them.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    projections, o = tuple(Projection(*p) for p in (q, k, v)), Projection(*o)
    keys = _Keys(q_norm, k_norm, norm_eps, rotary, ia3, excitor)
    _check(x, *projections, o, heads, keys, dropout_p)
    # l_k moves to q, and l_v to the output, where nothing else lies between, and neither over a prefix
    folds = ia3 is not None and prefix is None and rotary is None and k_norm is None and excitor is None

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _queries_keys_values(x, projections, heads, keys, not folds, lora_dropout_p, prefix, causal, key_padding_mask)

    if recompute:
        tensors = recomputed(call, x, (*_parameters(projections), *keys.tensors()), lora_dropout_p > 0)
    else:
        tensors = call(x)
    factors = tuple(l.view(-1, tensors[0].shape[-1]) for l in ia3) if folds else None
    rows = tensors[1].shape[2] - x.shape[1]  # of a prefix that lies in the keys already
    behind = None if rows else _for_heads(prefix, tensors[1])
    how = {"causal": causal, "key_padding_mask": key_padding_mask, "scale": scale, "dropout_p": dropout_p}
    context = attention(*tensors, prefix=behind, rescale=factors, **how)
    context = without_rows(context, rows) if rows else context
    return lora_linear(context.transpose(1, 2).flatten(2), *o, lora_dropout_p)


def _for_heads(prefix: tuple[Tensor, Tensor] | None, k: Tensor) -> tuple[Tensor, Tensor] | None:
    """A prefix [H_kv, n, d] for keys of more heads."""
    if prefix is None or prefix[0].shape[0] == k.shape[1] or k.shape[1] % max(prefix[0].shape[0], 1):
        return prefix
    return tuple(p.repeat_interleave(k.shape[1] // p.shape[0], 0) for p in prefix)
