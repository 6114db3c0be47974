"""Any stack of decoder layers of transformers, its padding left out while the layers run.

Where nobody reads a stack's output at padding, its layers see real tokens alone, [1, T, C] in place of [B, L, C]. The model's own forward
runs: it embeds, makes masks and rotary tables for [B, L], and calls its layers, in whose place stand :class:`OnTokens`, which call them
on real tokens. Attention functions get padded queries, keys and values, as the masks are (:mod:`fastpeft.fused.attention_interface`), so
whatever a mask says is as it was.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.fused.attention_interface import LAYOUT, FusedInterfaceAttention, reads_interface
from fastpeft.fused.flatten import why_not_flat
from fastpeft.fused.last_layer import at_rows, handing_on, run_handing_on
from fastpeft.fused.layout import LastLayout, Layout, self_layout
from fastpeft.fused.lower import run_stack, standing
from fastpeft.fused.state_reads import ends_row_by_row
from fastpeft.ops._autocast import first_order
from fastpeft.registry import fuses, replaced_class, signature_of_replaced

LOOPS = frozenset(("layers", "h"))  # what a stack calls its layers
FULL = 0.95  # of a batch: with more real tokens than that, laying them out costs what they save
_reading = threading.local()


class Read(NamedTuple):
    """Where the last hidden state of a stack is read: at tokens, 1 in ``mask`` [B, L] (None: all are), and where ``labelled`` [B, L];
    ``alone``: at these alone."""

    mask: Tensor | None
    labelled: Tensor
    alone: bool = False

    def under(self, mask: Any) -> Read:
        """The same with the mask that the stack itself gets, where that is one over tokens; models with images may have made it."""
        return self._replace(mask=mask) if isinstance(mask, Tensor) and mask.shape == self.labelled.shape else self

    def positions(self) -> Tensor:
        """[B, L] bool, on the CPU: what a stack computes."""
        labelled = self.labelled.cpu()
        return torch.ones_like(labelled) if self.mask is None else labelled | (self.mask.cpu() != 0)

    def outputs(self) -> Tensor:
        """[B, L] bool, on the CPU: what is read of it."""
        return self.labelled.cpu() if self.alone else self.positions()

    def on_padding(self) -> bool:
        return self.mask is not None and bool((self.labelled.cpu() & (self.mask.cpu() == 0)).any())


@contextmanager
def read_at(stack: nn.Module | None, read: Read | None) -> Iterator[None]:
    """Inside, and on this thread, the last hidden state of ``stack`` is read where ``read`` says; None: anywhere."""
    before = getattr(_reading, "now", None)
    _reading.now = None if stack is None or read is None else (stack, read)
    try:
        yield
    finally:
        _reading.now = before


def read_of(stack: nn.Module, given: dict[str, Any]) -> Read | None:
    """Where the last hidden state of ``stack`` is read in this call, with ``input_ids`` or ``inputs_embeds`` ``given``; None: anywhere, as
    far as is known."""
    now = getattr(_reading, "now", None)
    if now is None or now[0] is not stack:
        return None
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is None or tokens.shape[:2] != now[1].labelled.shape:
        return None
    return now[1].under(given.get("attention_mask"))


def loops_over_layers(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` are models whose forward, as transformers wrote it, calls ``self.layers`` (or GPT-2's ``self.h``) and is
    no model with a head."""
    if not issubclass(cls, PreTrainedModel) or not cls.forward.__module__.startswith("transformers."):
        return False
    code = inspect.unwrap(cls.forward).__code__
    arguments = code.co_varnames[: code.co_argcount]
    return len(LOOPS & set(code.co_names)) == 1 and "attention_mask" in arguments and "labels" not in arguments


