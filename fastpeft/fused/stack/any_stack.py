"""Any stack of layers of transformers, its padding left out while the layers run.

Where nobody reads a stack's output at padding, its layers see real tokens alone, [1, T, C] in place of [B, L, C]. The model's own forward
runs: it embeds, makes masks and rotary tables for [B, L], and calls its layers, in whose place stand :class:`OnTokens`, which call them
on real tokens. Attention functions get padded queries, keys and values, as the masks are (:mod:`fastpeft.fused.attention.interface`), so
whatever a mask says is as it was. A decoder that attends to an encoder's states gets those of real tokens, too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.forms import as_written, cache_by_forward, is_of_transformers
from fastpeft.fused.attention.interface import FusedInterfaceAttention, reads_interface
from fastpeft.fused.attention.tokens import LAYOUT
from fastpeft.fused.code.state_reads import LAST, ends_row_by_row
from fastpeft.fused.layout import FULL, LastLayout, Layout, self_layout
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.last_layer import at_rows, handing_on, run_handing_on
from fastpeft.fused.stack.layer_arguments import BIASES, SOURCE_MASK, STATES, StackCall
from fastpeft.fused.stack.lower import run_stack, standing
from fastpeft.fused.stack.mixers import OnPadded, may_be_given, mixer_in, mixes_by_recurrence, takes_rest
from fastpeft.fused.stack.row_wise import hands_states_on, mixes_in_float16
from fastpeft.methods.base import must_be_called
from fastpeft.ops._autocast import first_order
from fastpeft.registry import fuses, original_class, replaced_class, signature_of_replaced

LOOPS = frozenset(("layers", "h", "block", "blocks"))  # what a stack calls its layers
CAUSAL_MASK = "create_causal_mask"
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

    def positions(self, causal: bool = False) -> Tensor:
        """[B, L] bool, on the CPU: what a stack computes. ``causal``: no token attends to a later one, so that nothing behind the last one
        that is read is computed."""
        labelled = self.labelled.cpu()
        computed = torch.ones_like(labelled) if self.mask is None else labelled | (self.mask.cpu() != 0)
        return computed & labelled.flip(1).cumsum(1).flip(1).bool() if self.alone and causal else computed

    def outputs(self) -> Tensor:
        """[B, L] bool, on the CPU: what is read of it."""
        return self.labelled.cpu() if self.alone else self.positions()

    def on_padding(self) -> bool:
        return self.mask is not None and bool((self.labelled.cpu() & (self.mask.cpu() == 0)).any())


def of_tokens(mask: Any) -> Read | None:
    """Where the states of an encoder are read: at tokens, 1 in ``mask`` [B, L]. None where it says nothing, or a sample has no token: who
    attends to it attends to all of its padding alike."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool((mask != 0).any(1).all()):
        return None
    return Read(mask, mask != 0)


class _Now(NamedTuple):
    """What is known on a thread. ``stacks``: where the last hidden state of each is read, None: at the tokens of its mask; ``at_tokens``:
    those of them that computed no more."""

    stacks: dict[nn.Module, Read | None]
    at_tokens: set[nn.Module]


@contextmanager
def read_at(stacks: dict[nn.Module, Read | None]) -> Iterator[set[nn.Module]]:
    """Inside, and on this thread, the last hidden state of each stack is read where its :class:`Read` says, or at the tokens of its mask
    (None); those of others anywhere. Gives the stacks that have left their padding out, as they do."""
    before = getattr(_reading, "now", None)
    _reading.now = now = _Now(stacks, set())
    try:
        yield now.at_tokens
    finally:
        _reading.now = before


def read_of(stack: nn.Module, given: dict[str, Any]) -> Read | None:
    """Where the last hidden state of ``stack`` is read in this call, with ``input_ids`` or ``inputs_embeds`` ``given``; None: anywhere, as
    far as is known."""
    now = getattr(_reading, "now", None)
    if now is None or stack not in now.stacks:
        return None
    tokens, read, mask = _tokens(given), now.stacks[stack], given.get("attention_mask")
    read = of_tokens(mask) if read is None else read.under(mask)
    return None if read is None or tokens is None or tokens.shape[:2] != read.labelled.shape else read


