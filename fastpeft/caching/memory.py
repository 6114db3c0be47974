"""Tensors by key within a budget of memory, and behind it a folder of files (:class:`fastpeft.caching.store.FeatureStore`)."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpeft.caching.store import FeatureStore

Entry = dict[Any, Tensor]
IDLE = 8  # look-ups per kept entry after which one that nobody asked for makes room
LOOK = 5.0  # seconds between looks for files that other processes wrote


class Kept:
    """Entries (tensors by path) by key, on the host.

    When ``limit_bytes`` are full, the entry that was not asked for for the longest time makes room, if that is 8 look-ups per kept entry;
    else the new one is not kept. In epochs over more images than fit, each comes once an epoch in any order: to evict the least recently
    used one would then lose every one before it comes again. With a ``store`` every entry is also written to files. Copies from a CUDA
    device run beside its work; nobody waits for them before they are read.
    """

    def __init__(self, limit_bytes: int, store: FeatureStore | None = None):
        self.limit_bytes, self.store, self.bytes, self.lookups, self.loaded = limit_bytes, store, 0, 0, 0
        self.refused = self.evicted = 0  # entries for which there was no room, and that made room
        self._entries: OrderedDict[str, tuple[Entry, int, Any]] = OrderedDict()  # in order of use: (entry, look-up, event of its copy)
        self._copying: deque[tuple[str, Entry, Any]] = deque()  # to be written once they are complete
        self._lock, self._looked = threading.RLock(), time.monotonic()
        self._at_end = None if store is None else weakref.finalize(self, _flush, store, self._copying)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, paths: Iterable[Any]) -> Entry | None:
        """The tensors of these paths; None where one is missing. Do not write to them."""
        with self._lock:
            self.lookups += 1
            entry, _, copied = self._entries.get(key, ({}, 0, None))
            if all(path in entry for path in paths):
                self._entries[key] = (entry, self.lookups, None)
                self._entries.move_to_end(key)
                if copied is not None:
                    copied.synchronize()
                return entry
            return self._load(key, list(paths))

    def _load(self, key: str, paths: list[Any]) -> Entry | None:
        if self.store is None:
            return None
        names = {path: _name(key, path) for path in paths}
        if not all(name in self.store for name in names.values()) and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self.store.refresh()
        found = {}
        for path, name in names.items():
            tensor = self.store.get(name) if name in self.store else None
            if tensor is None:
                return None
            found[path] = tensor
        self.loaded += 1
        self._remember(key, found, None)
        return found

    def put(self, key: str, entry: Mapping[Any, Tensor]) -> None:
        """Copy and keep."""
        with self._lock:
            on_device = any(tensor.is_cuda for tensor in entry.values())
            copies = {path: _copy(tensor) for path, tensor in entry.items()}
            copied = None
            if on_device:
                copied = torch.cuda.Event()
                copied.record()
            self._remember(key, copies, copied)
            if self.store is not None:
                self._copying.append((key, copies, copied))
                self._write()

    def _remember(self, key: str, entry: Entry, copied: Any) -> None:
        self._forget(key)
        size = sum(tensor.nbytes for tensor in entry.values())
        if size > self.limit_bytes:
            self.refused += 1
            return
        while self.bytes + size > self.limit_bytes:
            oldest, (_, used, _) = next(iter(self._entries.items()))
            if self.lookups - used <= IDLE * len(self._entries):
                self.refused += 1
                return
            self.evicted += 1
            self._forget(oldest)
        self._entries[key] = (entry, self.lookups, copied)
        self.bytes += size

    def forget(self, key: str) -> None:
        """Take an entry out of memory, if it is there."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if key in self._entries:
            self.bytes -= sum(tensor.nbytes for tensor in self._entries.pop(key)[0].values())

    def _write(self) -> None:
        """Hand complete copies to the store."""
        while self._copying and (self._copying[0][2] is None or self._copying[0][2].query()):
            key, entry, _ = self._copying.popleft()
            self._safely(lambda key=key, entry=entry: self.store.put({_name(key, path): tensor for path, tensor in entry.items()}))
            if self.store is None:
                return

    def flush(self) -> None:
        """Write what waits, so that others see it."""
        with self._lock:
            if self.store is not None:
                self._safely(lambda: _flush(self.store, self._copying))

    def _safely(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            warnings.warn(f"{self.store.folder} cannot be written ({error.strerror or error}): features stay in memory only", stacklevel=4)
            self._at_end.detach()
            self._copying.clear()
            self.store = None


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True).contiguous()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)


def _name(key: str, path: Any) -> str:
    return f"{key}/{'/'.join(map(str, path))}"


def _flush(store: FeatureStore, copying: deque) -> None:
    while copying:
        key, entry, copied = copying.popleft()
        if copied is not None:
            copied.synchronize()
        store.put({_name(key, path): tensor for path, tensor in entry.items()})
    store.flush()
