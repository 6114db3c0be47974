"""CUDA graphs of the device that is not there: what a capture records and refuses, and replay.

A capture records every operator with its arguments. Like a real one it leaves no result: what was there before is as it was, and what it
made, the graph's own memory, is NaN (or no index) until a replay. It refuses a wait of the host, a tensor of the host or a copy of one, and
a generator that is not the device's own. It keeps nothing alive that was made outside: a replay that reads what is gone fails. A Python
number is recorded as it was; ``differences`` of two recordings of one function says which of them was not the same at both times.

What goes wrong around a real one goes wrong here: a wait that ``set_sync_debug_mode("error")`` did not catch ends the capture as the driver
does, after which PyTorch leaves its stream current and its allocator recording, and ``empty_cache`` fails; a pool whose graphs are all gone
takes no capture; nor does a stream of another device.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

CONTAINERS = (list, tuple, dict)


def leaves(tree) -> Iterator[Any]:
    """What an operator's arguments hold, in their order: torch's own trees know more kinds of containers, and take 20 times as long."""
    left = [tree]
    while left:
        tree = left.pop()
        if isinstance(tree, CONTAINERS):
            left.extend(reversed(tree.values() if isinstance(tree, dict) else tree))
        else:
            yield tree


def mapped(function: Callable, kind, tree):
    """The arguments with ``function`` of each leaf of a ``kind``."""
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) in (list, tuple):
        return type(tree)([mapped(function, kind, each) for each in tree])
    return {name: mapped(function, kind, each) for name, each in tree.items()} if isinstance(tree, dict) else tree


class Noted:
    """In place of a tensor that a recording does not hold."""


@dataclass(frozen=True)
class Outside(Noted):
    """A tensor in memory that is not the graph's."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, t: Tensor) -> Outside:
        return cls(StorageWeakRef(t.untyped_storage()), t.dtype, t.shape, t.stride(), t.storage_offset())

    def there(self) -> Tensor:
        """It again. RuntimeError where nobody holds its memory any more."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"replayed: a graph reads memory that is free, {list(self.shape)} {self.dtype}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class OfHost(Noted):
    """A number that lies in a tensor of the host: kernels get it by value, as it was."""

    tensor: Tensor

    def there(self) -> Tensor:
        return self.tensor


class Call(NamedTuple):
    function: Any
    implementation: Callable
    args: tuple
    kwargs: dict
    out: Any


def on_the_host(function: Callable) -> Callable:
    """As if no device were there: what a recording does with the tensors that it holds is none of the device's operators."""

    @functools.wraps(function)
    def run(*args):
        with torch._C._DisableTorchDispatch():
            return function(*args)

    return run


class Recording:
    """Operators in their order."""

    def __init__(self):
        self.calls: list[Call] = []
        self.own: set[int] = set()  # addresses of storages made inside, which ``calls`` holds
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of storages outside that are written: their bytes, and what these were
        self.rng = torch.get_rng_state()
        self.ended = False  # by the driver

    def run(self, function, implementation, args, kwargs, hosts: list[Tensor]):
        if far := [t for t in hosts if t.dim()]:
            raise RuntimeError(f"captured: {function} takes a tensor of the host, {list(far[0].shape)} {far[0].dtype}")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"captured: {function} draws from a generator that no graph knows")
        for t in _written(function, args, kwargs):
            self._keep(t)
        out = implementation(*args, **kwargs)
        taken = {_address(t) for t in _tensors((args, kwargs))}
        self.own |= {_address(t) for t in _tensors(out)} - taken
        args, kwargs = mapped(lambda t: self._noted(t, hosts), Tensor, (args, kwargs))
        self.calls.append(Call(function, implementation, args, kwargs, out))
        return out

    def _noted(self, t: Tensor, hosts: list[Tensor]) -> Tensor | OfHost | Outside:
        if any(t is host for host in hosts):
            return OfHost(t.clone())
        return t if _address(t) in self.own or t.numel() == 0 else Outside.of(t)

    def _keep(self, t: Tensor) -> None:
        address = _address(t)
        if address not in self.own and address not in self.before:
            content = _bytes(t)
            self.before[address] = (content, content.clone())

    @on_the_host
    def undo(self) -> None:
        """Leave everything as a capture does, which runs nothing."""
        torch.set_rng_state(self.rng)
        for content, before in self.before.values():
            content.copy_(before)
        self.before.clear()
        for t in _tensors([call.out for call in self.calls]):
            if _address(t) in self.own and t.dtype not in (torch.bool, torch.uint8):
                nothing = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min
                torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).fill_(nothing)

    @on_the_host
    def replay(self) -> None:
        for call in self.calls:
            args, kwargs = mapped(lambda noted: noted.there(), Noted, (call.args, call.kwargs))
            again = call.implementation(*args, **kwargs)
            for t, new in zip(leaves(call.out), leaves(again), strict=True):
                if isinstance(t, Tensor) and t.data_ptr() != new.data_ptr():
                    t.copy_(new)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _tensors(tree) -> list[Tensor]:
    return [t for t in leaves(tree) if isinstance(t, Tensor)]


