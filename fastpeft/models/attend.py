"""What attention layers of every backbone share: joint projections, and attention under transformers' own masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpeft import ops
from fastpeft.methods.adapted import Terms, terms_of
from fastpeft.methods.base import watched
from fastpeft.ops._common import accumulator
from fastpeft.ops._remade import recipe_of
from fastpeft.ops.lora_linear import lora_linears


def project_together(linears: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several projections of one input, without IA3's factors on outputs, which attention folds into q and into its own output."""
    terms = [terms_of(linear) for linear in linears]
    if _joins(terms, x):
        return lora_linears(x, [term.projection for term in terms], max(term.dropout_p for term in terms))
    return tuple(linear(x) if term is None else term.without_after(x) for linear, term in zip(linears, terms))


def _joins(terms: list[Terms | None], x: Tensor) -> bool:
    """Whether the projections run as one op: with LoRA its products then share x. What is trained without LoRA joins too where backward
    can form x again: as one op it does so once, and keeps nothing."""
    if any(term is None or term.before is not None for term in terms):
        return False
    low_rank = [term for term in terms if term.projection.lora_A is not None]
    if low_rank:
        return len({term.dropout_p for term in low_rank}) == 1
    return any(term.projection.weight.requires_grad for term in terms) and torch.is_grad_enabled() and recipe_of(x) is not None


# what transformers' attention functions read of their keywords besides those that every model passes
READ_BY_ATTENTION = ("position_bias", "softcap", "s_aux", "cache")


def why_not_fused(attention: nn.Module) -> str:
    """'' or why an attention layer of transformers' must run its own forward: its configuration asks for an attention function that is
    not one of transformers' own, whose mathematics every fused form has."""
    name = attention.config._attn_implementation or "eager"
    function, mask = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if name == "eager":
        known = function is None and mask is eager_mask
    elif name == "sdpa":
        known = function is sdpa_attention_forward and mask is sdpa_mask
    else:
        known = name.startswith("flash_attention_") or name == "flex_attention"
    return "" if known else f"its attention function is {name!r}, registered by someone else"


def forms_probabilities(attention: nn.Module, options: dict) -> bool:
    """Whether someone reads the probabilities that transformers' eager attention returns: the caller asks for them, or a hook sees them."""
    if (attention.config._attn_implementation or "eager") != "eager":
        return False
    return bool(options.get("output_attentions") or attention.config.output_attentions) or watched(attention)


def dense_mask_attention(q, k, v, mask, *, prefix, rescale, dropout_p, scale=None, eager=False) -> Tensor:
    """Attention under transformers' own [B, 1, M, N] mask, bool or added to the scores. ``eager``: as its eager attention does. Where that
    masks all keys of a query by the same finite number, the query attends to all alike; SDPA's backward takes every such weight for 1."""
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if rescale is not None:
        k, v = k * rescale[0][:, None].to(k.dtype), v * rescale[1][:, None].to(v.dtype)
    if prefix is not None:
        k, v = (torch.cat([p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], dim=2) for p, t in zip(prefix, (k, v)))
        mask = F.pad(mask, (prefix[0].shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)
    if eager:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + mask
        return F.dropout(scores.softmax(-1, dtype=accumulator(q.dtype)).to(q.dtype), dropout_p) @ v
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=grouped)


def as_key_mask(mask: Tensor | None) -> Tensor | None:
    """[B, N] of any dtype -> bool; transformers' 4-D masks pass as they are."""
    return mask if mask is None or mask.dim() == 4 else mask.bool()


def output_factor(linear: nn.Module) -> Tensor | None:
    """IA3's factor on the output, [out], which :func:`project_together` leaves to its caller."""
    term = terms_of(linear)
    return None if term is None else term.after


def rescaled(linear: nn.Module, y: Tensor) -> Tensor:
    """``y``, a projection that :func:`project_together` made, with IA3's factor on it where ``linear`` has one."""
    factor = output_factor(linear)
    return y if factor is None else ops.rescale(y, factor)


def project(linears: tuple[nn.Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several projections of one input, each as its own ``forward`` gives it."""
    return tuple(rescaled(linear, y) for linear, y in zip(linears, project_together(linears, x)))


def project_one(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)``, saving nothing for a trained weight where backward can form ``x`` again."""
    return project((linear,), x)[0]


def key_value_rescale(key: nn.Linear, value: nn.Linear, heads: int) -> tuple[Tensor, Tensor] | None:
    """IA3's (l_k, l_v), each [H, d], as attention takes them; None where neither has one."""
    l_k, l_v = (output_factor(linear) for linear in (key, value))
    if l_k is None and l_v is None:
        return None
    l_k, l_v = (torch.ones_like(l_v) if l_k is None else l_k), (torch.ones_like(l_k) if l_v is None else l_v)
    return l_k.view(heads, -1), l_v.view(heads, -1)
