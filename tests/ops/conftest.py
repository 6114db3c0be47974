"""Shared by all op tests: errors against float64 truth, subsets of gradients, saved bytes, FLOPs, the compiler."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpeft import _library

# What no mode but the first has another form of, or calls one of: another run would repeat it
ALIKE = ("absorbed_attention", "attention_backends", "attention_dq", "attention_masks", "attention_scores", "gemm", "launching")
ON_ATEN = ("mm_adapter", "norm_mm_adapter", "prefix_attention", "tree_attention")  # on a CPU, unless Triton is asked for
if _library.FORCED == "triton":  # row-wise ops have no Triton form: this run would repeat the composite one
    without = ("activations", "attention_inputs", "clamped_swiglu", "expert_linear", "layer_norm", "relu", "rescale", "rms_norm", "rotary")
    collect_ignore = [f"test_{op}.py" for op in (*without, *ALIKE)]
elif _library.FORCED == "composite" and "lookalike" not in sys.modules:
    collect_ignore = [f"test_{op}.py" for op in (*ALIKE, *ON_ATEN)]

# Grace where PyTorch's own error is (nearly) zero: half a unit in the last place for dtypes rounded once from float32, where it is luck
# which of two roundings is nearer; a few units for the dtypes sums are made in, which every order of summation moves.
GRACE = {torch.float64: 2**-46, torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _tensors(value) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


class Checks:
    """The fixture ``check``. Functions under test take their tensors positionally and return a tensor or a tuple of them."""

    @staticmethod
    def subsets(n: int):
        """Every way to require gradients of n inputs, the empty one included."""
        return itertools.product((False, True), repeat=n)

    @staticmethod
    def run(fn: Callable, inputs, needs=None, cotangents=None):
        """Outputs and gradients (None where not required) of ``fn`` on detached copies of ``inputs``, strides kept.

        Cotangents are drawn from a fixed seed, in float64, so that the same are used at every dtype.
        """
        leaves = [t if not isinstance(t, Tensor) else t.detach() for t in inputs]
        needs = needs if needs is not None else [isinstance(t, Tensor) and t.is_floating_point() for t in leaves]
        leaves = [t.requires_grad_() if need else t for t, need in zip(leaves, needs)]
        outputs = _tensors(fn(*leaves))
        assert any(o.requires_grad for o in outputs) == any(needs), "gradients are required iff an input requires one"
        grads = [None] * len(leaves)
        if any(needs):
            generator = torch.Generator().manual_seed(1)
            cotangents = cotangents or [
                torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) if o.dim() else torch.ones_like(o) for o in outputs
            ]
            live = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
            got = torch.autograd.grad([o for o, _ in live], [t for t, need in zip(leaves, needs) if need], [c for _, c in live])
            found = iter(got)
            grads = [next(found) if need else None for need in needs]
        return [o.detach() for o in outputs], grads

    @staticmethod
    def error(value: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
        """Largest difference, relative to the largest entry of the truth (``floor`` at least); nan counts as infinite."""
        assert value.shape == truth.shape, f"{tuple(value.shape)} is not {tuple(truth.shape)}"
        if truth.numel() == 0:
            return 0.0
        value, truth = value.double(), truth.double()
        error = (value - truth).abs().max() / truth.abs().max().clamp_min(floor)
        return float(error) if torch.isfinite(error) else float("inf")

    def no_worse(self, ours: Callable, reference: Callable, theirs: Callable, inputs, needs=None, floor: float = 1e-30):
        """Ours, outputs and gradients, is at most as far from the float64 truth as PyTorch is in the same dtype.

        ``reference`` runs in float64 and gives the truth; ``theirs`` runs in the inputs' dtype. ``floor``: the size of the terms
        where they cancel by construction, so that the truth itself is no measure.
        """
        wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
        got, got_grads = self.run(ours, inputs, needs)
        torchs, torch_grads = self.run(theirs, inputs, needs)
        truth, true_grads = self.run(reference, wide, needs)
        dtype = inputs[0].dtype
        for i, (value, other, exact) in enumerate(zip(got + got_grads, torchs + torch_grads, truth + true_grads)):
            if exact is None:
                assert value is None
                continue
            error, own = self.error(value, exact, floor), self.error(other, exact, floor)
            what = f"output {i}" if i < len(got) else f"gradient {i - len(got)}"
            assert error <= own + GRACE[dtype], f"{what}: error {error:.2e}, and PyTorch's own is {own:.2e}"
        for value, given in zip(got_grads, inputs):
            assert value is None or value.dtype == given.dtype
        return got, got_grads

    @staticmethod
    def saved_bytes(fn: Callable, inputs, free=()) -> int:
        """Bytes autograd keeps for backward, each storage once, without those of ``free`` (parameters, tables: alive anyway)."""
        kept, exempt = {}, {t.untyped_storage().data_ptr() for t in free}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in exempt:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = fn(*inputs)
        del out
        return sum(kept.values())

    @staticmethod
    def flops(fn: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            fn()
        return counter.get_total_flops()

    def compiles(self, fn: Callable, inputs, needs=None, backend: str = "aot_eager", rtol: float = 1e-6):
        """``torch.compile(fullgraph=True)`` gives what eager gives."""
        torch._dynamo.reset()
        compiled = torch.compile(fn, fullgraph=True, backend=backend)
        got, want = self.run(compiled, inputs, needs), self.run(fn, inputs, needs)
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert (value is None) == (exact is None)
            if value is not None:
                torch.testing.assert_close(value, exact, rtol=rtol, atol=rtol)

    def deterministic(self, fn: Callable, inputs, needs=None):
        first, second = self.run(fn, inputs, needs), self.run(fn, inputs, needs)
        for a, b in zip(first[0] + first[1], second[0] + second[1]):
            assert a is b is None or torch.equal(a, b)


@pytest.fixture
def check() -> Checks:
    return Checks()


def _beside(name: str):
    """A module of this folder. Tests are no package, so it is loaded by its path."""
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def norms():
    """What both norms are tested for: _norms.py."""
    return _beside("_norms.py")


TABLE = _beside("_table.py").TABLE


@pytest.fixture(scope="session")
def table():
    return TABLE


# csrc has them
ROW_WISE = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "gelu", "swiglu", "geglu", "rescale", "rotary", "attention_inputs")


def pytest_generate_tests(metafunc):
    """A test that takes ``row`` runs over every op of _table.py; in Triton's mode over those with a kernel, on csrc's CUDA sources over
    the row-wise ones."""
    if "row" in metafunc.fixturenames:
        names = [name for name, op in TABLE.items() if op.tile or _library.FORCED != "triton"]
        names = ROW_WISE if "FASTPEFT_LIBRARY" in os.environ else names
        metafunc.parametrize("row", [TABLE[name] for name in names], ids=names)
