"""Model outputs whose logits are computed when they are read.

A training step reads the loss; the logits [B, L, V] are the largest tensor of a small batch, and most callers never read them. Some
do: a ``compute_loss`` of one's own, PEFT's CPT, ``return_dict=False``. :func:`with_deferred_logits` returns an output of the model's own
class that computes its logits at the first read, by whichever way they are read. Inside :func:`lean_logits` the caller
promises to read none: ``logits`` are None in training, and what only they need (other positions than labelled ones) is not computed;
but for a call that asks for a tuple, whose parts are known by their places.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpeft.methods.base import has_hooks


@contextmanager
def lean_logits(model: nn.Module) -> Iterator[None]:
    """The caller promises to read no logits of a training step of ``model``, or of the models in it: sets their ``lean_logits``."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [module.__dict__.get("lean_logits") for module in models]
    for module in models:
        module.lean_logits = True
    try:
        yield
    finally:
        for module, value in zip(models, before):
            if value is None:
                module.__dict__.pop("lean_logits", None)  # optimize or restore may have taken it back inside
            else:
                module.lean_logits = value


def returns_names(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether a call returns an output with names, of which one can be left out: parts of a tuple are known by their places."""
    asked = given.get("return_dict")
    return bool(getattr(model.config, "return_dict", True) if asked is None else asked)


def can_defer(*modules: nn.Module) -> bool:
    """True if what ``modules`` (a head) compute now they still compute after an optimizer step: nothing in them is trained, random or
    hooked, and nothing traces or transforms this call (torch.compile, torch.func, inference mode)."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or get_interpreter_stack():
        return False
    inside = [module for root in modules for module in root.modules()]
    if any(has_hooks(module) or (isinstance(module, nn.Dropout) and module.training and module.p > 0) for module in inside):
        return False
    return not any(p.requires_grad for root in modules for p in root.parameters())


def as_of_now(compute: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``compute`` for later, under the autocast and gradient mode of this moment."""
    cast = {"enabled": torch.is_autocast_enabled(device.type), "dtype": torch.get_autocast_dtype(device.type)}
    grad = torch.is_grad_enabled()

    def later() -> Tensor:
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device.type, **cast):
            return compute()

    return later


def is_deferred(output: ModelOutput) -> bool:
    """Whether the logits of ``output`` wait for a reader; none do while torch.compile traces."""
    return not torch.compiler.is_compiling() and "_read_logits" in object.__getattribute__(output, "__dict__")


def with_deferred_logits(output: ModelOutput, compute: Callable[[], Tensor], *modules: nn.Module) -> ModelOutput:
    """``output`` (built with any ``logits`` that is not None: it holds their place among the keys), whose logits ``compute()`` returns
    at the first read.

    They are the model's own: computed under the autocast and gradient mode of this call, with autograd attached. ``modules`` compute them;
    :func:`can_defer` must have agreed. RuntimeError at the read if their weights were changed in place since.
    """
    weights = [(p, p._version) for module in modules for p in module.parameters()]
    compute_then = as_of_now(compute, next((p.device for module in modules for p in module.parameters()), torch.device("cpu")))

    def read() -> Tensor:
        if any(p._version != version for p, version in weights):
            raise RuntimeError("the head's weights were changed in place since this output was made: read output.logits before that")
        return compute_then()

    own = type(output)
    output.__class__ = _deferred(own)
    object.__setattr__(output, "_read_logits", read)
    OrderedDict.__setitem__(output, "logits", None)
    return output


@functools.cache
def _deferred(own: type[ModelOutput]) -> type[ModelOutput]:
    """``own`` while its logits are not computed; an instance becomes one of ``own`` at the first read. Under ``own``'s name."""

    def settle(output: ModelOutput, *value: Tensor) -> ModelOutput:
        """``output`` as one of ``own``, with the logits given, or computed."""
        if type(output) is own:  # a method bound before, or another thread's
            return output
        logits = value[0] if value else object.__getattribute__(output, "_read_logits")()
        output.__class__ = own
        output.__dict__.pop("_read_logits", None)
        if logits is None:
            object.__setattr__(output, "logits", None)
        else:
            output.logits = logits
        return output

    def reading(name: str) -> Callable:
        def method(self, *args, **kwargs):
            return getattr(settle(self), name)(*args, **kwargs)

        return method

    def get_item(self, key):
        names = list(self)
        if isinstance(key, str) and key in names:
            name = key
        elif isinstance(key, int) and -len(names) <= key < len(names):
            name = names[key]
        else:  # a slice, or an error
            name = "logits"
        return settle(self)[key] if name == "logits" else OrderedDict.__getitem__(self, name)

    def get(self, key, default=None):
        return self[key] if key in list(self) else default

    def set_item(self, key, value):
        own.__setitem__(settle(self, value) if key == "logits" else self, key, value)

    def set_attribute(self, name, value):
        if name == "logits":  # None leaves the item, as ModelOutput does
            self = settle(self) if value is None else settle(self, value)
        own.__setattr__(self, name, value)

    def get_attribute(self, name):
        return vars(settle(self)) if name == "__dict__" else object.__getattribute__(self, name)

    body = {name: reading(name) for name in READ_EVERYTHING}
    body |= {"__getitem__": get_item, "get": get, "__setitem__": set_item, "__setattr__": set_attribute, "__getattribute__": get_attribute}
    body |= {"logits": property(lambda self: settle(self).logits), "__hash__": own.__hash__}
    body["__new__"] = lambda cls, *args, **kwargs: own(*args, **kwargs)  # whoever builds one like it (accelerate, FSDP) gives values
    cls = type(f"Deferred{own.__name__}", (own,), body)  # registers itself as a pytree node, under this name
    cls.__name__, cls.__qualname__, cls.__module__ = own.__name__, own.__qualname__, own.__module__
    return cls


# what reads values without asking for one by its name
READ_EVERYTHING = (
    "__reduce__", "__reduce_ex__", "__delattr__", "__eq__", "__ne__", "__repr__", "__or__", "__ror__", "__ior__",
    "copy", "items", "values", "popitem", "move_to_end", "to_tuple",
)  # fmt: skip
