"""Models whose head reads one row of each sample of the last hidden state: classifiers of images and texts.

Nobody sees the other rows, in training or not, so their last layer computes that row alone: queries, output projection, feed-forward and
norms; keys and values it computes for all (:mod:`fastpeft.fused.last_layer`). Where nothing is kept in a cache, and the mask says that
nobody attends to a token, no layer computes it: padding (:mod:`fastpeft.fused.any_stack`). The model's own forward runs, and in its loop
modules that stand for its layers.
"""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from fastpeft.fused.any_head import arguments_of, may_have_output_head
from fastpeft.fused.any_stack import (
    OnTokens,
    Read,
    StackCall,
    checkpoints,
    hands_on_layouts,
    may_be_made_to_hand_on,
    names_behind,
    read_at,
)
from fastpeft.fused.attention_interface import FusedInterfaceAttention
from fastpeft.fused.attention_masks import read_mask
from fastpeft.fused.attention_tokens import LAYOUT
from fastpeft.fused.flatten import is_row_wise, why_not_flat
from fastpeft.fused.last_layer import MASK, at_rows
from fastpeft.fused.layout import FULL, LastLayout, self_layout
from fastpeft.fused.lower import standing
from fastpeft.fused.row_wise import is_row_wise_code
from fastpeft.fused.shared_input import tree_of
from fastpeft.fused.stack_llama import FusedLlamaModel
from fastpeft.fused.state_reads import (
    BACK,
    FIRST,
    LAST_TOKEN,
    LOSS,
    OUT,
    Through,
    Unknown,
    argument_uses,
    code_class,
    may_pool,
    state_of,
)  # fmt: skip
from fastpeft.methods.base import has_hooks, watched_globally
from fastpeft.ops._private import is_fake
from fastpeft.registry import fuses, path_of, signature_of_replaced
from fastpeft.savings import on
from fastpeft.static_shapes import sizes

NOTE = "the head reads one row of each sample of the last hidden state: the last layer computes no other, and no layer computes padding"
CACHES = ("past_key_values", "past_key_value", "layer_past")
WRAPPER = "peft.utils.other.ModulesToSaveWrapper"


@dataclass
class Pooled:
    """A model whose head reads one row of each sample of the last hidden state: the first one, or that of the last token (``last_token``).

    ``stack``, and the name of its layers. ``row_wise``: modules that get that row alone then; ``called``: those between, which take it
    out or hand it on. ``expanded``: (module, name) of those whose output must have the shape of the batch."""

    stack: nn.Module
    layers: str
    last_token: bool = False
    reads_text_config: bool = False
    gives_loss: bool = False
    row_wise: list[nn.Module] = field(default_factory=list)
    called: list[nn.Module] = field(default_factory=list)
    expanded: list[tuple[nn.Module, str]] = field(default_factory=list)


def pooled_read(model: nn.Module) -> Pooled | None:
    """How ``model`` reads one row of each sample of its stack's last hidden state; None where it reads others too, hands the state out, or
    that cannot be told."""
    try:
        return _Resolver(model).found()
    except Unknown:
        return None


