"""Attention under transformers' own masks, and when transformers' own attention must run: shared by every backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpeft import ops
from fastpeft.fused.attention.masks import attend_allowed, read_mask
from fastpeft.fused.layers.leaves import FusedDropout
from fastpeft.methods.base import has_hooks
from fastpeft.ops._common import accumulator, wants_grad
from fastpeft.registry import has_form

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
    return bool(options.get("output_attentions") or attention.config.output_attentions) or has_hooks(attention)


def reads_probabilities(module: nn.Module) -> bool:
    """Whether a hook on ``module`` (or a forward of its own) sees the probabilities that transformers' attentions return."""
    if not has_hooks(module):
        return False
    return "forward" in module.__dict__ or not all(getattr(hook, "passes_rest_on", False) for hook in module._forward_hooks.values())


class Attends:
    """BLIP's attentions: when transformers' own forward must run instead of fused attention."""

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why transformers' own attention must run: fused attention reads the rate of ``module.dropout``, and does not call it."""
        dropout = module.dropout
        if not has_form(dropout, FusedDropout):
            return f"its dropout is a {type(dropout).__name__}"
        return "its dropout has hooks, which read attention probabilities" if has_hooks(dropout) else ""

    def gives_probabilities(self, output_attentions: bool | None) -> bool:
        """Whether transformers' own attention runs: probabilities are asked for, by argument or configuration, or somebody reads them."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return bool(output_attentions) or bool(self.why_not(self)) or reads_probabilities(self)

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0


def dense_mask_attention(q, k, v, mask, *, prefix, rescale, dropout_p, scale=None, eager=False) -> Tensor:
    """Attention under transformers' own [B, 1, M, N] mask, bool or added to the scores. ``eager``: as its eager attention does. Where that
    masks all keys of a query by the same finite number, the query attends to all alike; SDPA's backward takes every such weight for 1."""
    if (output := _by_content(q, k, v, mask, prefix, rescale, dropout_p, scale, eager)) is not None:
        return output
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


def _by_content(q, k, v, mask, prefix, rescale, dropout_p, scale, eager) -> Tensor | None:
    """Attention by what ``mask`` says, which saves no mask of numbers, nor an eager attention's probabilities; None where that is not the
    same, or nothing is gained."""
    if torch.compiler.is_compiling() or not wants_grad(q, k, v, *(prefix or ()), *(rescale or ())):
        return None
    kinds = mask.is_floating_point() or (mask.dtype == torch.bool and not eager)  # eager attention adds True to a score, as 1
    if not kinds or mask.requires_grad or mask.dim() != 4 or mask.shape[3] != k.shape[2] or q.device.type != "cpu":
        return None
    content = read_mask(mask)
    options = {"scale": scale, "rescale": rescale, "dropout_p": dropout_p}
    if content.causal is not None and (prefix is not None or not content.dead or mask.dtype == torch.bool):
        padding = content.padding if content.padding is None else content.padding.expand(len(q), -1)
        return ops.attention(q, k, v, causal=content.causal, key_padding_mask=padding, prefix=prefix, **options)
    if prefix is not None or content.allowed is None or (content.dead and content.least is not None):
        return None
    return attend_allowed(q, k, v, content, **options)


def as_key_mask(mask: Tensor | None) -> Tensor | None:
    """[B, N] of any dtype -> bool; transformers' 4-D masks pass as they are."""
    return mask if mask is None or mask.dim() == 4 else mask.bool()
