"""Memcheck and racecheck for Triton's kernels, in its interpreter: every address that a program reads or writes is looked at.

    memcheck    an address that lies in none of the launch's tensors, before or behind them or between a view's elements
    racecheck   an element that two programs write, or that one writes and another reads: on a GPU they run in any order
    grids       more programs than a card launches
    dots        tl.dot over fewer than 16 terms, which the interpreter takes and the compiler does not
    initcheck   tests/conftest.py fills what torch.empty gives with NaN

An access is kept by the element, with the program that made it; masked lanes touch nothing. Atomics are not looked at: no kernel has any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor

NOBODY, SEVERAL = -1, -2
MOST_PROGRAMS = 65535  # along any axis of a grid but the first
LEAST = 16  # terms of tl.dot
PATCHED = ("create_masked_load", "create_masked_store", "create_dot", "set_grid_idx")


class Fault(AssertionError):
    """A kernel touched what is not its own."""


class _Region:
    """Memory of tensors of one launch that overlap: which units of it belong to them, and which program read and wrote each."""

    def __init__(self, tensors: list[Tensor]):
        self.unit = min(t.element_size() for t in tensors)
        self.begin = min(t.data_ptr() for t in tensors)
        self.end = max(_end(t) for t in tensors)
        size = (self.end - self.begin) // self.unit
        self.owned = np.zeros(size, bool)
        for t in tensors:
            ratio = t.element_size() // self.unit
            place = self.owned[(t.data_ptr() - self.begin) // self.unit :]
            strides = [stride * ratio * place.itemsize for stride in t.stride()] + [place.itemsize]
            np.lib.stride_tricks.as_strided(place, (*t.shape, ratio), strides)[...] = True
        self.reader, self.writer = np.full(size, NOBODY, np.int32), np.full(size, NOBODY, np.int32)

    def read(self, index: np.ndarray, program: int) -> bool:
        before = self.reader[index]
        self.reader[index] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
        return bool(np.isin(self.writer[index], (NOBODY, program)).all())

    def write(self, index: np.ndarray, program: int) -> bool:
        alone = np.isin(self.writer[index], (NOBODY, program)).all() and np.isin(self.reader[index], (NOBODY, program)).all()
        self.writer[index] = program
        return bool(alone)


def _end(t: Tensor) -> int:
    return t.data_ptr() + (sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) + 1) * t.element_size()


class Sanitizer:
    """``launches``: the names of the kernels that were looked at."""

    def __init__(self):
        self.launches: list[str] = []
        self._regions: list[_Region] = []
        self._name, self._program = "", 0

    def _begin(self, name: str, tensors: list[Tensor]) -> None:
        self.launches.append(name)
        self._name, groups = name, []
        for t in sorted((t for t in tensors if t.numel()), key=lambda t: t.data_ptr()):
            if groups and t.data_ptr() < max(map(_end, groups[-1])):
                groups[-1].append(t)
            else:
                groups.append([t])
        self._regions = [_Region(group) for group in groups]

    def _touch(self, pointers, mask, write: bool) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        left = np.unique(np.asarray(pointers.data)[np.asarray(mask.data, bool)].ravel()).astype(np.int64)
        for region in self._regions:
            inside = (left >= region.begin) & (left < region.end)
            if not inside.any():
                continue
            first, left = (left[inside] - region.begin) // region.unit, left[~inside]
            index = (first[:, None] + np.arange(width // region.unit)).ravel()
            if index[-1] >= len(region.owned) or not region.owned[index].all():
                self._fail(write, "between the elements of a tensor")
            if not (region.write if write else region.read)(index, self._program):
                self._fail(write, f"what another one {'touches' if write else 'writes'}")
        if len(left):
            self._fail(write, "outside its tensors")

    def _fail(self, write: bool, where: str) -> None:
        raise Fault(f"{self._name}: program {self._program} {'writes' if write else 'reads'} {where}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[Sanitizer]:
        from triton.runtime import interpreter

        builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
        load, store, dot, set_program = (getattr(builder, name) for name in PATCHED)

        def begun(executor, *args, **kwargs):
            if max((0, *executor.grid[1:])) > MOST_PROGRAMS:
                raise Fault(f"{executor.fn.__name__}: a grid of {executor.grid}")
            self._begin(executor.fn.__name__, [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
            return launch(executor, *args, **kwargs)

        def watched_load(builder, pointers, mask, *rest):
            self._touch(pointers, mask, write=False)
            return load(builder, pointers, mask, *rest)

        def watched_store(builder, pointers, value, mask, *rest):
            self._touch(pointers, mask, write=True)
            return store(builder, pointers, value, mask, *rest)

        def watched_dot(builder, a, b, *rest):
            if a.data.shape[-1] < LEAST:
                raise Fault(f"{self._name}: tl.dot of {a.data.shape} and {b.data.shape}")
            return dot(builder, a, b, *rest)

        def set_watched(builder, *index):
            _, ny, nz = builder.grid_dim
            self._program = (index[0] * ny + index[1]) * nz + index[2]
            return set_program(builder, *index)

        interpreter.GridExecutor.__call__ = begun
        for name, function in zip(PATCHED, (watched_load, watched_store, watched_dot, set_watched)):
            setattr(builder, name, function)
        try:
            yield self
        finally:
            interpreter.GridExecutor.__call__ = launch
            for name, function in zip(PATCHED, (load, store, dot, set_program)):
                setattr(builder, name, function)