class _Resolver:
    """Follows the last hidden state from a model's stack out, through the modules that this model has."""

    def __init__(self, model: nn.Module):
        self.model, self.pooled = model, None

    def found(self) -> Pooled | None:
        reads = self.walk(self.model)
        self.pooled.called.remove(self.model)
        self.pooled.last_token = reads == {LAST_TOKEN}
        if self.pooled.last_token:
            tree = tree_of(inspect.unwrap(code_class(self.model).forward))
            self.pooled.reads_text_config = "self.config.get_text_config().pad_token_id" in ast.unparse(tree)
            if not any(module is self.model for module, _ in self.pooled.expanded):
                raise Unknown  # what is indexed would have one row
        return self.pooled if reads in ({FIRST}, {LAST_TOKEN}) else None

    def walk(self, module: nn.Module) -> set[str]:
        """What is read of the state that ``module`` has from its stack, in it or below; ``OUT`` where it hands the state on."""
        state = self._known(state_of(code_class(module)))
        if state.layers is not None:
            layers, dropped = module._modules.get(state.layers), getattr(module, "layerdrop", None)
            if (state.skips and dropped != 0) or not isinstance(layers, nn.ModuleList):
                raise Unknown
            if {isinstance(layer, GradientCheckpointingLayer) for layer in layers} != {True}:
                raise Unknown
            self.pooled, reads = Pooled(module, state.layers), {OUT}
        else:
            reads = self.walk(module.get_submodule(state.inner))
        self.pooled.called.append(module)
        return (reads - {OUT}) | (self.settle(module, state.uses) if OUT in reads else set())

    @staticmethod
    def _known(value: Any) -> Any:
        if value is None:
            raise Unknown
        return value

    def settle(self, module: nn.Module, uses: frozenset[str | Through]) -> set[str]:
        """What ``uses`` in the forward of ``module`` read."""
        reads: set[str] = set()
        through = [use for use in uses if isinstance(use, Through)]
        for use in uses - set(through):
            if use == LOSS:
                self.pooled.gives_loss = True
            elif use == BACK:
                self.pooled.expanded.append((module, self._known(through[0] if len(through) == 1 else None).name))
            else:
                reads.add(use)
        for use in through:
            reads |= self.through(module, use)
        return reads

    def through(self, module: nn.Module, use: Through) -> set[str]:
        inner = getattr(module, use.name, None)
        if inner is None:
            return set()
        if not isinstance(inner, nn.Module):
            raise Unknown
        own = inner.original_module if path_of(type(inner)) == WRAPPER else inner  # its copies are of the same classes
        if is_row_wise(type(own)) or getattr(type(own), "takes_flat_tokens", False) or is_row_wise_code(own):
            self.pooled.row_wise.append(own)
            self.pooled.called += [inner] if inner is not own else []
            reads = self.settle(module, self._known(use.uses))
            if LAST_TOKEN in reads and module is self.model:
                self.pooled.expanded.append((module, use.name))
            return reads
        if self.settle(own, self._known(argument_uses(code_class(own)))) != {FIRST}:
            raise Unknown
        self.pooled.called += [inner, own]
        return {FIRST}


def reads_one_row(cls: type[nn.Module]) -> bool:
    """Whether models of ``cls``, as transformers wrote it, may read one row of each sample of a stack's last hidden state, and make no
    logits of a vocabulary."""
    if not issubclass(cls, PreTrainedModel) or not cls.forward.__module__.startswith("transformers."):
        return False
    return not may_have_output_head(cls) and may_pool(cls)


@fuses(rule=reads_one_row, applies=lambda module: pooled_read(module) is not None, note=NOTE)
class FusedPooledModel:
    """transformers' own forward, whose stack computes in its last layer the rows alone that the head reads."""

    computes_only = staticmethod(lambda module: None)  # its layers compute

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        call = None if torch.compiler.is_compiling() else _call_of(self, arguments_of(self, args, kwargs))
        if call is None:
            return super().forward(*args, **kwargs)
        with _alone(self) as alone, call.standing() if alone else nullcontext():
            return super().forward(*args, **kwargs)


_running: set[nn.Module] = set()
_lock = threading.Lock()


@contextmanager
def _alone(model: nn.Module) -> Iterator[bool]:
    """Whether no other thread runs ``model`` now, inside: what stands for its modules is there for one. The others call the modules."""
    with _lock:
        alone = model not in _running
        _running.add(model)
    try:
        yield alone
    finally:
        if alone:
            _running.discard(model)