def layers_of(stack: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The layers of a stack, and the name by which it calls them."""
    names = LOOPS & set(inspect.unwrap((replaced_class(type(stack)) or type(stack)).forward).__code__.co_names)
    for name in names:
        layers = stack._modules.get(name)
        if isinstance(layers, nn.ModuleList) and len(layers) and all(isinstance(m, GradientCheckpointingLayer) for m in layers):
            return name, layers
    return None


@fuses(rule=loops_over_layers, applies=lambda module: layers_of(module) is not None)
class FusedTextStack:
    """transformers' own forward, whose layers see real tokens alone where nobody reads the others (:func:`read_at`) and each layer can do
    without."""

    @staticmethod
    def computes_only(module: nn.Module) -> nn.Module | None:
        """Nothing: its layers compute."""
        return None

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        if args:  # GPT-NeoX's model hands token ids by position
            names = list(inspect.signature(super().forward).parameters)
            if len(args) > len(names):
                return super().forward(*args, **kwargs)
            kwargs = dict(zip(names, args)) | kwargs
        return run_stack(self, kwargs, self._run)

    def _run(self, options: dict[str, Any]) -> Any:
        own = super().forward
        read = None if torch.compiler.is_compiling() else read_of(self, options)
        layout = None if read is None else self._layout(read, options)
        if layout is None:
            return own(**options)
        with _on_tokens(self, layout, read):
            return own(**options | {"use_cache": False})

    def _layout(self, read: Read, options: dict[str, Any]) -> Layout | None:
        """Where the real tokens lie; None where every token is computed."""
        if options.get("past_key_values") is not None or options.get("use_cache"):
            return None
        if options.get("attention_mask") is None:  # then position_ids may mark packed samples, but only where there is no cache
            return None
        if any(asked_for(self, what, options) for what in ("attentions", "hidden_states", "router_logits")):
            return None
        if (name := self.config._attn_implementation) not in ("sdpa", "eager"):
            return None  # others get masks of other kinds
        if name != "sdpa" and read.on_padding():
            return None  # what is padding on the left attends to nothing, which is every key in "eager"
        _, layers = layers_of(self) or ("", None)
        if layers is None or why_not_flat(self, layers, by_code=True) or not all(map(hands_on_layouts, layers.modules())):
            return None
        if any(map(checkpoints, layers)) and any(handing_on(type(layer)) is not None for layer in layers):
            return None
        host = read.positions()
        fewest = read.outputs() if ends_row_by_row(replaced_class(type(self))) else host
        if not (bool(host.any()) and int(fewest.sum()) <= FULL * host.numel()):
            return None
        tokens = options.get("input_ids") if options.get("inputs_embeds") is None else options["inputs_embeds"]
        return self_layout(tuple(host.shape), None if bool(host.all()) else host, tokens.device)


def asked_for(stack: nn.Module, what: str, options: dict[str, Any]) -> bool:
    """Whether the caller of a stack, or else its configuration, asks for ``output_<what>``."""
    value = options.get(f"output_{what}")
    return bool(getattr(stack.config, f"output_{what}", False) if value is None else value is not False)


def hands_on_layouts(module: nn.Module) -> bool:
    """Whether ``module``, if it is an attention layer, looks its function up where layouts are understood."""
    return isinstance(module, FusedInterfaceAttention) or not reads_interface(replaced_class(type(module)) or type(module))


def checkpoints(layer: nn.Module) -> bool:
    """Whether a layer runs again in backward, by its ``__call__``."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


class _Flat(Tensor):
    """[B, L, C], zero where no token lies, of which only the tokens [1, T, C] are there until a function needs more."""

    tokens: Tensor
    place: Layout

    @classmethod
    def of(cls, tokens: Tensor, layout: Layout) -> _Flat:
        """Padded ``tokens``, attached to autograd, for those who differentiate it behind PyTorch's functions: an autograd Function."""
        flat = _Padded.apply(tokens, layout)
        flat.tokens, flat.place = tokens, layout
        return flat

    def read(self) -> Tensor:
        return self.place.pad(self.tokens)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(_Flat, _Flat.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} got hidden states without padding; please report this, and call fastpeft.restore(model)")

    __repr__ = object.__repr__


class _Padded(Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, layout: Layout) -> _Flat:
        ctx.layout = layout
        shape = (layout.rows, layout.columns, tokens.shape[-1])
        return Tensor._make_wrapper_subclass(_Flat, shape, dtype=tokens.dtype, device=tokens.device)

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor):
        return ctx.layout.unpad(grad)[None], None


@contextmanager
def _on_tokens(stack: nn.Module, layout: Layout, read: Read) -> Iterator[None]:
    """Inside, and on this thread, the layers of ``stack`` are called on real tokens."""
    at_last = read.alone and ends_row_by_row(replaced_class(type(stack)) or type(stack))
    call = StackCall(layout, read.outputs() if at_last else None)
    name, own = layers_of(stack)
    layers = list(getattr(stack, name))  # others may stand for them already
    with standing(stack, [OnTokens(layer, call, names_behind(type(own[0])), last=layer is layers[-1]) for layer in layers], name):
        yield


