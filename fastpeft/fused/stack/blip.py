"""BLIP's stack of text layers on fastpeft's operators: masks, images that samples share, caches.

:func:`fastpeft.optimize` gives the transformers modules the classes of this folder in place, with the same parameters under the same names.
What differs from transformers' own BLIP:

- attention forms no probabilities unless somebody reads them (any flash backend serves), takes prefixes, and folds IA3's factors into q and
  the output;
- masks stay [B, N] booleans, so that no [B, 1, M, N] tensor is built, and padding that nobody reads is not computed; where a module is
  hooked, foreign, or set to something that the fused forms do not know, transformers' own forward runs, on whole tensors;
- **cross-attention honours ``encoder_attention_mask``.** transformers 4.57 to 5.23 loses it on the way (``BlipTextLayer`` passes it
  as ``attention_mask``, ``BlipTextSelfAttention`` reads ``encoder_attention_mask``): padding of a question leaks into the decoder;
- the language-model loss forms logits at labelled positions only; all logits are formed when they are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import can_return_tuple

from fastpeft.fused.attention.blip_text import FusedBlipTextSelfAttention
from fastpeft.fused.attention.common import as_key_mask
from fastpeft.fused.layout import Layout, TokenPlan, image_layout, self_layout
from fastpeft.fused.stack.driver import prefixes_of, run_layers
from fastpeft.fused.stack.flatten import ROW_WISE_PATHS, why_not_flat
from fastpeft.methods.base import has_hooks
from fastpeft.ops._common import to_device_async
from fastpeft.registry import fuses
from fastpeft.static_shapes import NotStatic, sizes

# what treats every token by itself; nobody calls the encoder: its layers are run one by one
ROW_WISE_PATHS.update(
    f"transformers.models.blip.modeling_blip_text.BlipText{name}"
    for name in ("SelfOutput", "Output", "Intermediate", "Encoder", "OnlyMLMHead", "LMPredictionHead", "PredictionHeadTransform")
)


class Encoded(NamedTuple):
    """What cross-attention sees: ``states`` [U, N, C] of images or questions (None: no cross-attention), of which sample b sees
    ``states[index[b]]`` (None: sample b sees ``states[b]``), under ``mask`` [B, N] bool over keys."""

    states: Tensor | None
    index: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, states: Tensor | None, index: Tensor | None, mask: Tensor | None, samples: int) -> Encoded:
        """States and mask as transformers takes them: where there is one for all samples, it broadcasts."""
        if states is not None and index is None and len(states) == 1 < samples:
            index = torch.zeros(samples, dtype=torch.long)
        mask = as_key_mask(mask)
        if mask is not None and mask.dim() == 2 and len(mask) == 1:
            mask = mask.expand(samples, -1)
        if mask is not None and mask.dim() == 2 and mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None  # as transformers' models make one of ones for every image: without it, layers may absorb their keys
        return cls(states, index, mask)

    @property
    def is_shared(self) -> bool:
        """Whether samples on one image may be queries of one attention: not under a mask, which could differ between them."""
        return self.states is not None and self.index is not None and self.mask is None

    def of_samples(self) -> Tensor | None:
        """[B, N, C]: each sample's own."""
        if self.index is None or self.states is None:
            return self.states
        return self.states[to_device_async(self.index, self.states.device)]

    def layout(self, tokens: Layout, device: torch.device) -> Layout:
        """``tokens`` by the image that they ask about."""
        return image_layout(tokens, self.index, len(self.states), device)