def _call_of(model: nn.Module, given: dict[str, Any]) -> _PooledCall | None:
    """How this call of ``model`` runs; None where it is the model's own."""
    if torch.jit.is_tracing() or get_interpreter_stack() or watched_globally() or not on("labelled"):
        return None
    pooled = None if given.get("past_key_values") is not None else pooled_read(model)
    if pooled is None or any(map(has_hooks, pooled.called)) or _asks_for_more(model, pooled, given):
        return None
    if pooled.gives_loss and given.get("labels") is not None and model.loss_function is not ForSequenceClassificationLoss:
        return None  # it may read the logits of every token
    layers = pooled.stack._modules[pooled.layers]
    if any(checkpoints(layer) or not may_be_made_to_hand_on(layer) for layer in layers):
        return None
    if isinstance(pooled.stack, FusedLlamaModel):
        return _of_llama(model, pooled, given)
    if why_not_flat(model, layers, *pooled.row_wise, by_code=True) or not all(map(_attends_here, layers.modules())):
        return None
    column, columns = _column(model, pooled, given)
    return None if column is None else _PooledCall(pooled, column, columns)


def _asks_for_more(model: nn.Module, pooled: Pooled, given: dict[str, Any]) -> bool:
    """Whether somebody sees what layers return."""
    if output_capturing._active_collector.get():
        return True
    configs = [config for m in (model, pooled.stack) if (config := getattr(m, "config", None)) is not None]
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(given.get(name) or any(getattr(config, name, False) for config in configs) for name in names)


def _attends_here(module: nn.Module) -> bool:
    """Whether ``module``, if it is an attention layer, looks its function up where layouts are understood, and gets masks [B, H, M, N]."""
    if not isinstance(module, FusedInterfaceAttention):
        return hands_on_layouts(module)
    return (module.config._attn_implementation or "eager") in ("sdpa", "eager")


def _column(model: nn.Module, pooled: Pooled, given: dict[str, Any]) -> tuple[int | Tensor | None, int]:
    """(where in each sample the row is that is read, [B] int64 or the same of all; how many tokens a sample has, where that matters)"""
    if not pooled.last_token:
        return 0, 0
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() != (3 if ids is None else 2) or tokens.shape[1] == 0:
        return None, 0
    pad = (model.config.get_text_config() if pooled.reads_text_config else model.config).pad_token_id
    if pad is None or ids is None:
        return tokens.shape[1] - 1, tokens.shape[1]
    real = (ids != pad).to(torch.int32)
    return (torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32) * real).argmax(-1), ids.shape[1]


class _PooledCall(StackCall):
    """One call of a model that reads the row at ``column`` of each sample, of ``columns`` tokens."""

    def __init__(self, pooled: Pooled, column: int | Tensor, columns: int):
        super().__init__(None)
        self.pooled, self.column, self.columns, self.rows = pooled, column, columns, 0
        self.known_arguments = False

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, and on this thread, what stands for the layers."""
        stack, name = self.pooled.stack, self.pooled.layers
        layers = list(stack._modules[name])
        names = names_behind(type(layers[0]))
        ours = [_Standing(layer, self, names, i, layer is layers[-1]) for i, layer in enumerate(layers)]
        with standing(stack, ours, name), self.expanding():
            yield

    @contextmanager
    def expanding(self) -> Iterator[None]:
        """Inside, what stands for modules whose output must have the shape of the batch."""
        with ExitStack() as inside:
            for module, name in self.pooled.expanded:
                inside.enter_context(standing(module, _OfRow(getattr(module, name), self), name))
            yield

    def begin(self, names: list[str], hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find which tokens this call computes, from what its first layer gets."""
        given = dict(zip(names, args)) | kwargs
        self.known_arguments = hidden.dim() == 3 and hidden.shape[1] > 1 and len(args) <= len(names)
        self.known_arguments &= all(self._is_known(name, value, hidden) for name, value in given.items())
        if not self.known_arguments:
            return
        self.rows, self.columns = hidden.shape[:2]
        if not any(given.get(name) is not None for name in CACHES):
            kept = _kept(given.get(MASK), *hidden.shape[:2], self.column)
            self.layout = None if kept is None else self_layout(kept.shape, kept, hidden.device)

    @staticmethod
    def _is_known(name: str, value: Any, hidden: Tensor) -> bool:
        if value is None or isinstance(value, bool | int | float | str) or name in (*CACHES, "cache_position", "position_ids"):
            return True
        if name == MASK:
            return isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] in (1, hidden.shape[1])
        return name.startswith("position_embeddings")

    def at_last(self, device: torch.device) -> LastLayout:
        return LastLayout.of_columns(self.rows, self.columns, self.column, device, self.layout)

    def row_of(self, x: Tensor) -> Tensor:
        """[B, columns, ...] -> [B, 1, ...]; what is the row already stays."""
        if x.shape[1] == 1:
            return x
        return LastLayout.of_columns(len(x), self.columns, self.column, x.device).of_each(x)