def loops_over_layers(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` are models whose forward, as transformers wrote it, calls ``self.layers`` (or GPT-2's ``self.h``) and is
    no model with a head."""
    if not issubclass(cls, PreTrainedModel) or not is_of_transformers(cls):
        return False
    code = as_written(cls.forward).__code__
    arguments = code.co_varnames[: code.co_argcount]
    return len(LOOPS & set(code.co_names)) == 1 and "attention_mask" in arguments and "labels" not in arguments


def layers_of(stack: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The layers of a stack, and the name by which it calls them."""
    names = LOOPS & set(as_written((original_class(stack)).forward).__code__.co_names)
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
        no_cache = {"use_cache": False} if "use_cache" in inspect.signature(own).parameters else {}
        with _on_tokens(self, layout, read):
            output = own(**options | no_cache)
        _reading.now.at_tokens.add(self)
        if isinstance(getattr(output, LAST, None), _Flat):  # the last layer was dropped
            output[LAST] = output[LAST].read()
        return output

    def _layout(self, read: Read, options: dict[str, Any]) -> Layout | None:
        """Where the real tokens lie; None where every token is computed."""
        _, layers = layers_of(self) or ("", None)
        if layers is None or self._asks_for_more(read, options) or self._needs_padding(layers, read, options):
            return None
        source = self._source(options)
        if options.get(STATES) is not None and (source is None or not all(map(hands_states_on, layers))):
            return None
        host = read.positions(is_causal(self))
        at_last = ends_row_by_row(replaced_class(type(self))) and at_rows(type(layers[-1])) is not None
        fewest = read.outputs() if at_last else host
        few = int(fewest.sum()) <= FULL * host.numel() or (source is not None and source.tokens <= FULL * source.rows * source.columns)
        if not (bool(host.any()) and few):
            return None
        layout = self_layout(tuple(host.shape), None if bool(host.all()) else host, _tokens(options).device)
        return replace(layout, source=source)

    def _asks_for_more(self, read: Read, options: dict[str, Any]) -> bool:
        """Whether more is asked for than a last hidden state, or may be."""
        if options.get("past_key_values") is not None or options.get("use_cache"):
            return True
        # without a mask, position_ids may mark packed samples, but only where there is no cache
        known = (read.alone or options.get(STATES) is not None) and options.get("position_ids") is None
        if options.get("attention_mask") is None and not known:
            return True
        return any(asked_for(self, what, options) for what in ("attentions", "hidden_states", "router_logits"))

    def _needs_padding(self, layers: nn.ModuleList, read: Read, options: dict[str, Any]) -> bool:
        """Whether the layers, or their attention, read padding."""
        if (name := self.config._attn_implementation) not in ("sdpa", "eager"):
            return True  # others get masks of other kinds
        # what is padding on the left attends to nothing, which is every key in "eager", and where a bias is added
        if (name != "sdpa" or BIASES[0] in names_behind(type(layers[0]))) and read.on_padding():
            return True
        if why_not_flat(self, layers, by_code=True) or not all(map(hands_on_layouts, layers.modules())):
            return True
        if any(not may_be_made_to_hand_on(layer) for layer in layers) or not _may_mix(self, layers, read, options):
            return True
        return mixes_in_float16(layers) and _is_float16(self, _tokens(options).device)

    def _source(self, options: dict[str, Any]) -> Layout | None:
        """Where the tokens of the encoder's states lie that this call gets; None where there are none, or that is not known."""
        states, mask = options.get(STATES), options.get(SOURCE_MASK)
        if not isinstance(states, Tensor) or states.dim() != 3:
            return None
        if mask is None:
            return Layout(*states.shape[:2], None)
        read = of_tokens(mask)
        if read is None or mask.shape != states.shape[:2]:
            return None
        return self_layout(tuple(mask.shape), read.labelled.cpu(), states.device)


def _tokens(given: dict[str, Any]) -> Tensor | None:
    """The tokens that a stack is called with."""
    return given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]


def is_causal(stack: nn.Module) -> bool:
    """Whether the tokens of a stack attend to none that come later, but where a mask says so: it makes a causal mask."""
    names = as_written((original_class(stack)).forward).__code__.co_names
    return CAUSAL_MASK in names and getattr(stack, "is_decoder", True) and getattr(stack.config, "is_causal", True)


def _is_float16(stack: nn.Module, device: torch.device) -> bool:
    """Whether the hidden states of a stack may be float16."""
    lowered = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return lowered or any(p.dtype == torch.float16 for p in stack.parameters())


def asked_for(stack: nn.Module, what: str, options: dict[str, Any]) -> bool:
    """Whether the caller of a stack, or else its configuration, asks for ``output_<what>``."""
    value = options.get(f"output_{what}")
    return bool(getattr(stack.config, f"output_{what}", False) if value is None else value is not False)


def hands_on_layouts(module: nn.Module) -> bool:
    """Whether ``module``, if it is an attention layer, looks its function up where layouts are understood."""
    return isinstance(module, FusedInterfaceAttention) or not reads_interface(original_class(module))


def checkpoints(layer: nn.Module) -> bool:
    """Whether a layer runs again in backward, by its ``__call__``."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def may_be_made_to_hand_on(layer: nn.Module) -> bool:
    """Whether a layer hands on where tokens lie, or another forward, made of its own, can do so in its place."""
    return handing_on(type(layer)) is None or not (checkpoints(layer) or must_be_called(layer))


def _may_mix(stack: nn.Module, layers: nn.ModuleList, read: Read, options: dict[str, Any]) -> bool:
    """Whether mixers in layers (:mod:`fastpeft.fused.stack.mixers`) may get padded states: no token that is computed reads one that is
    not."""
    mixing = [layer for layer in layers if mixer_in(layer) is not None]
    if not mixing:
        return True
    mask = options.get("attention_mask")
    over_keys = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    if any(map(checkpoints, mixing)) or read.on_padding() or not (over_keys and is_causal(stack)):
        return False
    return mask is None or len(mask) > 1 or not any(map(mixes_by_recurrence, mixing))


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
    at_last = read.alone and ends_row_by_row(original_class(stack))
    by_mask = not read.alone and layout.source is None and read.mask is not None and is_causal(stack)
    call = StackCall(layout, read.outputs() if at_last else None, None if by_mask else is_causal(stack))
    name, own = layers_of(stack)
    layers = list(getattr(stack, name))  # others may stand for them already
    with standing(stack, [OnTokens(layer, call, names_behind(type(own[0])), last=layer is layers[-1]) for layer in layers], name):
        yield


@cache_by_forward
def names_behind(cls: type[nn.Module]) -> list[str]:
    """The names of a layer's arguments behind its hidden states."""
    return list(inspect.signature(cls.forward).parameters)[2:]


class OnTokens:
    """Stands for a layer in its stack's loop: calls it on real tokens. Whatever else is asked of it, the layer answers. The last one's
    output is padded at once: what follows reads it, and an autograd Function that kept a :class:`_Flat` could not hand it to hooks on
    saved tensors (profiles)."""

    def __init__(self, layer: nn.Module, call: StackCall, names: list[str], last: bool):
        self.layer, self.call, self.names, self.last = layer, call, names, last
        self.mixer = mixer_in(layer) if isinstance(layer, nn.Module) else None

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call, layer = self.call, self.layer
        if threading.get_ident() != call.thread:
            return layer(hidden, *args, **kwargs)
        given = call.arguments(self.names, args, kwargs, layer) if self.mixer is None else self._for_mixer(args, kwargs)
        if given is None:
            if isinstance(hidden, _Flat):
                hidden = hidden.read()
            return layer(hidden, *args, **kwargs)
        tokens = hidden.tokens if isinstance(hidden, _Flat) else call.layout.unpad(hidden)[None]
        last = self.at_last(tokens.device) if self.last else None
        layout, forward = (call.layout, None) if last is None else (last, at_rows(type(layer)))
        with self._padding(given):
            output = self.run(forward, tokens, *given[0], **given[1], **{LAYOUT: layout})
        hidden, *others = (output,) if isinstance(output, Tensor) else output
        hidden = (call.layout if last is None else last.outputs).pad(hidden) if self.last else _Flat.of(hidden, call.layout)
        return hidden if isinstance(output, Tensor) else (hidden, *others)

    def _for_mixer(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """What the layer is given, as it is."""
        return (args, kwargs) if may_be_given(self.layer, self.mixer, dict(zip(self.names, args)) | kwargs) else None

    def _padding(self, given: tuple[tuple, dict[str, Any]]) -> AbstractContextManager:
        """Inside, the layer's mixer gets padded states."""
        if self.mixer is None:
            return nullcontext()
        rest = () if takes_rest(original_class(self.layer), self.mixer) else given[1].keys() - set(self.names)
        mixer = OnPadded(getattr(self.layer, self.mixer), self.call.layout, [*given[0], *given[1].values()], rest)
        return standing(self.layer, mixer, self.mixer)

    def run(self, forward: FunctionType | None, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer, by a ``forward`` made of its own (None: by its own, which hands on where tokens lie)."""
        return run_handing_on(self.layer, tokens, *args, **kwargs) if forward is None else forward(self.layer, tokens, *args, **kwargs)

    def at_last(self, device: torch.device) -> LastLayout | None:
        """How the last layer runs at the rows alone that are read; None where it runs as it is."""
        layer = self.layer
        if not isinstance(layer, GradientCheckpointingLayer) or checkpoints(layer) or must_be_called(layer):
            return None
        if at_rows(type(layer)) is None:
            return None
        return self.call.at_last(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)