@fuses("transformers.models.blip.modeling_blip_text.BlipTextModel", layout_aware=True)
class FusedBlipTextModel:
    """The stack of text layers: hands each its prefix, computes no padding, counts positions from the end of the prefix."""

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        first = self.encoder.layer[0].attention.self
        return len(self.encoder.layer), first.num_attention_heads, first.attention_head_size

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why transformers' own forward of the stack computes something else than ours."""
        chosen = module.config._attn_implementation
        return "" if chosen in (None, "eager") else f"its masks are made for the attention implementation {chosen!r}"

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        is_decoder=False,
        encoder_index=None,
        output_mask=None,
        padding_unread=False,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Arguments as BlipTextModel's; ``is_decoder`` makes self-attention causal. Masks [B, N]: nonzero = attend.

        ``encoder_index`` [B]: sample b attends to ``encoder_hidden_states[encoder_index[b]]``, whose keys and values are then projected
        once for all samples that share it. ``output_mask`` [B, L] bool: the caller reads the last hidden state there only;
        ``padding_unread``: it reads it at no padding. What is not read may be zero, and is not computed where every layer can do without.

        transformers' own forward runs, with our layers in it, where something is asked that the fused layers do not know, and where they
        are hooked or foreign: these see whole tensors [B, L, C] under transformers' own masks.
        """
        if (input_ids is None) == (inputs_embeds is None) and encoder_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens = {"encoder_embeds": encoder_embeds, "inputs_embeds": inputs_embeds, "input_ids": input_ids}
        shape = next(t for t in tokens.values() if t is not None).shape[:2]
        seen = Encoded.of(encoder_hidden_states, encoder_index, encoder_attention_mask, shape[0])
        masks = [as_key_mask(attention_mask), seen.mask]
        prefixed, causal = getattr(self, "prefix_encoder", None) is not None, bool(is_decoder) and self._is_causal(kwargs)
        reason = self._beyond_us(shape, masks, encoder_hidden_states, past_key_values, kwargs)
        if reason and prefixed:
            raise ValueError(f"a prefix runs in fused attention alone, and {reason}: leave that out, or detach the prefix")
        reason = reason or self._needs_transformers()
        keep_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        output_mask, padding_unread = (None, False) if keep_states or self.pooler is not None else (output_mask, padding_unread)
        unpadded, own_rows = self._padding(masks[0], past_key_values, output_mask, padding_unread, causal)
        given = tokens | {"position_ids": position_ids}
        if not prefixed and (reason or not own_rows):
            given |= {"past_key_values": past_key_values, "use_cache": use_cache, "is_decoder": is_decoder}
            return self._as_transformers(seen, masks, **given, **kwargs)
        cache = self._cache(past_key_values, use_cache, is_decoder)
        hidden = self._embedded(cache, **given)
        flat = unpadded and not reason
        states = [] if keep_states else None
        hidden = self._run(hidden, self._plan(hidden, masks, cache, causal, output_mask, flat), seen, cache, states)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden) if self.pooler is not None else None,
            past_key_values=cache,
            hidden_states=tuple(states) if keep_states else None,
        )

    def _embedded(self, cache, encoder_embeds, inputs_embeds, input_ids, position_ids) -> Tensor:
        """[B, L, C] into the first layer; positions count on from the cache's and from the end of a prefix."""
        if encoder_embeds is not None:
            return encoder_embeds
        prefix = getattr(self, "prefix_encoder", None)
        past = (0 if cache is None else cache.get_seq_length()) + (0 if prefix is None else prefix.tokens)
        return self.embeddings(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, past_key_values_length=past)

    def _is_causal(self, kwargs: dict) -> bool:
        """What an argument, or else the configuration, says of a decoder, as transformers reads it."""
        given = kwargs.get("is_causal", getattr(self.config, "is_causal", None))
        return given is None or bool(given)

    def _beyond_us(self, shape, masks, encoder_states, cache, kwargs) -> str:
        """'' or what is asked for that the fused layers do not compute, with a prefix or without."""
        if kwargs.get("output_attentions", self.config.output_attentions):
            return "attention probabilities are asked for"
        if not isinstance(kwargs.get("output_hidden_states", False), bool | None):
            return "hidden states are selected by their numbers"
        if reason := self.why_not(self) or next(filter(None, map(attentions_unfit, self.encoder.layer)), ""):
            return reason
        cache = getattr(cache, "self_attention_cache", cache)
        if cache is not None and cache.is_compileable:
            return "its cache is of fixed size"
        past = 0 if cache is None else cache.get_seq_length()
        expected = ((shape[0], past + shape[1]), (shape[0], None if encoder_states is None else encoder_states.shape[1]))
        for name, mask, want in zip(("attention_mask", "encoder_attention_mask"), masks, expected):
            if mask is not None and mask.dim() != 4 and tuple(mask.shape) != want:
                return f"{name} is {list(mask.shape)}, not {list(want)}"
        return ""

    def _needs_transformers(self) -> str:
        """'' or why layers are called as transformers' own forward calls them."""
        if torch.compiler.is_compiling():
            return "torch.compile makes one graph for every length"
        return "the stack has hooks" if has_hooks(self) else why_not_flat(self, self.encoder)

    @staticmethod
    def _padding(mask: Tensor | None, cache, output_mask: Tensor | None, unread: bool, causal: bool) -> tuple[bool, bool]:
        """(whether the states of padding may be left out, whether all rows that are read attend to something: in transformers, a row that
        is masked as a whole attends to all keys alike)."""
        if mask is None or mask.dim() != 2 or cache is not None or torch.compiler.is_compiling():
            return True, True
        if sizes() is not None:
            if not unread and output_mask is None:
                raise NotStatic("the states of a question's padding are read")
            return True, True
        real = mask.cpu()
        if unread if output_mask is None else not bool((output_mask.cpu() & ~real).any()):
            return True, True
        return bool(real.all()), bool((real[:, 0] if causal else real.any(1)).all())

    def _as_transformers(self, seen: Encoded, masks, **given) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """transformers' own forward around our layers, in its masks [B, 1, M, N]."""
        names = ("attention_mask", "encoder_attention_mask")
        given |= {name: mask if mask is None else mask.to(self.device) for name, mask in zip(names, masks)}
        return super().forward(encoder_hidden_states=seen.of_samples(), return_dict=True, **given)

    @staticmethod
    def _plan(hidden: Tensor, masks, cache, causal: bool, output_mask: Tensor | None, flat: bool) -> TokenPlan:
        """How the tokens lie: as they are where layers are not ``flat``, or where a cache or a 4-D mask forbids another layout."""
        if not flat and sizes() is not None:
            raise NotStatic("a layer of the text stack has to see padding")
        if not flat or cache is not None or any(mask is not None and mask.dim() == 4 for mask in masks):
            return TokenPlan(mask=masks[0], causal=causal)
        static = sizes()
        computed = None if static is None else static.answers if causal else static.tokens
        layout = self_layout(hidden.shape[:2], masks[0], hidden.device, computed)
        return TokenPlan(layout, layout, masks[0], causal, output_mask)

    def _run(self, hidden: Tensor, plan: TokenPlan, seen: Encoded, cache, states: list | None) -> Tensor:
        """[B, L, C] after the last layer, at the plan's outputs only where it names some; ``states`` takes what comes before and after
        each layer."""
        device, shared = hidden.device, plan.layout is not None and seen.is_shared
        encoder_states = seen.states if shared else seen.of_samples()
        masks = [None if mask is None else mask.to(device, non_blocking=True) for mask in (plan.mask, seen.mask)]
        options = {"causal": True} if plan.causal else {}
        if plan.layout is not None:
            options["encoder_layout"] = seen.layout(plan.layout, device) if shared else plan.layout
        return run_layers(
            self.encoder.layer,
            hidden,
            plan,
            encoder_states,
            prefixes=prefixes_of(self, self.encoder.layer),
            states=states,
            at_labels=lambda labelled: {"encoder_layout": seen.layout(labelled.queries, device) if shared else labelled.queries},
            attention_mask=masks[0],
            encoder_attention_mask=masks[1],
            past_key_values=cache,
            **options,
        )

    def _cache(self, cache, use_cache: bool | None, is_decoder: bool):
        """The cache of this call, as transformers resolves it."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if not (is_decoder and use_cache) or (self.training and self.encoder.gradient_checkpointing):
            return cache
        if cache is None:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return EncoderDecoderCache(cache, DynamicCache(config=self.config)) if isinstance(cache, DynamicCache) else cache


def attentions_unfit(layer: nn.Module) -> str:
    """'' or why fused attention computes something else than one of the layer's."""
    attentions = (getattr(layer, name, None) for name in ("attention", "crossattention"))
    return next(
        filter(None, (a.self.why_not(a.self) for a in attentions if isinstance(getattr(a, "self", None), FusedBlipTextSelfAttention))), ""
    )