class _LlamaCall(_PooledCall):
    """The same of LLaMA's stack, which is told where it is read (:mod:`fastpeft.fused.stack_llama`)."""

    def __init__(self, pooled: Pooled, column: int | Tensor, columns: int, read: Read):
        super().__init__(pooled, column, columns)
        self.read = read

    @contextmanager
    def standing(self) -> Iterator[None]:
        with read_at({self.pooled.stack: self.read}), self.expanding():
            yield


def _of_llama(model: nn.Module, pooled: Pooled, given: dict[str, Any]) -> _LlamaCall | None:
    stack, uses_cache = pooled.stack, given.get("use_cache")
    uses_cache = stack.uses_cache_by_default() if uses_cache is None else uses_cache
    column, columns = _column(model, pooled, given)
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if uses_cache or not isinstance(column, int | Tensor) or columns == 0 or cannot_be_read(tokens):
        return None
    at = torch.arange(columns, device=tokens.device) == torch.as_tensor(column, device=tokens.device).view(-1, 1)
    return _LlamaCall(pooled, column, columns, Read(given.get(MASK), at.expand(len(tokens), -1), alone=True))


class _Standing(OnTokens):
    """Stands for a layer in its stack's loop."""

    def __init__(self, layer: nn.Module, call: _PooledCall, names: list[str], index: int, last: bool):
        super().__init__(layer, call, names, last)
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.call
        if threading.get_ident() != call.thread or not args or not isinstance(args[0], Tensor):
            return self.layer(*args, **kwargs)
        if self.index == 0:
            call.begin(self.names, args[0], args[1:], kwargs)
        if call.layout is not None:
            return super().__call__(*args, **kwargs)
        last = self.at_last(args[0].device) if self.last and call.known_arguments else None
        if last is None:
            return self.layer(*args, **kwargs)
        return at_rows(type(self.layer))(self.layer, *args, **kwargs, **{LAYOUT: last})


class _OfRow:
    """Stands for a module that treats every token by itself: computes the row that is read, and returns it for every token. Whatever else
    is asked of it, the module answers."""

    def __init__(self, module: nn.Module, call: _PooledCall):
        self.module, self.call = module, call

    def __call__(self, x: Tensor) -> Tensor:
        call = self.call
        if threading.get_ident() != call.thread or x.dim() != 3 or x.shape[1] not in (1, call.columns):
            return self.module(x)
        return self.module(call.row_of(x)).expand(-1, call.columns, -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _kept(mask: Tensor | None, rows: int, columns: int, column: int | Tensor) -> Tensor | None:
    """[rows, columns] bool, on the CPU: the tokens that somebody attends to under ``mask`` [B or 1, H, M or 1, N], and those at ``column``.
    None where these are nearly all, or that cannot be read now, or one of them attends to nothing, which for some functions is all."""
    if mask is None or mask.shape[3] != columns or cannot_be_read(mask):
        return None
    content = read_mask(mask)
    if content.allowed is None:
        return None
    at = torch.arange(columns, device=mask.device)
    read = at == torch.as_tensor(column, device=mask.device).view(-1, 1)
    kept = (content.allowed.any(1).any(1) | read).expand(rows, -1)
    if content.dead and bool((kept & ~content.allowed.any(-1).all(1)).any()):
        return None
    kept = kept.cpu()
    return kept if 0 < int(kept.sum()) <= FULL * kept.numel() else None


def cannot_be_read(x: Tensor) -> bool:
    """Whether the step that runs may not wait for the values of ``x``, or there are none."""
    return sizes() is not None or is_fake(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing())
