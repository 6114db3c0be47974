"""What an op moves through memory: its launches, and the wide tensors that each is handed. It guards the byte models in docstrings.

A launch is an operator of ATen or csrc that computes, or a Triton kernel. It is counted with every tensor that it reads or makes, once, as
if tiles that are read again came from the caches; with what it changes in place twice, where it reads that first. Views, and memory that is
only set aside, move nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastpeft import _library

WRITES_ONLY = ("copy_", "fill_", "zero_", "bernoulli_")
SETS_ASIDE = ("empty", "new_empty", "empty_like", "empty_strided")


def _key(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride()


class Traffic(TorchDispatchMode):
    """``launches``: (name, elements of each tensor that it is handed) of each, inside fastpeft's operators too. ``programs``: of each of
    Triton's, how many."""

    def __init__(self):
        super().__init__()
        self.launches: list[tuple[str, list[int]]] = []
        self.programs: list[int] = []

    def moved(self, **wide: int) -> dict[str, int]:
        """How often a tensor of so many elements is read or written, by the names given; others, which are narrow, are left out."""
        sizes = [n for _, several in self.launches for n in several]
        return {name: sizes.count(n) for name, n in wide.items() if n in sizes}

    @property
    def kernels(self) -> list[str]:
        """Triton's, and the products that ATen computes, by name."""
        products = ("mm", "addmm", "addmm_", "linear", "matmul")
        return [name for name, _ in self.launches if name in products or name.endswith("_kernel")]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if func.namespace == "fastpeft" and _library.backend_of()[name]["CPU"] != "native":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        viewed = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func.namespace not in ("aten", "fastpeft") or viewed or name in SETS_ASIDE:
            return out
        seen = {_key(t): t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        again = [args[0].numel()] if changed and "out" not in changed and name not in WRITES_ONLY else []
        self.launches.append((name, [*seen.values(), *again]))
        return out

    @contextlib.contextmanager
    def counted(self) -> Iterator[Traffic]:
        """With Triton's kernels, too, where its interpreter runs them."""
        with contextlib.ExitStack() as stack:
            if _library.FORCED == "triton":
                stack.enter_context(self._kernels())
            yield stack.enter_context(self)

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def told(executor, *args, **kwargs):
            tensors = {_key(t): t.numel() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
            self.launches.append((executor.fn.__name__, list(tensors.values())))
            self.programs.append(math.prod(executor.grid))
            with _disable_current_modes():  # the interpreter copies tensors to where it is and back
                return launch(executor, *args, **kwargs)

        GridExecutor.__call__ = told
        try:
            yield
        finally:
            GridExecutor.__call__ = launch
