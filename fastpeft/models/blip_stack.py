"""BLIP's stack of text layers on fastpeft's operators: who computes what of a batch, and in which layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.blip import modeling_blip_text
from transformers.utils import can_return_tuple

from fastpeft.methods.base import watched
from fastpeft.models.attend import as_key_mask
from fastpeft.models.blip_layers import TextSelfAttention
from fastpeft.models.flatten import ROW_WISE, why_not_flat
from fastpeft.models.layout import Layout, Tail, image_layout, self_layout, tail_of
from fastpeft.ops._common import sent
from fastpeft.savings import on

# what treats every token by itself; nobody calls the encoder: its layers are run one by one
ROW_WISE |= {
    getattr(modeling_blip_text, f"BlipText{name}")
    for name in ("SelfOutput", "Output", "Intermediate", "Encoder", "OnlyMLMHead", "LMPredictionHead", "PredictionHeadTransform")
}


class TextModel(modeling_blip_text.BlipTextModel):
    """The stack of text layers: hands each its prefix, computes no padding, counts positions from the end of the prefix."""

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        first = self.encoder.layer[0].attention.self
        return len(self.encoder.layer), first.num_attention_heads, first.attention_head_size

    @staticmethod
    def unfit(module: nn.Module) -> str:
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
        wanted=None,
        padding_unread=False,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Arguments as BlipTextModel's; ``is_decoder`` makes self-attention causal. Masks [B, N]: nonzero = attend.

        ``encoder_index`` [B]: sample b attends to ``encoder_hidden_states[encoder_index[b]]``, whose keys and values are then projected
        once for all samples that share it. ``wanted`` [B, L] bool: the caller reads the last hidden state there only; ``padding_unread``:
        he reads it at no padding. What is not read may be zero, and is not computed where every layer can do without.

        transformers' own forward runs, with our layers in it, where something is asked that the fused layers do not know, and where they
        are hooked or foreign: these see whole tensors [B, L, C] under transformers' own masks.
        """
        if (input_ids is None) == (inputs_embeds is None) and encoder_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        shape = next(t for t in (encoder_embeds, inputs_embeds, input_ids) if t is not None).shape[:2]
        if encoder_hidden_states is not None and encoder_index is None and len(encoder_hidden_states) == 1 < shape[0]:
            encoder_index = torch.zeros(shape[0], dtype=torch.long)  # as it broadcasts
        masks = [as_key_mask(attention_mask), as_key_mask(encoder_attention_mask)]
        if masks[1] is not None and masks[1].dim() == 2 and len(masks[1]) == 1:
            masks[1] = masks[1].expand(shape[0], -1)
        encoder, causal = getattr(self, "prefix_encoder", None), bool(is_decoder) and self._is_causal(kwargs)
        reason = self._beyond_us(shape, masks, encoder_hidden_states, past_key_values, kwargs)
        if reason and encoder is not None:
            raise ValueError(f"a prefix runs in fused attention alone, and {reason}: leave that out, or detach the prefix")
        reason = reason or self._needs_transformers()
        keep_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        wanted, padding_unread = (None, False) if keep_states or self.pooler is not None else (wanted, padding_unread)
        unpadded, own_rows = self._padding(masks[0], past_key_values, wanted, padding_unread, causal)
        if encoder is None and (reason or not own_rows):
            return self._as_transformers(
                encoder_hidden_states,
                encoder_index,
                masks,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                encoder_embeds=encoder_embeds,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                is_decoder=is_decoder,
                **kwargs,
            )
        if use_cache is None:
            use_cache = self.config.use_cache
        if is_decoder and use_cache and not (self.training and self.encoder.gradient_checkpointing):
            past_key_values = self._cache(past_key_values)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        hidden = encoder_embeds
        if hidden is None:
            hidden = self.embeddings(
                input_ids=input_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                past_key_values_length=past + (encoder.tokens if encoder is not None else 0),
            )
        flat = unpadded and not reason
        layouts = self._layouts(hidden, masks, past_key_values, encoder_hidden_states, encoder_index, flat)
        states = [] if keep_states else None
        hidden = self._run(hidden, masks, past_key_values, encoder_hidden_states, encoder_index, causal, layouts, wanted, states)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden) if self.pooler is not None else None,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if keep_states else None,
        )

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
        if reason := self.unfit(self) or next(filter(None, map(attentions_unfit, self.encoder.layer)), ""):
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
        return "the stack has hooks" if watched(self) else why_not_flat(self, self.encoder)

    @staticmethod
    def _padding(mask: Tensor | None, cache, wanted: Tensor | None, unread: bool, causal: bool) -> tuple[bool, bool]:
        """(whether the states of padding may be left out, whether all rows that are read attend to something: in transformers, a row that
        is masked as a whole attends to all keys alike)."""
        if mask is None or mask.dim() != 2 or cache is not None or torch.compiler.is_compiling():
            return True, True
        real = mask.cpu()
        if unread if wanted is None else not bool((wanted.cpu() & ~real).any()):
            return True, True
        return bool(real.all()), bool((real[:, 0] if causal else real.any(1)).all())

    def _as_transformers(self, encoder_states, encoder_index, masks, **given) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """transformers' own forward around our layers, in its masks [B, 1, M, N]."""
        if encoder_index is not None:
            encoder_states = encoder_states[sent(encoder_index, encoder_states.device)]
        names = ("attention_mask", "encoder_attention_mask")
        given |= {name: mask if mask is None else mask.to(self.device) for name, mask in zip(names, masks)}
        return super().forward(encoder_hidden_states=encoder_states, return_dict=True, **given)

    def _run(self, hidden, masks, cache, encoder_states, encoder_index, causal, layouts, wanted, states: list | None) -> Tensor:
        """[B, L, C] after the last layer, at ``wanted`` positions only where some are given; ``states`` takes what comes before and after
        each layer."""
        layout, device = layouts["layout"], hidden.device
        if encoder_index is not None and layouts["encoder_layout"] is layout:
            encoder_states = encoder_states[sent(encoder_index, device)]
        masks = [None if mask is None else mask.to(device, non_blocking=True) for mask in masks]
        encoder = getattr(self, "prefix_encoder", None)
        prefixes = [None] * len(self.encoder.layer) if encoder is None else encoder()
        pad = layout.spread if layout is not None else lambda x: x
        hidden = hidden if layout is None else layout.gather(hidden)
        how = {name: value for name, value in {"causal": causal, **layouts}.items() if value}
        tail = tail_of(layout, wanted, causal, device) if wanted is not None and layout is not None and on("labelled") else None
        for layer, prefix in zip(self.encoder.layer, prefixes):
            if states is not None:
                states.append(pad(hidden))
            if tail is not None and layer is self.encoder.layer[-1]:
                pad, how = tail.outputs.spread, how | self._tail(tail, layouts, encoder_index, encoder_states)
            hidden = layer(
                hidden,
                encoder_states,
                attention_mask=masks[0],
                encoder_attention_mask=masks[1],
                past_key_values=cache,
                **how | ({} if prefix is None else {"prefix": prefix}),
            )
        hidden = pad(hidden)
        if states is not None:
            states.append(hidden)
        return hidden

    def _layouts(self, hidden, masks, cache, encoder_states, encoder_index, flat: bool) -> dict[str, Layout | None]:
        """Where tokens lie in self- and in cross-attention; None where layers see them as they are, or a cache or a 4-D mask forbids it.
        Samples keep states of their own (one layout for both) where nothing is shared, or where a mask over states would differ between
        those that share them."""
        if not flat or cache is not None or any(mask is not None and mask.dim() == 4 for mask in masks):
            return {"layout": None, "encoder_layout": None}
        layout = self_layout(hidden.shape[:2], masks[0], hidden.device)
        if encoder_states is None or encoder_index is None or masks[1] is not None:
            return {"layout": layout, "encoder_layout": layout}
        return {"layout": layout, "encoder_layout": image_layout(layout, encoder_index, len(encoder_states), hidden.device)}

    def _tail(self, tail: Tail, layouts, encoder_index, encoder_states) -> dict[str, Tail | Layout]:
        """What the last layer is told where only some of its outputs are wanted."""
        shared = layouts["encoder_layout"] is not layouts["layout"]
        images = image_layout(tail.queries, encoder_index, len(encoder_states), tail.tokens.device) if shared else tail.queries
        return {"tail": tail, "encoder_layout": images}

    def _cache(self, cache):
        if cache is None:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return EncoderDecoderCache(cache, DynamicCache(config=self.config)) if isinstance(cache, DynamicCache) else cache


def attentions_unfit(layer: nn.Module) -> str:
    """'' or why fused attention computes something else than one of the layer's."""
    attentions = (getattr(layer, name, None) for name in ("attention", "crossattention"))
    return next(filter(None, (a.self.unfit(a.self) for a in attentions if isinstance(getattr(a, "self", None), TextSelfAttention))), "")
