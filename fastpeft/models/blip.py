"""BLIP's modules on fastpeft's operators: the same parameters under the same names, another ``forward``.

:func:`fastpeft.optimize` gives the transformers modules these classes in place. What differs from transformers' own:

- attention forms no probabilities unless somebody reads them (any flash backend serves), takes prefixes, and folds IA3's factors into q and
  the output;
- masks stay [B, N] booleans, so that no [B, 1, M, N] tensor is built, and padding that nobody reads is not computed; where a module is
  hooked, foreign, or set to something that the fused forms do not know, transformers' own forward runs, on whole tensors;
- **cross-attention honours ``encoder_attention_mask``.** transformers 4.57 to 5.23 loses it on the way (``BlipTextLayer`` passes it
  as ``attention_mask``, ``BlipTextSelfAttention`` reads ``encoder_attention_mask``): padding of a question leaks into the decoder;
- the language-model loss forms logits at labelled positions only; all logits are formed when they are read.
"""

from __future__ import annotations

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.blip import modeling_blip, modeling_blip_text
from transformers.utils import can_return_tuple

from fastpeft import ops
from fastpeft.methods.base import watched
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
from fastpeft.models.blip_stack import TextModel
from fastpeft.models.causal_loss import slice_logits_to_keep
from fastpeft.models.flatten import why_not_flat
from fastpeft.models.layout import IGNORED, next_labels
from fastpeft.models.outputs import can_defer, is_deferred, with_deferred_logits
from fastpeft.ops._common import sent


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
    """Decoder with its head. With labels, the loss forms logits at labelled positions only; all logits are formed when they are read."""

    lean_logits = False  # whether nobody reads the logits of a training step

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
        padding_unread=False,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As BlipTextLMHeadModel's; reduction "none" sums over each sample's tokens, like transformers. ``num_items_in_batch`` divides the
        sum in place of the mean's own count of labels: gradients accumulated over unequal batches are then those of the whole.
        ``loss_only``: nobody reads logits, in evaluation neither; ``padding_unread`` is the encoder's."""
        shift_labels = kwargs.pop("shift_labels", None)  # aligned with the states by the caller
        items = kwargs.pop("num_items_in_batch", None)
        lean = labels is not None and (loss_only or (self.training and self.lean_logits)) and not return_logits
        lean = lean and not torch.compiler.is_compiling() and not why_not_flat(self, self.cls)
        if lean and isinstance(logits_to_keep, int) and not logits_to_keep and type(self.bert) is TextModel and not watched(self.bert):
            shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            kwargs["wanted"] = labelled_positions(labels, shift_labels, shape)
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
            **kwargs,
        )
        hidden, logits, loss = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep), None, None
        if return_logits:
            return self.cls(hidden)[:, :-1].contiguous()
        deferred = not lean and labels is not None and can_defer(self.cls)
        if not (lean or deferred):
            logits = self.cls(hidden)
        if labels is not None:
            summed = items is not None and reduction == "mean"
            loss = self._loss(hidden, labels, shift_labels, "sum" if summed else reduction, logits)
            loss = loss / (items.to(loss.device) if torch.is_tensor(items) else items) if summed else loss
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=hidden if deferred else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return with_deferred_logits(output, lambda: self.cls(hidden), self.cls) if deferred else output

    def _loss(self, hidden: Tensor, labels: Tensor, shift_labels: Tensor | None, reduction: str, logits: Tensor | None) -> Tensor:
        """hidden [B, L, C] (or [N, C]) and labels of the same positions, on the host if the device is not to be waited for. Without an
        adapter on the head, and where no ``logits`` are there already, the head sees labelled positions only."""
        if shift_labels is None and hidden.dim() != 3:
            raise ValueError(
                "logits_to_keep is a mask, which leaves rows without their neighbours: give shift_labels, aligned with the rows"
            )
        targets, samples = next_labels(labels, shift_labels).flatten(), len(hidden)
        if len(targets) != hidden.shape[:-1].numel():
            raise ValueError(f"{len(targets)} labels for states {list(hidden.shape[:-1])}: give one for each")
        how = {"label_smoothing": self.label_smoothing, "reduction": reduction}
        if logits is None and not why_not_flat(self, self.cls) and type(self.cls.predictions.decoder) is nn.Linear:
            head, rows = self.cls.predictions, (targets != IGNORED).nonzero().squeeze(1)
            labelled, there = targets[rows], sent(rows, hidden.device)
            states = head.transform(hidden.flatten(0, -2)[there])
            loss = ops.linear_cross_entropy(states, head.decoder.weight, head.decoder.bias, labelled, **how)
            if reduction == "none":
                loss = loss.new_zeros(len(targets)).index_copy(0, there, loss)
        else:  # an adapter on the head, ours or PEFT's, or a hook: the weight alone is not what it computes
            logits = (self.cls(hidden) if logits is None else logits).flatten(0, -2)
            loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), sent(targets, logits.device), **how)
        return loss.view(samples, -1).sum(1) if reduction == "none" else loss


def labelled_positions(labels: Tensor, shift_labels: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """[B, L] bool: where the loss reads the last hidden state."""
    labels = next_labels(labels, shift_labels)
    return (labels != IGNORED).view(shape) if labels.numel() == shape[0] * shape[1] else torch.ones(shape, dtype=torch.bool)


class QuestionAnswering(_ShiftsLabels, modeling_blip.BlipForQuestionAnswering):
    """transformers' own forward around our decoder, of whose outputs it reads the loss alone, and of the question no padding."""

    @wraps(modeling_blip.BlipForQuestionAnswering.forward)
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **reads_of(self.text_decoder))


class ConditionalGeneration(modeling_blip.BlipForConditionalGeneration):
    """transformers' own forward, whose output hands on logits that are formed when they are read."""

    @can_return_tuple
    @wraps(modeling_blip.BlipForConditionalGeneration.forward)
    def forward(
        self,
        pixel_values,
        input_ids=None,
        attention_mask=None,
        labels=None,
        interpolate_pos_encoding=False,
        logits_to_keep=0,
        **kwargs,
    ) -> modeling_blip.BlipForConditionalGenerationModelOutput:
        vision = self.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.text_decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=vision.last_hidden_state,
            labels=labels,
            reduction="mean",
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        output = modeling_blip.BlipForConditionalGenerationModelOutput(
            loss=text.loss,
            logits=text.loss if is_deferred(text) else text.logits,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )
        return with_deferred_logits(output, lambda: text.logits, self.text_decoder.cls) if is_deferred(text) else output


def reads_of(decoder: nn.Module) -> dict[str, bool]:
    """What a model of visual question answering, whose ``decoder`` this is, can say that it does not read; keywords of text models."""
    ours = type(decoder) is TextLMHeadModel and type(decoder.bert) is TextModel  # attends to no padding of the question
    return {"loss_only": not watched(decoder), "padding_unread": True} if ours else {}


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
}
MODELS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_blip.BlipForQuestionAnswering: QuestionAnswering,
    modeling_blip.BlipForConditionalGeneration: ConditionalGeneration,
}
# these hand masks, layouts and prefixes down in a form that only they read
CARRIERS = (TextModel, TextLayer, TextAttention, TextSelfAttention)
MASK_FIX = "cross-attention now honours encoder_attention_mask, which transformers 4.57 to 5.23 loses: padded questions no longer leak"
