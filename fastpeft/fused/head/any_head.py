"""Any model of transformers with a language-model head: its own forward, whose loss forms logits at labelled positions only."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpeft.forms import cache_by_forward, is_of_transformers
from fastpeft.fused.code.state_reads import reads_labels_alone
from fastpeft.fused.head.lazy_logits import LazyLogits, is_plain, lazy_head
from fastpeft.fused.head.outputs import can_defer, returns_names, with_deferred_logits
from fastpeft.fused.head.token_heads import labelled_call, token_path
from fastpeft.fused.stack.any_stack import Read, layers_of, read_at
from fastpeft.fused.stack.encoder_decoder import ENCODER_STATE, labels_handed_to, read_at_labels, read_at_tokens, stacks_of
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.rows import standing_in
from fastpeft.labels import IGNORE_INDEX, next_labels
from fastpeft.registry import fuses, original_class, signature_of_replaced


def takes_labels(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` are models whose forward, as transformers wrote it, takes labels, and that may have a head that makes
    logits. (A forward of somebody else's may hand logits to what no function of PyTorch's announces, an autograd Function of its own.)"""
    if not issubclass(cls, PreTrainedModel) or not is_of_transformers(cls):
        return False
    return "labels" in _signature(cls).parameters and may_have_output_head(cls)


@cache
def may_have_output_head(cls: type[nn.Module]) -> bool:
    """Whether models of ``cls`` say which module makes their logits, or have one where transformers looks for it."""
    made = (vars(kind)["__init__"] for kind in cls.__mro__ if "__init__" in vars(kind))
    own = cls.get_output_embeddings is not PreTrainedModel.get_output_embeddings
    return own or any("lm_head" in init.__code__.co_names for init in made if isinstance(init, FunctionType))


