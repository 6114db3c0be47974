"""Language models with their heads: LLaMA's, BLIP's decoder, BLIP for question answering and captioning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from fastpeft.fused.head.loss import OF_THE_LOSS, Labelled, causal_loss, labelled_loss, loss_of_logits, slice_logits_to_keep
from fastpeft.fused.head.outputs import can_defer, is_deferred, returns_names, with_deferred_logits
from fastpeft.fused.stack.blip import FusedBlipTextModel
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.llama import FusedLlamaModel, check_takes_prefixes
from fastpeft.labels import IGNORE_INDEX, next_labels
from fastpeft.methods.base import has_hooks
from fastpeft.methods.excitor import Visual
from fastpeft.ops._common import to_device_async
from fastpeft.registry import fuses, original_class, signature_of_replaced
from fastpeft.static_shapes import first_rows, sizes


@fuses("transformers.models.llama.modeling_llama.LlamaForCausalLM")
class FusedLlamaForCausalLM:
    """LLaMA with its head. A training step with labels forms logits at labelled positions for its loss, and the others when somebody
    reads them (:mod:`fastpeft.fused.head.outputs`). ``lean_logits``: nobody does; then logits are None, and only what the loss needs is
    computed."""

    host_inputs = ("attention_mask", "position_ids", "labels", "prefix_lengths")  # best left on the host: nobody then waits for the device
    lean_logits = False

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if module.loss_function is ForCausalLMLoss else "its loss_function is its own, and takes logits"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        visual: Tensor | None = None,
        visual_index: Tensor | None = None,
        visual_seen: Tensor | None = None,
        modality: Tensor | None = None,
        modality_embeds: tuple[Tensor, ...] | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as LlamaForCausalLM's: labels [B, L] with -100 where there is none, shifted here; ``loss`` is the mean over labelled
        tokens, or their sum over ``num_items_in_batch``. For Excitor,
        visual: features [U, V, D] of distinct images, of which sample b sees ``visual_index[b]`` (-1: none); or of each sample its own,
        ``visual_seen`` [B] bool saying which have one. For MMAdapter, modality and modality_embeds, and
        prefix_lengths of samples that share prefixes: as FusedLlamaModel takes them."""
        named = returns_names(self, kwargs)
        kwargs.pop("return_dict", None)
        to_model = {"modality": modality, "modality_embeds": modality_embeds} if modality is not None else {}
        check_takes_prefixes(self.model, prefix_lengths)
        to_model |= {"prefix_lengths": prefix_lengths, "visual": _visual(visual, visual_index, visual_seen)}
        to_model = {name: value for name, value in to_model.items() if value is not None}
        tokens, asked = input_ids if inputs_embeds is None else inputs_embeds, None
        if self.training and tokens is not None and self.loss_function is ForCausalLMLoss:
            asked = Labelled.of(labels, tokens.shape[:2], logits_to_keep, kwargs)
        lean = asked is not None and named and self._may_leave_out_logits()
        if lean and isinstance(self.model, FusedLlamaModel) and not has_hooks(self.model):
            to_model["output_mask"] = asked.targets != asked.ignore_index
        if use_cache is None and labels is not None and getattr(self.model, "alone", False):
            use_cache = False  # position_ids then mark packed samples in evaluation too
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{name: value for name, value in kwargs.items() if name not in OF_THE_LOSS},
            **to_model,
        )
        loss, logits, read_later = causal_loss(self, outputs.last_hidden_state, labels, asked, lean, logits_to_keep, kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        output = output if read_later is None else with_deferred_logits(output, read_later, self.lm_head)
        return output if named else output.to_tuple()

    def _may_leave_out_logits(self) -> bool:
        return self.lean_logits and not torch.compiler.is_compiling() and not why_not_flat(self, self.lm_head)


def _visual(features: Tensor | None, index: Tensor | None, seen: Tensor | None) -> Visual | None:
    """What Excitor sees, of the arguments of :meth:`FusedLlamaForCausalLM.forward`."""
    if features is None:
        return None
    own = torch.arange(len(features))
    index = own if index is None else readable(index)
    return Visual(features, index if seen is None else own.masked_fill(~seen.cpu(), -1))


class _ShiftsLabels:
    """Tells HF Trainer that the loss shifts its labels: ``num_items_in_batch`` then counts those that are predicted. transformers derives
    ``loss_type`` from a class's name, and finds none in these."""

    @property
    def loss_type(self) -> str:
        return "ForCausalLM"

    @loss_type.setter
    def loss_type(self, value: str | None) -> None:
        """PreTrainedModel sets it from the name."""


@fuses("transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel", computes=("cls.predictions",))
class FusedBlipTextLMHeadModel(_ShiftsLabels):
    """Decoder with its head. With labels, the loss forms logits at labelled positions only; all logits are formed when they are read."""

    lean_logits = False  # whether nobody reads the logits of a training step

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
        loss_only=None,
        padding_unread=False,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As BlipTextLMHeadModel's; reduction "none" sums over each sample's tokens, like transformers. ``num_items_in_batch`` divides the
        sum in place of the mean's own count of labels: gradients accumulated over unequal batches are then those of the whole.
        ``loss_only``: whether nobody reads logits, in evaluation neither (None: as ``lean_logits`` says); ``padding_unread`` is the
        encoder's."""
        named = returns_names(self, kwargs)
        kwargs.pop("return_dict", None)
        loss_only = self.training and self.lean_logits and named if loss_only is None else loss_only
        shift_labels = kwargs.pop("shift_labels", None)  # aligned with the states by the caller
        items = kwargs.pop("num_items_in_batch", None)
        lean = labels is not None and loss_only and not return_logits
        lean = lean and not torch.compiler.is_compiling() and not why_not_flat(self, self.cls)
        if lean and self._reads_labels_alone(logits_to_keep):
            shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
            kwargs["output_mask"] = labelled_positions(labels, shift_labels, shape)
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
            loss = self._loss(hidden, labels, shift_labels, reduction, logits, items)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=hidden if deferred else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        output = with_deferred_logits(output, lambda: self.cls(hidden), self.cls) if deferred else output
        return output if named else output.to_tuple()

    def _reads_labels_alone(self, logits_to_keep: int | Tensor) -> bool:
        """Whether the stack may leave out the outputs that the loss does not read."""
        every = isinstance(logits_to_keep, int) and not logits_to_keep
        return every and isinstance(self.bert, FusedBlipTextModel) and not has_hooks(self.bert)

    def _loss(self, hidden: Tensor, labels: Tensor, shift_labels: Tensor | None, reduction: str, logits: Tensor | None, items) -> Tensor:
        """hidden [B, L, C] (or [N, C]) and labels of the same positions, on the host if the device is not to be waited for. Without an
        adapter on the head, and where no ``logits`` are there already, the head sees labelled positions only."""
        if shift_labels is None and hidden.dim() != 3:
            raise ValueError(
                "logits_to_keep is a mask, which leaves rows without their neighbours: give shift_labels, aligned with the rows"
            )
        targets, samples = next_labels(labels, shift_labels).flatten(), len(hidden)
        if len(targets) != hidden.shape[:-1].numel():
            raise ValueError(f"{len(targets)} labels for states {list(hidden.shape[:-1])}: give one for each")
        options = {"label_smoothing": self.label_smoothing, "reduction": reduction}
        if logits is None and not why_not_flat(self, self.cls) and original_class(self.cls.predictions.decoder) is nn.Linear:
            rows = labelled_rows(targets)
            at = to_device_async(rows, hidden.device)
            states = self.cls.predictions.transform(hidden.flatten(0, -2)[at])
            loss = labelled_loss(self.cls.predictions.decoder, states, targets[rows], items, **options)
            if reduction == "none":
                loss = loss.new_zeros(len(targets)).index_copy_(0, at, loss)
        else:  # an adapter on the head, ours or PEFT's, or a hook: the weight alone is not what it computes
            loss = loss_of_logits(self.cls(hidden) if logits is None else logits, targets, items, **options)
        return loss.view(samples, -1).sum(1) if reduction == "none" else loss


def labelled_rows(targets: Tensor) -> Tensor:
    """[n]: where targets [M] are labels; in a step of static shapes as many as it has room for, others after these."""
    labelled, static = targets != IGNORE_INDEX, sizes()
    return labelled.nonzero().squeeze(1) if static is None else first_rows(labelled, static.labelled)


def readable(index: Tensor) -> Tensor:
    """``index`` where its values may be read: nobody does in a step of static shapes."""
    return index.cpu() if sizes() is None else index


def labelled_positions(labels: Tensor, shift_labels: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """[B, L] bool: where the loss reads the last hidden state."""
    labels = next_labels(labels, shift_labels)
    return (labels != IGNORE_INDEX).view(shape) if labels.numel() == shape[0] * shape[1] else torch.ones(shape, dtype=torch.bool)


@fuses("transformers.models.blip.modeling_blip.BlipForQuestionAnswering")
class FusedBlipForQuestionAnswering(_ShiftsLabels):
    """transformers' own forward around our decoder, of whose outputs it reads the loss alone, and of the question no padding."""

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **reads_of(self.text_decoder))


@fuses("transformers.models.blip.modeling_blip.BlipForConditionalGeneration")
class FusedBlipForConditionalGeneration:
    """transformers' own forward, whose output hands on logits that are formed when they are read."""

    @signature_of_replaced
    def forward(
        self,
        pixel_values,
        input_ids=None,
        attention_mask=None,
        labels=None,
        interpolate_pos_encoding=False,
        logits_to_keep=0,
        **kwargs,
    ) -> ModelOutput:
        from transformers.models.blip.modeling_blip import BlipForConditionalGenerationModelOutput  # imported already: the base is of it

        named = returns_names(self, kwargs)
        kwargs.pop("return_dict", None)
        whole = {"loss_only": False} if not named and isinstance(self.text_decoder, FusedBlipTextLMHeadModel) else {}
        vision = self.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.text_decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=vision.last_hidden_state,
            labels=labels,
            reduction="mean",
            logits_to_keep=logits_to_keep,
            **whole,
            **kwargs,
        )
        output = BlipForConditionalGenerationModelOutput(
            loss=text.loss,
            logits=text.loss if is_deferred(text) else text.logits,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )
        output = with_deferred_logits(output, lambda: text.logits, self.text_decoder.cls) if is_deferred(text) else output
        return output if named else output.to_tuple()


def reads_of(decoder: nn.Module) -> dict[str, bool | None]:
    """What a model of visual question answering, whose ``decoder`` this is, can say that it does not read; keywords of text models."""
    # a fused decoder attends to no padding of the question
    ours = isinstance(decoder, FusedBlipTextLMHeadModel) and isinstance(decoder.bert, FusedBlipTextModel)
    return {"loss_only": not has_hooks(decoder) or None, "padding_unread": True} if ours else {}
