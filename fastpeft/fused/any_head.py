"""Any model of transformers with a language-model head: its own forward, whose loss forms logits at labelled positions only."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._C._functorch import get_interpreter_stack
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpeft.fused.flatten import why_not_flat
from fastpeft.fused.lazy_logits import LazyLogits, is_plain, lazy_head
from fastpeft.fused.outputs import can_defer, with_deferred_logits
from fastpeft.registry import fuses_code, replaced_class, signature_of_replaced


def takes_labels(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` are models whose forward, as transformers wrote it, takes labels. (A forward of somebody else's may hand
    logits to what no function of PyTorch's announces, an autograd Function of its own.)"""
    if not issubclass(cls, PreTrainedModel) or not cls.forward.__module__.startswith("transformers."):
        return False
    return "labels" in _signature(cls).parameters


@cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes logits, None where there is none: what ``get_output_embeddings`` gives, if it is a part of the model."""
    with suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            return head
    return None


@fuses_code(takes_labels, applies=lambda module: output_head(module) is not None, computes_only=output_head)
class FusedLanguageModel:
    """transformers' own forward, inside which the head's logits are lazy (:mod:`fastpeft.fused.lazy_logits`): the loss forms them at labelled
    positions, and the others are formed when somebody reads them. ``lean_logits``: nobody does; then logits are None."""

    lean_logits = False

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if _loss_is_known(module) else "its loss_function is its own, and takes logits"

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        head = None if torch.compiler.is_compiling() else self._lazy_head(args, kwargs)
        if head is None:
            return super().forward(*args, **kwargs)
        with lazy_head(head):
            output = super().forward(*args, **kwargs)
        return _handed_out(output, self.lean_logits)

    def _lazy_head(self, args: tuple, kwargs: dict[str, Any]) -> nn.Module | None:
        """The head, where this call's logits may be lazy: a training step with labels, which nothing traces or transforms, and afterwards
        nobody reads the logits or they can still be computed."""
        if not self.training or not _has_labels(replaced_class(type(self)) or type(self), self, args, kwargs):
            return None
        head = output_head(self)
        if head is None or torch.jit.is_tracing() or get_interpreter_stack() or not _loss_is_known(self):
            return None
        if why_not_flat(self, head) or not (self.lean_logits or (is_plain(head) and can_defer(head))):
            return None
        return head


def _has_labels(cls: type[nn.Module], model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    if not args:
        return kwargs.get("labels") is not None
    try:
        return _signature(cls).bind(model, *args, **kwargs).arguments.get("labels") is not None
    except TypeError:  # the model says what is wrong
        return False


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
                OrderedDict.__delitem__(output, name)
                object.__setattr__(output, name, None)
            else:
                object.__setattr__(output, name, None)
                output = with_deferred_logits(output, value.read, value.head)
        return output
    if isinstance(output, tuple | list) and any(isinstance(item, LazyLogits | ModelOutput | tuple | list) for item in output):
        items = [_handed_out(item, lean) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output


