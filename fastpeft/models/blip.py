"""BLIP's modules on fastpeft's operators: the same parameters under the same names, another ``forward``.

:func:`fastpeft.optimize` gives the transformers modules these classes in place. What differs from transformers' own:

- attention never forms its probabilities (any flash backend serves), takes prefixes, and folds IA3's factors into q and the output;
- masks stay [B, N] booleans, so that no [B, 1, M, N] tensor is built;
- **cross-attention honours ``encoder_attention_mask``.** transformers 4.57 to 5.23 loses it on the way (``BlipTextLayer`` passes it
  as ``attention_mask``, ``BlipTextSelfAttention`` reads ``encoder_attention_mask``): padding of a question leaks into the decoder;
- the language-model loss forms logits at labelled positions only, and no logits are returned from a training step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.blip import modeling_blip, modeling_blip_text
from transformers.utils import can_return_tuple

from fastpeft import ops
from fastpeft.methods.base import watched
from fastpeft.models.attend import as_key_mask
from fastpeft.models.blip_layers import (
    TextAttention,
    TextIntermediate,
    TextLayer,
    TextOutput,
    TextSelfAttention,
    TextSelfOutput,
    VisionAttention,
    VisionMLP,
)
from fastpeft.models.layout import IGNORED, Layout, Tail, image_layout, next_labels, self_layout, tail_of
from fastpeft.ops._common import sent
from fastpeft.ops._savings import on


class TextModel(modeling_blip_text.BlipTextModel):
    """The stack of text layers: hands each its prefix, computes no padding, counts positions from the end of the prefix."""

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        first = self.encoder.layer[0].attention.self
        return len(self.encoder.layer), first.num_attention_heads, first.attention_head_size

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
        output_attentions=None,
        output_hidden_states=None,
        encoder_index=None,
        wanted=None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Arguments as BlipTextModel's; ``is_decoder`` makes self-attention causal. Masks [B, N]: nonzero = attend.

        ``encoder_index`` [B]: sample b attends to ``encoder_hidden_states[encoder_index[b]]``, whose keys and values are then projected
        once for all samples that share it. Hidden states of padding are zero. ``wanted`` [B, L] bool: the caller reads the last hidden
        state there only; elsewhere it may be zero.
        """
        if output_attentions:
            raise ValueError("fused attention forms no probabilities to return; call fastpeft.restore(model) first")
        if (input_ids is None) == (inputs_embeds is None) and encoder_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        encoder = getattr(self, "prefix_encoder", None)
        prefixes = [None] * len(self.encoder.layer) if encoder is None else encoder()
        if use_cache is None:
            use_cache = self.config.use_cache
        if is_decoder and use_cache:
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
        masks = [as_key_mask(attention_mask), as_key_mask(encoder_attention_mask)]
        layouts = self._layouts(hidden, masks, past_key_values, encoder_hidden_states, encoder_index)
        if encoder_index is not None and layouts["encoder_layout"] is layouts["layout"]:
            encoder_hidden_states = encoder_hidden_states[sent(encoder_index, hidden.device)]
        masks = [None if mask is None else mask.to(hidden.device, non_blocking=True) for mask in masks]
        pad = layouts["layout"].spread if layouts["layout"] is not None else lambda x: x
        hidden = hidden if layouts["layout"] is None else layouts["layout"].gather(hidden)
        states = [hidden]
        how = {name: value for name, value in {"causal": bool(is_decoder), **layouts}.items() if value}
        tail = None
        if wanted is not None and layouts["layout"] is not None and self.pooler is None and not output_hidden_states and on("labelled"):
            tail = tail_of(layouts["layout"], wanted, bool(is_decoder), hidden.device)
        for layer, prefix in zip(self.encoder.layer, prefixes):
            if tail is not None and layer is self.encoder.layer[-1]:
                pad, how = tail.outputs.spread, how | self._tail(tail, layouts, encoder_index, encoder_hidden_states)
            hidden = layer(
                hidden,
                encoder_hidden_states,
                attention_mask=masks[0],
                encoder_attention_mask=masks[1],
                past_key_values=past_key_values,
                **how | ({} if prefix is None else {"prefix": prefix}),
            )
            states += [hidden] if output_hidden_states else []
        hidden = pad(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden) if self.pooler is not None else None,
            past_key_values=past_key_values,
            hidden_states=tuple(map(pad, states)) if output_hidden_states else None,
        )

    def _layouts(self, hidden, masks, cache, encoder_states, encoder_index) -> dict[str, Layout | None]:
        """Where tokens lie in self- and in cross-attention; None where a cache or a 4-D mask forbids it. Samples keep states of their own
        (one layout for both) where nothing is shared, or where a mask over states would differ between those that share them."""
        if cache is not None or any(mask is not None and mask.dim() == 4 for mask in masks):
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