@cache_by_forward
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes logits, None where there is none: what ``get_output_embeddings`` gives, if it is a part of the model, and no
    layer before the logits, as wide as its input (DeBERTa's, whose ``legacy`` is False)."""
    with suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            shape = getattr(getattr(head, "weight", None), "shape", ())
            before = len(shape) == 2 and shape[0] == shape[1] != getattr(model.config.get_text_config(), "vocab_size", shape[0])
            return None if before else head
    return None


@fuses(rule=takes_labels, applies=lambda module: output_head(module) is not None)
class FusedLanguageModel:
    """transformers' own forward, inside which the head's logits are lazy (:mod:`fastpeft.fused.head.lazy_logits`): the loss forms them at
    labelled positions, and the others are formed when somebody reads them. ``lean_logits``: nobody does; then logits are None."""

    lean_logits = False
    computes_only = staticmethod(output_head)

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if _loss_is_known(module) else "its loss_function is its own, and takes logits"

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        given = arguments_of(self, args, kwargs)
        with _returning_logits(None if returns_names(self, given) else self._leaves_loss_to()):
            return self._forward(given, args, kwargs)

    def _forward(self, given: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The forward of ``args`` and ``kwargs``, by name ``given``."""
        head = self._lazy_head(given)
        if head is None:
            return super().forward(*args, **kwargs)
        lean = self._leaves_out_logits(given)
        reads = self._reads(given, head) if lean else {}
        masked = any(read is None or read.mask is not None for read in reads.values())
        # without a mask, position_ids may mark packed samples, but only where there is no cache
        if reads and (masked or given.get("position_ids") is None) and not args and may_leave_out_cache(self, given):
            kwargs["use_cache"] = False
        call = labelled_call(self, given) if lean and not reads else None
        with standing_in(self, call), lazy_head(head), read_at(reads) as at_tokens:
            output = super().forward(*args, **kwargs)
            left_out = any(reads[stack] is None for stack in at_tokens)
        if left_out and isinstance(output, ModelOutput) and ENCODER_STATE in output:  # where the encoder had padding
            leave_out(output, ENCODER_STATE)
        return _handed_out(output, lean)

    def _reads(self, given: dict[str, Any], head: nn.Module) -> dict[nn.Module, Read | None]:
        """Where the last hidden states of stacks are read (None: at the tokens of its mask), in a training step whose logits nobody
        reads."""
        decoder = _decoder_of(self)
        if decoder is None or token_path(self) is not None:  # an encoder's: fastpeft.fused.head.token_heads
            return {}
        if self._has_one_mask(decoder):
            read = _read_by_loss(given, given.get("attention_mask"))
            return {} if read is None else {decoder: read._replace(alone=reads_labels_alone(self, head, decoder))}
        stacks = stacks_of(self, decoder)
        if stacks is None:
            return {}
        reads = {stacks.encoder: None} if read_at_tokens(stacks) else {}
        read = _read_by_loss(given, given.get("decoder_attention_mask"))
        return reads if read is None else reads | {decoder: read._replace(alone=read_at_labels(self, head, stacks))}

    def _has_one_mask(self, decoder: nn.Module | None) -> bool:
        """Whether ``attention_mask`` is of the tokens that have labels, and not of an encoder's. (BLIP-2 takes language models of both
        kinds.)"""
        apart = any(getattr(module.config, "is_encoder_decoder", True) for module in (self, decoder) if hasattr(module, "config"))
        return not apart or "decoder_input_ids" not in _signature(original_class(self)).parameters

    def _leaves_out_logits(self, given: dict[str, Any]) -> bool:
        """Whether nobody reads the logits of this call."""
        return self.lean_logits and returns_names(self, given) and _returns_logits.get() is not self

    def _lazy_head(self, given: dict[str, Any]) -> nn.Module | None:
        """The head, where this call's logits may be lazy: a training step with labels, which nothing traces or transforms, and afterwards
        nobody reads the logits or they can still be computed."""
        if not self.training or given.get("labels") is None:
            return None
        head = output_head(self)
        if head is None or torch.jit.is_tracing() or get_interpreter_stack() or not _loss_is_known(self):
            return None
        if self.lean_logits and self._leaves_loss_to() is not None:
            return None
        if why_not_flat(self, head) or not (self._leaves_out_logits(given) or (is_plain(head) and can_defer(head))):
            return None
        return head

    def _leaves_loss_to(self) -> nn.Module | None:
        """The encoder-decoder inside that gets the labels, as BLIP-2's T5 does; None where the loss is formed here."""
        names = labels_handed_to(original_class(self))
        inside = (getattr(self, name, None) for name in names)
        return next((m for m in inside if isinstance(m, FusedLanguageModel) and m.config.is_encoder_decoder), None)


# the model inside another one whose logits go to the other's caller
_returns_logits: ContextVar[nn.Module | None] = ContextVar("returns_logits", default=None)


@contextmanager
def _returning_logits(model: nn.Module | None) -> Iterator[None]:
    token = _returns_logits.set(_returns_logits.get() if model is None else model)
    try:
        yield
    finally:
        _returns_logits.reset(token)


def arguments_of(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; only those that have one where they do not fit: the model then says what is wrong."""
    if not args:
        return kwargs
    try:
        named = dict(_signature(original_class(model)).bind(model, *args, **kwargs).arguments)
    except TypeError:
        return kwargs
    return named | named.pop("kwargs", {})


def _decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The stack of layers whose last hidden states the head gets; in BLIP-2 it is inside a language model of its own."""
    with suppress(AttributeError, NotImplementedError):
        decoder = model.get_decoder()
        while isinstance(decoder, PreTrainedModel) and layers_of(decoder) is None and (inner := decoder.get_decoder()) is not decoder:
            decoder = inner
        return decoder
    return None


def may_leave_out_cache(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a model would fill a cache although nobody asks for one, as nobody reads it here."""
    takes = "use_cache" in _signature(original_class(model)).parameters
    return takes and given.get("use_cache") is None and given.get("past_key_values") is None


def leave_out(output: ModelOutput, name: str) -> None:
    """None is what readers of that name find."""
    OrderedDict.__delitem__(output, name)
    object.__setattr__(output, name, None)


def _read_by_loss(given: dict[str, Any], mask: Any) -> Read | None:
    """Positions that have a label, or whose next has one; None where that cannot be told. ``mask`` [B, L] of the tokens that labels are
    of."""
    labels, shifted = given["labels"], given.get("shift_labels")
    if labels.dim() != 2 or (mask is not None and not (isinstance(mask, Tensor) and mask.shape == labels.shape)):
        return None
    ignored = given.get("ignore_index", IGNORE_INDEX)
    labelled = (labels != ignored) | (next_labels(labels, ignore_index=ignored) != ignored)
    if shifted is not None:
        if shifted.numel() != labelled.numel():
            return None
        labelled = labelled | (shifted.to(labels.device).view_as(labelled) != ignored)
    return Read(mask, labelled)


def _loss_is_known(model: nn.Module) -> bool:
    """Whether ``loss_function``, where the model has one, is transformers' own."""
    loss = None
    with suppress(Exception):  # a property that fails where the model's forward does not use it
        loss = model.loss_function
    return loss is None or getattr(loss, "__module__", "").startswith("transformers.")


def _handed_out(output: Any, lean: bool) -> Any:
    """What a model returned, with no lazy logits in it: those named ``logits`` wait for a reader, or are left out where ``lean``."""
    if isinstance(output, LazyLogits):
        return output.read()
    if isinstance(output, ModelOutput):
        for name, value in list(output.items()):
            if not isinstance(value, LazyLogits):
                new = _handed_out(value, lean)
                if new is not value:
                    output[name] = new
            elif name != "logits" or value.is_read:
                output[name] = value.read()
            elif lean:
                leave_out(output, name)
            else:
                object.__setattr__(output, name, None)
                output = with_deferred_logits(output, value.read, value.head)
        return output
    if isinstance(output, tuple | list) and any(isinstance(item, LazyLogits | ModelOutput | tuple | list) for item in output):
        items = [_handed_out(item, lean) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output
