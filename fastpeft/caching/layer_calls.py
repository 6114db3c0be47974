"""One call of a stack whose lower layers are kept: what stands for them, which rows are computed, and what is put together."""

from __future__ import annotations

import inspect
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpeft.caching.calls import NOT_READ
from fastpeft.caching.frozen import ASK_FOR_GRADIENTS
from fastpeft.caching.spans import TOKENS, Cut, NotCut, cut, tensors_in
from fastpeft.fused.attention.tokens import LAYOUT
from fastpeft.fused.layout import Layout, sub_layout
from fastpeft.fused.stack.last_layer import run_handing_on
from fastpeft.fused.stack.lower import Refused
from fastpeft.ops._private import FakeTensor

if TYPE_CHECKING:
    from fastpeft.caching.layers import LayerCache

TIMED = 3  # calls of each kind that are timed
# by layers without an Excitor, or what says where tokens lie
NOT_READ_BELOW = (*NOT_READ, "visual", "visual_index", "visual_seen", "output_mask", LAYOUT, "layout")


class LayerCall:
    """One call of a stack. ``layers``: its own, with one of :class:`_Standing` for each lower one."""

    def __init__(self, cache: LayerCache, given: dict[str, Any]):
        self.cache, self.given, self.thread = cache, given, threading.get_ident()
        own = list(cache.stack._modules["layers"])
        self.layers = [_Standing(self, i, layer) for i, layer in enumerate(own[: cache.count])] + own[cache.count :]
        self.made: Cut | None = None

    def __call__(self, index: int, layer: nn.Module, hidden: Tensor, args: tuple, options: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return layer(hidden, *args, **options)
        names = list(inspect.signature(type(layer).forward).parameters)[2 : 2 + len(args)] if args else []
        own, options = options, dict(zip(names, args)) | options
        if index == 0:
            self._begin(hidden, options)
        if self.made is None:
            return layer(hidden, *args, **own)  # by place where given so: what reentrant checkpointing gives a gradient to
        if index and not self.made.fits(options.get("attention_mask")):
            self.cache.tails = False
            raise Refused("a layer's mask lets sequences attend to others")
        return self._run(index, layer, hidden.detach(), options)  # not no_grad: layers may choose another form of the same there

    def _begin(self, hidden: Tensor, options: dict[str, Any]) -> None:
        """Find what is kept of this call's tokens, or leave ``made`` None."""
        cache = self.cache
        self.layout: Layout | None = options.get(LAYOUT, options.get("layout"))
        read = {name: value for name, value in options.items() if name not in NOT_READ_BELOW}
        given = {name: value for name, value in self.given.items() if name not in NOT_READ_BELOW}
        self.grad = hidden.requires_grad and torch.is_grad_enabled()
        try:
            if isinstance(hidden, FakeTensor):
                raise NotCut("tensors without data")
            if self._gradients_pass(hidden, read, given):
                raise NotCut("what enters them needs a gradient")
            if "labelled" in options or "prefix" in options:
                raise NotCut("a prefix, or labelled positions only")
            self.began, about = time.perf_counter(), self._constants(hidden)
            made = cut(hidden, read, given, self.layout, not cache.tails, about)
            if not made.fits(options.get("attention_mask")):
                made = cut(hidden, read, given, self.layout, True, about)
        except NotCut as error:
            cache.passed[str(error)] += 1
            return
        self.made, self.device, self.about, self.total = made, hidden.device, about, hidden[..., 0].numel()
        known = about in cache.shapes
        self.found = cache.find(made) if known else [None] * len(made.spans)
        rows = {span.row for span, found in zip(made.spans, self.found) if found is None}
        self.missing = sorted(rows)
        self.all = len(rows) == len({span.row for span in made.spans})
        if self.all or hidden.is_cuda:  # digests are no part of computing; on a device they end with the work before them
            self.began = time.perf_counter()
        self.pieces = None if self.all else self._on_device()
        self.random = _random_state(hidden)

    def _gradients_pass(self, hidden: Tensor, read: dict[str, Any], given: dict[str, Any]) -> bool:
        """Whether something below trains, an encoder whose states these layers read among it."""
        if self.grad and not self._asked_for_gradients(hidden):
            return True
        beside = [t for values in (read, given) for name, one in values.items() if name not in TOKENS for t in tensors_in(one)]
        return any(t.requires_grad for t in beside)  # in reentrant checkpointing too, where gradients are off for now

    def _asked_for_gradients(self, hidden: Tensor) -> bool:
        """Whether ``hidden`` needs a gradient only because a hook said so (``enable_input_require_grads``), for checkpointing."""
        embed = getattr(self.cache.stack, "embed_tokens", None)
        hooks = () if embed is None else embed._forward_hooks.values()
        ours = any(getattr(hook, "__name__", "") in ASK_FOR_GRADIENTS for hook in hooks)
        return ours and hidden.is_leaf and self.given.get("input_ids") is not None and self.given.get("inputs_embeds") is None

    def _constants(self, hidden: Tensor) -> str:
        kind, config = hidden.device.type, self.cache.stack.config
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        rope = str(getattr(config, "rope_parameters", ""))
        length = self.given_length(hidden) if "dynamic" in rope or "longrope" in rope else ""  # tables that depend on the longest sequence
        return f"{hidden.dtype} {cast} {kind} {length}"

    def given_length(self, hidden: Tensor) -> str:
        positions = self.given.get("position_ids")
        return str(hidden.shape[-2] if positions is None else int(positions.max()))

    def _on_device(self) -> list[Tensor | None]:
        return [
            None if found is None or span.row in self.missing else [t.to(self.device, non_blocking=True) for t in found]
            for span, found in zip(self.made.spans, self.found)
        ]

    def _run(self, index: int, layer: nn.Module, hidden: Tensor, options: dict[str, Any]) -> Any:
        last = index == self.cache.count - 1
        output, values = hidden, self.cache.shapes.get(self.about, (None, 0))[1]
        run = partial(run_handing_on, layer) if LAYOUT in options else layer
        if self.all:
            output = run(hidden, **options)
        elif self.missing:
            rows, own = self._some(hidden, options)
            output = run(rows, **own)
        elif index == 0:
            output = hidden.clone()  # a stack may change a layer's output in place
        if self.missing:
            values = len(output) if isinstance(output, tuple) else 0
            if values and any(value is not None for value in output[1:]):
                raise Refused("a layer returns more than hidden states")
            output = output[0] if values else output
        if not last and self.missing and not self.all:
            output = self._spread(hidden, output)
        if last:
            output = self._finish(hidden, output, values)
        return (output, *[None] * (values - 1)) if values else output

    def _rows_of_tokens(self) -> Tensor:
        """[N] int64, on the CPU: the row of each token."""
        rows = torch.empty(self.total, dtype=torch.long)
        for span in self.made.spans:
            rows[span.begin : span.end + span.tail] = span.row
        return rows

    def _some(self, hidden: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """(hidden, options) of the missing rows."""
        rows = torch.tensor(self.missing)
        at = rows.to(hidden.device)
        if self.layout is None:
            count = hidden.shape[0]
            return hidden.index_select(0, at), {
                name: value if name in NOT_READ_BELOW else _select(name, value, at, count) for name, value in options.items()
            }
        tokens = torch.isin(self._rows_of_tokens(), rows).nonzero().flatten()
        layout, index = sub_layout(self.layout, rows, tokens, hidden.device), tokens.to(hidden.device)
        options = {
            name: value if name in NOT_READ_BELOW else _select_tokens(name, value, index, at, self.total) for name, value in options.items()
        }
        options[LAYOUT if LAYOUT in options else "layout"] = layout
        return hidden.index_select(-2, index), options

    def _spread(self, hidden: Tensor, output: Tensor) -> Tensor:
        """``output`` of the missing rows in its places among ``hidden``."""
        rows = torch.tensor(self.missing)
        if self.layout is None:
            return hidden.to(output.dtype).index_copy(0, rows.to(hidden.device), output)
        tokens = torch.isin(self._rows_of_tokens(), rows).nonzero().flatten().to(hidden.device)
        return hidden.to(output.dtype).index_copy(-2 % hidden.dim(), tokens, output)

    def _finish(self, hidden: Tensor, output: Tensor, values: int) -> Tensor:
        """The last lower layer's output for all tokens; what was computed is kept."""
        cache, at, pieces = self.cache, 0, []
        drew = bool(self.missing) and not torch.equal(self.random, _random_state(hidden))
        if drew:
            cache.passed["they draw random numbers"] += 1
        states = output.reshape(-1, output.shape[-1])
        with cache.lock:
            for number, span in enumerate(self.made.spans):
                if not self.all and span.row not in self.missing:
                    pieces += self.pieces[number]
                    cache.reused += 1
                    continue
                length = span.end + span.tail - span.begin
                own, at = states[at : at + length], at + length
                pieces.append(own)
                if not drew:
                    cache.keep(self.made, number, own)
            if self.missing:
                cache.shapes[self.about] = output.dtype, values
        if not self.all:
            output = torch.cat(pieces).view(*hidden.shape[:-1], -1)
        what = "computing" if self.all else "" if self.missing else "reading"
        if what and len(cache.seconds[what]) < TIMED:
            if output.is_cuda:
                torch.cuda.synchronize(output.device)
            cache.timed(what, time.perf_counter() - self.began, self.total)
        return output.detach().requires_grad_() if self.grad else output


def _random_state(hidden: Tensor) -> Tensor:
    """Of the generators that layers would draw from."""
    host = torch.get_rng_state()
    return torch.cat([host, torch.cuda.get_rng_state(hidden.device)]) if hidden.is_cuda else host


class _Standing:
    """Stands for a lower layer in its stack's loop; whatever else is asked of it, the layer answers."""

    def __init__(self, call: LayerCall, index: int, layer: nn.Module):
        self.call, self.index, self.layer = call, index, layer

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.index, self.layer, hidden, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _select(name: str, value: Any, at: Tensor, count: int) -> Any:
    """A layer's argument for the rows ``at`` of a batch of ``count``."""
    if isinstance(value, tuple):
        return tuple(_select(name, one, at, count) for one in value)
    if not isinstance(value, Tensor) or name == "cache_position":
        return value
    if name == "position_ids" and value.dim() == 3:
        return value if value.shape[1] == 1 else value.index_select(1, at)
    if value.dim() > 1 and value.shape[0] in (1, count):
        return value if value.shape[0] == 1 else value.index_select(0, at)
    raise Refused(f"layers get {name} of shape {tuple(value.shape)}")


def _select_tokens(name: str, value: Any, tokens: Tensor, rows: Tensor, count: int) -> Any:
    """A layer's argument for the ``tokens`` among ``count`` that are laid out, which lie in ``rows``."""
    if isinstance(value, tuple):
        return tuple(_select_tokens(name, one, tokens, rows, count) for one in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask" and value.dim() == 4:
        return value if value.shape[0] == 1 else value.index_select(0, rows)
    if name.startswith("position_embeddings") and value.shape[-2] == count:
        return value.index_select(-2, tokens)
    if name == "position_ids":
        return value.index_select(-1, tokens) if value.shape[-1] == count else value
    raise Refused(f"layers get {name} of shape {tuple(value.shape)}")