class StackCall:
    """One call of a stack: where its tokens lie, and what its layers' arguments are on tokens. ``outputs`` [B, L] bool: the only ones of
    the last layer that are read (None: all)."""

    def __init__(self, layout: Layout | None, outputs: Tensor | None = None):
        self.layout, self.outputs, self.thread = layout, outputs, threading.get_ident()
        self.known: dict[int, tuple[Any, Any]] = {}

    def at_last(self, device: torch.device) -> LastLayout | None:
        """Where the last layer's outputs are read; None where all are."""
        return None if self.outputs is None else LastLayout.of(self.layout, self.outputs, device)

    def arguments(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A layer's arguments behind its hidden states, on tokens; None where one is of no known kind. ``names`` of those by position."""
        if len(args) > len(names):
            return None
        try:
            named = {name: self._argument(name, value) for name, value in kwargs.items()}
            return tuple(map(self._argument, names, args)), named
        except _Unknown:
            return None

    def _argument(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if name == "attention_mask" and isinstance(value, Tensor) and value.dim() == 4:
            return value
        if name.startswith("position_embeddings") and isinstance(value, tuple) and all(isinstance(t, Tensor) for t in value):
            return tuple(self._on_tokens(t, 3) for t in value)
        if name == "position_embeddings" and isinstance(value, Tensor):
            return self._on_tokens(value, 3)
        if name == "position_ids" and isinstance(value, Tensor):
            return self._on_tokens(value, 2)
        raise _Unknown

    def _on_tokens(self, table: Tensor, dims: int) -> Tensor:
        """[B or 1, L, ...] -> [1, T, ...]."""
        kept = self.known.get(id(table))
        if kept is None:
            B, L = self.layout.rows, self.layout.columns
            if table.dim() != dims or table.shape[0] not in (1, B) or table.shape[1] != L:
                raise _Unknown
            full = table.expand(B, *table.shape[1:]).reshape(B, L, -1)
            kept = self.known[id(table)] = table, self.layout.unpad(full).view(1, -1, *table.shape[2:])
        return kept[1]


@cache
def names_behind(cls: type[nn.Module]) -> list[str]:
    """The names of a layer's arguments behind its hidden states."""
    return list(inspect.signature(cls.forward).parameters)[2:]


class _Unknown(Exception):
    """An argument that a layer may read in a way of its own."""


class OnTokens:
    """Stands for a layer in its stack's loop: calls it on real tokens. Whatever else is asked of it, the layer answers. The last one's
    output is padded at once: what follows reads it, and an autograd Function that kept a :class:`_Flat` could not hand it to hooks on
    saved tensors (profiles)."""

    def __init__(self, layer: nn.Module, call: StackCall, names: list[str], last: bool):
        self.layer, self.call, self.names, self.last = layer, call, names, last

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call, layer = self.call, self.layer
        if threading.get_ident() != call.thread:
            return layer(hidden, *args, **kwargs)
        given = call.arguments(self.names, args, kwargs)
        if given is None:
            if isinstance(hidden, _Flat):
                hidden = hidden.read()
            return layer(hidden, *args, **kwargs)
        tokens = hidden.tokens if isinstance(hidden, _Flat) else call.layout.unpad(hidden)[None]
        last = self.at_last(tokens.device) if self.last else None
        layout, forward = (call.layout, None) if last is None else (last, at_rows(type(layer)))
        output = self.run(forward, tokens, *given[0], **given[1], **{LAYOUT: layout})
        hidden, *others = (output,) if isinstance(output, Tensor) else output
        hidden = (call.layout if last is None else last.outputs).pad(hidden) if self.last else _Flat.of(hidden, call.layout)
        return hidden if isinstance(output, Tensor) else (hidden, *others)

    def run(self, forward: FunctionType | None, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer, by a ``forward`` made of its own (None: by its own, which hands on where tokens lie)."""
        return run_handing_on(self.layer, tokens, *args, **kwargs) if forward is None else forward(self.layer, tokens, *args, **kwargs)

    def at_last(self, device: torch.device) -> LastLayout | None:
        """How the last layer runs at the rows alone that are read; None where it runs as it is."""
        layer = self.layer
        if not isinstance(layer, GradientCheckpointingLayer) or checkpoints(layer) or at_rows(type(layer)) is None:
            return None
        return self.call.at_last(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)