class _ShiftsLabels:
    """Tells HF Trainer that the loss shifts its labels: ``num_items_in_batch`` then counts those that are predicted. transformers derives
    ``loss_type`` from a class's name, and finds none in these."""

    @property
    def loss_type(self) -> str:
        return "ForCausalLM"

    @loss_type.setter
    def loss_type(self, value: str | None) -> None:
        """PreTrainedModel sets it from the name."""


class TextLMHeadModel(_ShiftsLabels, modeling_blip_text.BlipTextLMHeadModel):
    """Decoder with its head. In training, with labels, logits exist for labelled positions only and are not returned."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        past_key_values=None,
        use_cache=None,
        return_logits=False,
        is_decoder=True,
        reduction="mean",
        logits_to_keep=0,
        loss_only=False,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As BlipTextLMHeadModel's; reduction "none" sums over each sample's tokens, like transformers. ``num_items_in_batch`` divides the
        sum in place of the mean's own count of labels: gradients accumulated over unequal batches are then those of the whole.
        ``loss_only``: with labels, logits are returned in evaluation neither."""
        shift_labels = kwargs.pop("shift_labels", None)  # [B, L], aligned with input_ids by the caller
        items = kwargs.pop("num_items_in_batch", None)
        lean = labels is not None and (self.training or loss_only) and not return_logits
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            is_decoder=is_decoder,
            use_cache=False if labels is not None else use_cache,
            **({"wanted": next_labels(labels, shift_labels) != IGNORED} if lean and isinstance(self.bert, TextModel) else {}),
            **kwargs,
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        if not lean:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            logits = self.cls(hidden[:, keep if isinstance(logits_to_keep, int) else logits_to_keep])
        if return_logits:
            return logits[:, :-1].contiguous()
        if labels is not None:
            summed = items is not None and reduction == "mean"
            loss = self._loss(hidden, next_labels(labels, shift_labels), "sum" if summed else reduction)
            loss = loss / items if summed else loss
        return CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss(self, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """hidden [B, L, C], labels [B, L] of the same positions, on the host if the device is not to be waited for. Without an adapter on
        the head, the head sees labelled positions only."""
        head, shape = self.cls.predictions, labels.shape
        how = {"label_smoothing": self.label_smoothing, "reduction": reduction}
        if type(head.decoder) is nn.Linear and not any(map(watched, (self.cls, head, head.decoder))):
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
            rows = (labels != IGNORED).nonzero().squeeze(1)
            labelled, there = labels[rows], sent(rows, hidden.device)
            loss = ops.linear_cross_entropy(head.transform(hidden[there]), head.decoder.weight, head.decoder.bias, labelled, **how)
            if reduction == "none":
                loss = loss.new_zeros(len(labels)).index_copy(0, there, loss)
        else:  # an adapter on the head, ours or PEFT's, or a hook: the weight alone is not what it computes
            logits, labels = self.cls(hidden).flatten(0, 1), labels.flatten().to(hidden.device)
            loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, **how)
        return loss.view(shape).sum(1) if reduction == "none" else loss


class QuestionAnswering(_ShiftsLabels, modeling_blip.BlipForQuestionAnswering):
    """transformers' own forward around our decoder."""


# transformers' class -> ours; the exact type only, as a subclass may mean something else
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_blip_text.BlipTextSelfAttention: TextSelfAttention,
    modeling_blip_text.BlipTextAttention: TextAttention,
    modeling_blip_text.BlipTextSelfOutput: TextSelfOutput,
    modeling_blip_text.BlipTextOutput: TextOutput,
    modeling_blip_text.BlipTextIntermediate: TextIntermediate,
    modeling_blip_text.BlipTextLayer: TextLayer,
    modeling_blip_text.BlipTextModel: TextModel,
    modeling_blip_text.BlipTextLMHeadModel: TextLMHeadModel,
    modeling_blip.BlipAttention: VisionAttention,
    modeling_blip.BlipMLP: VisionMLP,
    modeling_blip.BlipForQuestionAnswering: QuestionAnswering,
}
# these hand masks, layouts and prefixes down in a form that only they read
CARRIERS = (TextModel, TextLayer, TextAttention, TextSelfAttention)
MASK_FIX = "cross-attention now honours encoder_attention_mask, which transformers 4.57 to 5.23 loses: padded questions no longer leak"
