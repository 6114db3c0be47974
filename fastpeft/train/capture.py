"""Captures: the launches of a function as a CUDA graph, and everything as it was where that fails.

What PyTorch asks of a capture of its own (docs: CUDA semantics, graph memory management; torch/cuda/graphs.py; CUDAGraph.cpp; the caching
allocator), and where it is kept: the function has run before on the same sizes, so that kernels are compiled and loaded, libraries' handles
made and caches full; no autograd graph of such a run is alive, whose leaves would add on that run's stream; all that is read lies in memory
that stays; nothing that is made inside is read outside but by a later replay; graphs of one memory pool run one after another; all are
captured on one stream, whose workspaces and free memory they share; another thread may allocate meanwhile.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch

from fastpeft.ops._private import end_allocation


class Captures:
    """Graphs on ``device`` that are replayed one after another: they share a stream to be captured on, and the memory of what they make."""

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.alive: weakref.WeakSet[Graph] = weakref.WeakSet()

    def capture(self, function: Callable[[], None]) -> Graph:
        """``function``'s launches; it computes nothing now. Whatever it raises; RuntimeError where it waits for the device."""
        if not self.alive:  # a pool goes with the last of its graphs, and then takes no more
            self.pool = torch.cuda.graph_pool_handle()
        self.alive.add(graph := Graph(function, self))
        return graph


class Graph:
    """The launches of one function, captured; not run yet."""

    def __init__(self, function: Callable[[], None], of: Captures):
        self.function, self.captured = function, torch.cuda.CUDAGraph()
        # "thread_local": a data loader's thread may allocate meanwhile
        how = {"pool": of.pool, "stream": of.stream, "capture_error_mode": "thread_local"}
        with capture_or_leave_all_as_it_was(of.device, of.pool), torch.cuda.graph(self.captured, **how), _no_waiting():
            function()

    def replay(self) -> None:
        self.captured.replay()


@contextlib.contextmanager
def capture_or_leave_all_as_it_was(device: torch.device, pool: tuple[int, int] | None = None) -> Iterator[None]:
    """Around a capture on ``device``, whichever is current: after one that failed the stream is the one from before, the device's generator
    draws again, and the allocator, which gave memory of ``pool`` meanwhile, knows that it is over. PyTorch leaves the capture's stream
    current, a generator that takes every later draw for a part of the capture and refuses it, and, where the driver ended the capture, an
    allocator that frees nothing any more."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        try:
            yield
        except BaseException:  # a second Ctrl-C, too: what is saved then is read on this stream
            torch.cuda.set_stream(stream)
            if pool is not None:
                end_allocation(torch.cuda.current_device(), pool)
            if torch.cuda.default_generators:
                generator, fresh = torch.cuda.default_generators[stream.device_index], torch.Generator(stream.device)
                fresh.set_state(generator.get_state())
                generator.graphsafe_set_state(fresh.graphsafe_get_state())
            raise


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """A wait for the device is an error before it is one of the driver's, which would end the capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # "a prototype feature": what it overlooks, the driver does not
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
