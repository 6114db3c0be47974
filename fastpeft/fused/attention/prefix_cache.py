"""Generation after a beginning that all samples of a batch share: computed once, its keys and values kept once.

The cache that transformers fills knows the samples' own tokens alone. What they share lies beside it, [H_kv, P, d] for each layer, and
:func:`fastpeft.ops.attention` reads it in place as keys that every query sees; positions count on from P. B = samples, L = tokens of the
longest prompt, P = shared tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache


class SharedPrefixCache(DynamicCache):
    """A cache of samples' own tokens; ``prefix``: of each layer the keys and values [H_kv, P, d] of those that all of them begin with."""

    def __init__(self, prefix: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.prefix = prefix

    @property
    def prefix_tokens(self) -> int:
        return self.prefix[0][0].shape[1]

    def before(self, layer: int, prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """What queries of a layer see before its own tokens: a learnt ``prefix``, and the shared one."""
        shared = self.prefix[layer]
        if prefix is None:
            return shared
        return tuple(torch.cat([p.to(s.dtype), s], 1) for p, s in zip(prefix, shared))


def shared_before(cache: Any, layer: int, prefix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """The prefix that a layer's queries see, with what ``cache`` holds of one."""
    return cache.before(layer, prefix) if isinstance(cache, SharedPrefixCache) else prefix


@torch.no_grad()
def generate_after(
    model: nn.Module, prefix_length: int, inputs_embeds: Tensor, attention_mask: Tensor | None, of_samples: dict[str, Tensor], **options
) -> Tensor:
    """transformers' ``model.generate``: the ids of the responses to prompts inputs_embeds [B, L, C], padded on the left, that all begin
    with the same ``prefix_length`` tokens, each having more. ``of_samples``: further arguments, one row for each sample. ValueError where
    a prompt has no more."""
    B, L = inputs_embeds.shape[:2]
    mask = torch.ones(B, L, dtype=torch.bool, device=inputs_embeds.device) if attention_mask is None else attention_mask.bool()
    lengths, P = mask.sum(1, keepdim=True), prefix_length
    if not 0 < P < int(lengths.min()):
        raise ValueError(f"prefix_length={P}: each prompt must have tokens of its own behind it, and the shortest has {int(lengths.min())}")
    if not bool(mask[:, -1].all()):
        raise ValueError("prefix_length is for prompts that are padded on the left (padding_side='left')")
    first = L - int(lengths[0])
    filled = DynamicCache()
    of_one = {name: t[:1] if isinstance(t, Tensor) else t for name, t in of_samples.items()}
    model(inputs_embeds=inputs_embeds[:1, first : first + P], past_key_values=filled, use_cache=True, logits_to_keep=1, **of_one)
    cache = SharedPrefixCache([(layer.keys[0], layer.values[0]) for layer in filled.layers])
    own = torch.arange(P, L, device=mask.device) >= L - lengths + P
    return model.generate(inputs_embeds=inputs_embeds[:, P:], attention_mask=own.long(), past_key_values=cache, **of_samples, **options)
