"""A call of a model of whose stack some rows are read: its layers compute no others where they need not.

The last layer computes what is read alone; where a mask says that nobody attends to a token, no layer computes it: padding
(:mod:`fastpeft.fused.stack.any_stack`). The model's own forward runs, and in its loop modules that stand for its layers; what these compute
is found when the first one is called.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from transformers.utils import output_capturing

from fastpeft.fused.attention.interface import FusedInterfaceAttention
from fastpeft.fused.attention.masks import read_mask
from fastpeft.fused.attention.tokens import LAYOUT
from fastpeft.fused.layout import FULL, self_layout
from fastpeft.fused.stack.any_stack import (
    OnTokens,
    Read,
    StackCall,
    checkpoints,
    hands_on_layouts,
    may_be_made_to_hand_on,
    names_behind,
    read_at,
)
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.last_layer import MASK, at_rows
from fastpeft.fused.stack.llama import FusedLlamaModel
from fastpeft.fused.stack.lower import standing
from fastpeft.fused.stack.state_walk import StatePath
from fastpeft.methods.base import has_hooks, watched_globally
from fastpeft.ops._private import is_fake
from fastpeft.savings import on
from fastpeft.static_shapes import sizes

CACHES = ("past_key_values", "past_key_value", "layer_past")
_running: set[nn.Module] = set()
_lock = threading.Lock()


@contextmanager
def standing_in(model: nn.Module, call: RowsCall | None) -> Iterator[bool]:
    """Inside, what stands for modules of ``model`` in a ``call``; False where there is none, or another thread runs the model now: that one
    calls the modules."""
    with _lock:
        first = call is not None and model not in _running
        _running.update([model] if first else [])
    try:
        with call.standing() if first else nullcontext():
            yield first
    finally:
        if first:
            _running.discard(model)


def may_leave_rows_out(model: nn.Module, given: dict[str, Any]) -> bool:
    """Whether this call of ``model`` may compute less than it says: nothing traces, transforms or watches it, and it has no cache."""
    own = torch.compiler.is_compiling() or torch.jit.is_tracing() or get_interpreter_stack() or watched_globally() or not on("labelled")
    return not own and given.get("past_key_values") is None


def layers_may(model: nn.Module, path: StatePath, given: dict[str, Any]) -> bool:
    """Whether the layers of ``path``, and what is behind them, may compute some rows in this call of ``model``."""
    if any(map(has_hooks, path.called)) or _asks_for_more(model, path, given):
        return False
    layers = path.stack._modules[path.layers]
    if any(checkpoints(layer) or not may_be_made_to_hand_on(layer) for layer in layers):
        return False
    if isinstance(path.stack, FusedLlamaModel):  # looks for itself
        return not path.row_wise or not why_not_flat(path.stack, *path.row_wise, by_code=True)
    return not why_not_flat(path.stack, layers, *path.row_wise, by_code=True) and all(map(_attends_here, layers.modules()))


def _asks_for_more(model: nn.Module, path: StatePath, given: dict[str, Any]) -> bool:
    """Whether somebody sees what layers return."""
    if output_capturing._active_collector.get():
        return True
    configs = [config for m in (model, path.stack) if (config := getattr(m, "config", None)) is not None]
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(given.get(name) or any(getattr(config, name, False) for config in configs) for name in names)


def _attends_here(module: nn.Module) -> bool:
    """Whether ``module``, if it is an attention layer, looks its function up where layouts are understood, and gets masks [B, H, M, N]."""
    if not isinstance(module, FusedInterfaceAttention):
        return hands_on_layouts(module)
    return (module.config._attn_implementation or "eager") in ("sdpa", "eager")


class RowsCall(StackCall):
    """One call of a model that reads some rows of the state of ``path``. ``read``: the same as LLaMA's stack, which finds its layouts
    itself, is told it (:mod:`fastpeft.fused.stack.llama`)."""

    def __init__(self, path: StatePath, read: Read | None = None):
        super().__init__(None)
        self.path, self.read = path, read
        self.rows = self.columns = 0
        self.known_arguments = False

    def instead(self) -> list[tuple[nn.Module, str]]:
        """(module, name) of those for which :class:`_AtRows` stands."""
        raise NotImplementedError

    def wanted(self, device: torch.device) -> Tensor:
        """[rows or 1, columns] bool: what is read."""
        raise NotImplementedError

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """What ``module`` gives for x [rows, columns, C], right in the rows that are read."""
        raise NotImplementedError

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, and on this thread, what stands for layers and for what follows them."""
        stack, name = self.path.stack, self.path.layers
        with ExitStack() as inside:
            if self.read is not None:
                inside.enter_context(read_at({stack: self.read}))
            else:
                layers = list(stack._modules[name])
                names = names_behind(type(layers[0]))
                ours = [_Standing(layer, self, names, i, layer is layers[-1]) for i, layer in enumerate(layers)]
                inside.enter_context(standing(stack, ours, name))
            for module, name in self.instead():
                inside.enter_context(standing(module, _AtRows(getattr(module, name), self), name))
            yield

    def begin(self, names: list[str], hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find which tokens this call computes, from what its first layer gets."""
        given = dict(zip(names, args)) | kwargs
        self.known_arguments = hidden.dim() == 3 and hidden.shape[1] > 1 and len(args) <= len(names)
        self.known_arguments &= all(_is_known(name, value, hidden) for name, value in given.items())
        if not self.known_arguments:
            return
        self.rows, self.columns = hidden.shape[:2]
        if not any(given.get(name) is not None for name in CACHES):
            kept = self.kept(given.get(MASK), hidden.device)
            self.layout = None if kept is None else self_layout(kept.shape, None if bool(kept.all()) else kept, hidden.device)

    def kept(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """[rows, columns] bool, on the CPU: the tokens that somebody attends to under ``mask`` [B or 1, H, M or 1, N], and those that are
        read. None where these are nearly all, or that cannot be read now, or one of them attends to nothing, which for some functions is
        all."""
        if mask is None or mask.shape[3] != self.columns or cannot_be_read(mask):
            return None
        content = read_mask(mask)
        if content.allowed is None:
            return None
        kept = (content.allowed.any(1).any(1) | self.wanted(mask.device)).expand(self.rows, -1)
        if content.dead and bool((kept & ~content.allowed.any(-1).all(1)).any()):
            return None
        kept = kept.cpu()
        return kept if 0 < int(kept.sum()) <= FULL * kept.numel() else None


def _is_known(name: str, value: Any, hidden: Tensor) -> bool:
    if value is None or isinstance(value, bool | int | float | str) or name in (*CACHES, "cache_position", "position_ids"):
        return True
    if name == MASK:
        return isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] in (1, hidden.shape[1])
    return name.startswith("position_embeddings")


class _Standing(OnTokens):
    """Stands for a layer in its stack's loop."""

    def __init__(self, layer: nn.Module, call: RowsCall, names: list[str], index: int, last: bool):
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


class _AtRows:
    """Stands for a module that treats every token by itself: computes the rows that are read. Whatever else is asked of it, the module
    answers."""

    def __init__(self, module: nn.Module, call: RowsCall):
        self.module, self.call = module, call

    def __call__(self, x: Tensor) -> Tensor:
        call = self.call
        if threading.get_ident() != call.thread or x.dim() != 3 or x.shape[1] not in (1, call.columns):
            return self.module(x)
        return call.run(self.module, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def cannot_be_read(x: Tensor) -> bool:
    """Whether the step that runs may not wait for the values of ``x``, or there are none."""
    return sizes() is not None or is_fake(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing())