def _written(function, args, kwargs) -> list[Tensor]:
    """The tensors that an operator changes, by its schema."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def differences(one: Recording, other: Recording) -> list[str]:
    """Which operators, or which of their arguments that are not tensors of the device, are not the same; [] where all are."""
    if len(one.calls) != len(other.calls):
        return [f"{len(one.calls)} operators, then {len(other.calls)}"]
    return [
        f"{number}. {a.function} {_signature(a)}, then {b.function} {_signature(b)}"
        for number, (a, b) in enumerate(zip(one.calls, other.calls))
        if a.function != b.function or _signature(a) != _signature(b)
    ]


def _signature(call: Call) -> list[str]:
    return [_told(leaf) for leaf in leaves((call.args, call.kwargs))]


def _told(leaf) -> str:
    if isinstance(leaf, OfHost):
        return repr(leaf.tensor)
    if isinstance(leaf, Outside):
        return f"{leaf.storage.cdata} {leaf.dtype} {list(leaf.shape)} {leaf.stride} {leaf.offset}"
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {list(leaf.shape)} {leaf.stride()}"
    return repr(leaf)


_now: Recording | None = None


def refuse(what: str, ends: bool = False) -> None:
    """RuntimeError inside a capture; ``ends``: the driver ends it."""
    if _now is not None:
        _now.ended |= ends
        raise RuntimeError(f"captured: {what}")


def run(function, implementation, args, kwargs, hosts: list[Tensor]):
    if _now is None:
        return implementation(*args, **kwargs)
    return _now.run(function, implementation, args, kwargs, hosts)


@contextmanager
def _capturing(recording: Recording) -> Iterator[None]:
    global _now
    assert _now is None, "a capture inside a capture"
    _now = recording
    try:
        yield
    finally:
        _now = None
        recording.undo()


def record(function: Callable[[], None]) -> Recording:
    """What a capture of ``function`` records."""
    with _capturing(recording := Recording()):
        function()
    return recording


class CUDAGraph:
    def __init__(self):
        self.recording: Recording | None = None

    def replay(self) -> None:
        assert _now is None, "a replay inside a capture"
        self.recording.replay()


class Allocator:
    """What PyTorch's knows of captures: pools by the number of their graphs, and those that are recorded into now."""

    def __init__(self):
        self.graphs: Counter = Counter()
        self.recording: set = set()

    def begin(self, pool) -> None:
        self.empty_cache()
        if pool in self.graphs and not self.graphs[pool]:
            raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0")
        self.graphs[pool] += 1
        self.recording.add(pool)

    def end(self, device: int, pool) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool) -> None:
        self.graphs[pool] -= 1

    def empty_cache(self) -> None:
        if self.recording:
            raise RuntimeError("INTERNAL ASSERT FAILED: captures_underway.empty()")


allocator, _numbers = Allocator(), itertools.count(1)


@contextmanager
def graph(captured: CUDAGraph, pool=None, stream=None, capture_error_mode: str = "global") -> Iterator[None]:
    """As PyTorch's: after a capture that the driver ended its stream is left current, and the allocator is not told."""
    recording, before, pool = Recording(), torch.cuda.current_stream(), pool or (next(_numbers), 0)
    stream = stream or Stream()
    if stream.device_index != 0:
        raise RuntimeError("captured: on a stream of another device than its kernels', the graph is empty")
    allocator.begin(pool)
    torch.cuda.set_stream(stream)
    try:
        with _capturing(recording):
            yield
    finally:
        if recording.ended:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        allocator.end(0, pool)
        torch.cuda.set_stream(before)
        weakref.finalize(captured, allocator.release, 0, pool)
    captured.recording = recording


class Stream:
    """One of a device's; nothing is queued on it."""

    def __init__(self, device=None):
        index = None if device is None else torch.device(device).index
        self.device_index = torch.cuda.current_device() if index is None else index
        self.device = torch.device("cuda", self.device_index)


_streams: dict[int, Stream] = {}  # the current one of each device


def _set_stream(stream: Stream) -> None:
    torch.cuda._exchange_device(stream.device_index)
    _streams[stream.device_index] = stream


def install() -> None:
    cuda = torch.cuda
    cuda.current_stream = lambda device=None: _streams.setdefault(cuda.current_device(), Stream())
    cuda.set_stream, cuda.Stream = _set_stream, Stream
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = CUDAGraph, graph, lambda: (0, next(_numbers))
    cuda.is_current_stream_capturing, cuda.empty_cache = lambda: _now is not None, allocator.empty_cache
    torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool = allocator.end, allocator.release
