"""How Triton's kernels are launched: on their tensors' device, within the card's shared memory, compiled once for all lengths."""

import importlib
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from fastpeft import _cards, _library
from fastpeft.ops import _tiled

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
OP = "launching_probe"


@pytest.fixture
def kernels(monkeypatch):
    """A module of kernels with a launcher ``probe``, and what it was called with."""
    module, calls = types.ModuleType("fastpeft.kernels.probe"), []
    module.probe = lambda *args: calls.append(args) or "triton"
    monkeypatch.setitem(sys.modules, "fastpeft.kernels.probe", module)
    monkeypatch.setattr(_library, "_served", {"probe": {"CPU": "triton"}})
    return module, calls


class Tensor(torch.Tensor):
    """Says that it lies on cuda:1."""

    device = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch):
    """[the device that is current]."""
    current = [0]

    class Guard:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    return current


def test_a_kernel_is_launched_on_its_tensors_device(kernels, current):
    module, seen = kernels[0], []
    module.probe = lambda *args: seen.append(current[0])
    launch = _tiled.triton_launcher("probe", "probe", None)
    launch([None, torch.ones(2).as_subclass(Tensor)], 3)
    launch(torch.ones(2))
    assert seen == [1, 0] and current == [0]
    with _tiled.on_device_of([torch.ones(1), torch.ones(1).as_subclass(Tensor)]):
        assert current == [1]


def test_the_losss_chunks_are_launched_on_its_tensors_device(current, monkeypatch):
    loss = importlib.import_module("fastpeft.ops.linear_cross_entropy")
    monkeypatch.setattr(loss, "chunked", lambda rows, *args: current[0])
    assert (loss._triton(torch.ones(2).as_subclass(Tensor)), loss._triton(torch.ones(2)), current) == (1, 0, [0])


def test_float64_and_what_does_not_fit_run_on_aten(kernels):
    module, calls = kernels
    card = importlib.import_module("fastpeft.kernels.card")
    launch = _tiled.triton_launcher("probe", "probe", lambda *args: "aten", draws=True)
    seed = torch.zeros(1, dtype=torch.int64)
    assert launch([None, torch.ones(1).double()]) == "aten" and launch(torch.ones(1), seed) == "triton" and len(calls) == 1

    def too_large(*args):
        raise card.OutOfResources(114688, 101376, "shared memory")

    module.probe = too_large
    with pytest.warns(RuntimeWarning, match=r"probe runs on ATen here: out of resource: shared memory, Required: 114688"):
        assert launch(torch.ones(1)) == "aten"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch(torch.ones(1)) == "aten"  # said once
    assert "composite for some shapes (out of resource" in _library.backend_of()["probe"]["CPU"]
    with pytest.raises(RuntimeError, match="set dropout to 0"):  # ATen's backward would draw another mask
        launch(torch.ones(1), seed)


def test_float32_products_follow_either_of_pytorchs_settings():
    code = """
import torch
from fastpeft.kernels.card import ieee
m = torch.backends.cuda.matmul
found = [ieee()]
m.allow_tf32 = True; found.append(ieee())
m.allow_tf32 = False; found.append(ieee())
m.fp32_precision = "tf32"; found.append(ieee())
m.fp32_precision = "ieee"; found.append(ieee())
m.fp32_precision = "none"; torch.backends.fp32_precision = "tf32"; found.append(ieee())
print(found)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[True, False, True, False, True, False]"], done.stderr


# Every launcher on tensors of the CPU, no kernel run: what Triton would compile for each length, by the key that its launcher looks up
LENGTHS = """
import collections, importlib, json, os, pathlib, random, sys
os.environ |= {"TRITON_INTERPRET": "1", "FASTPEFT_BACKEND": "triton"}
sys.path.insert(0, "tests/ops")
import torch
from _table import TABLE
from fastpeft import ops
from fastpeft.ops.lora_linear import Projection
os.environ["TRITON_INTERPRET"] = "0"  # the operators are Triton's on the CPU; its kernels are those of a GPU
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

backend, binders, keys = make_backend(GPUTarget("cuda", 90, 32)), {}, collections.defaultdict(set)

def look_up(kernel, *args, grid, warmup, **kwargs):
    name = kernel.fn.__name__
    if name not in binders:
        binders[name] = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialised, options = binders[name](*args, debug=False, **kwargs)
    keys[name].add(str(specialised) + str(options))

JITFunction.run = look_up
turn = importlib.import_module("fastpeft.ops.excitor_turn")
turn.TURNS = {"cpu"}

def step(call, inputs, needs):
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs)]
    outputs = call(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], [torch.ones_like(o) for o in outputs])

def three_branches(x, W, *factors):
    branches = [Projection(W, None, a, b, 0.5) for a, b in zip(factors[::2], factors[1::2])]
    return ops.lora_linears(x, branches, dropout_p=0.1)

def turned(m):
    angle, draw = torch.rand(1, m, 32).repeat(1, 1, 2), lambda *shape: torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    q, k, rest = draw(2, 2, m, 64), draw(2, 2, m, 64), [draw(2, m, 128), draw(3, 128), draw(128, 3), draw(4, 128), draw(2)]
    out = turn.excitor_turn(q, k, (angle.cos(), angle.sin()), *rest)
    torch.autograd.grad(out, [q, k, *rest], [torch.ones_like(o) for o in out])

def prefix(m):
    q, o, lse, p = torch.randn(2, 4, m, 64), torch.randn(2, 4, m, 64), torch.randn(2, 4, m), torch.randn(2, 10, 64)
    for dq in (None, torch.randn(2, 4, m, 64)):
        torch.ops.fastpeft.prefix_attention_fwd(q, o, lse, p, p, 0.1)
        torch.ops.fastpeft.prefix_attention_bwd(o, q, o, lse, p, p, dq, 0.1, True)

def steps(m):
    for name, op in TABLE.items():
        if op.tile:
            inputs = op.inputs(m, 64, torch.bfloat16)
            step(op.call, inputs, op.needs(inputs))
    factors = [torch.randn(shape) for shape in ((3, 64), (9, 3)) * 3]
    step(three_branches, [torch.randn(m, 64), torch.randn(9, 64), *factors], [True, False] + [True] * 6)
    turned(m)
    prefix(m)

steps(48)  # as many forms as the launches have kinds
kinds = {name: len(found) for name, found in keys.items()}
random.seed(0)
for m in [1, 16, 17, *(random.randrange(1, 700) for _ in range(47))]:
    steps(m)
VARYING = {"M", "ROWS", "TOKENS", "STEPS", "SPANS", "SPANS_A", "SPANS_B", "index", "stride_lb", "stride_lh"}
told = {}
for file in pathlib.Path("kernels").glob("*.py"):
    for name, kernel in vars(importlib.import_module("fastpeft.kernels." + file.stem)).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            names = [p.name for p in kernel.params if not p.is_constexpr and p.name in VARYING]
            alone = {str(binders[name](*[n if p.name in names else 48 for p in kernel.params])[1]) for n in (1, 16, 17, 4096)}
            told[name] = [names, len(alone), kinds.get(name, 0), len(keys[name])]
print(json.dumps(told))
"""


def test_kernels_are_not_compiled_again_for_other_lengths():
    """By no number that varies; and fifty lengths take no more forms of a kernel than its kinds of launches. LoRA's: rows in multiples of
    16, other rows, of which a stacked branch's begin where 16 bytes do or not, and one row."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LENGTHS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "M" in found["_lora_pass_kernel"][0] and "STEPS" in found["_excitor_merge_fwd_kernel"][0]
    assert len(found) == 14 and all(kinds for *_, kinds, _ in found.values())
    assert {name: alone for name, (_, alone, *_) in found.items() if alone != 1} == {}
    most = {name: (4 if name.startswith("_lora") else 1) * kinds for name, (*_, kinds, _) in found.items()}
    assert {name: forms for name, (*_, forms) in found.items() if forms > most[name]} == {}


@pytest.mark.parametrize("limit", [99, 163, 227])
def test_blocks_leave_room_on_small_cards(limit):
    """At every rank, the passes' loops keep two tiles under way within the card's shared memory (bench/aot.py checks the sums)."""
    branch = importlib.import_module("fastpeft.kernels.lora_branch")
    for rank in (4, 16, 46, 64, 100, 128):
        for flags in ({"outer": True, "down": True}, {"outer": True, "up": True}):
            assert branch._pass_blocks(rank, 2, 4, limit << 10, **flags)["STAGES"] >= 3
        assert branch._down_blocks(8192, rank, 2, limit << 10)["num_stages"] >= 3


@pytest.mark.parametrize(
    "hip, found, built, reason",
    [
        (None, None, (13, 0), ""),
        (None, ((12, 8), [(9, 0)]), (12, 0), ""),
        (None, ((12, 8), [(9, 0)]), (13, 0), "csrc was built with CUDA 13.0, and the driver serves 12.8"),
        (None, ((13, 0), [(7, 5)]), (12, 0), "a card of compute capability 7.5: our kernels need 8.0"),
        (None, ((13, 0), [(9, 0), (7, 5)]), (12, 0), "a card of compute capability 7.5: our kernels need 8.0; hide it with CUDA"),
        ("6.2", None, (0, 0), "a ROCm build of torch"),
    ],
)
def test_kernels_of_ours_serve_only_cards_that_run_them(monkeypatch, hip, found, built, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_library, "cards", lambda: found)
    said = _library.cuda_unfit(built)
    assert said.startswith(reason) and bool(said) == bool(reason)
    monkeypatch.setattr(_library, "_native_cuda", built)
    monkeypatch.setattr(_library, "FORCED", "")
    assert not reason or _library._why_composite("CUDA", native=True, triton=False) == said


class Nvml:
    """Two cards, of compute capability 7.5 and 9.0 by bus; its functions write where they are pointed to."""

    def __init__(self, count=2):
        self.count = count

    nvmlInit_v2 = nvmlShutdown = lambda self: 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version):
        version._obj.value = 12080
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = self.count
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = [(7, 5), (9, 0)][device.value - 1]
        return 0


@pytest.mark.parametrize(
    "visible, order, count, wanted",
    [
        (None, None, 2, [(7, 5), (9, 0)]),
        ("1", "PCI_BUS_ID", 2, [(9, 0)]),
        ("0", "PCI_BUS_ID", 2, [(7, 5)]),
        ("1", None, 2, [(7, 5), (9, 0)]),  # the fastest is 0 there: 1 is the old one
        ("1,0", "PCI_BUS_ID", 2, [(9, 0), (7, 5)]),
        ("GPU-5f2c", "PCI_BUS_ID", 2, [(7, 5), (9, 0)]),
        ("3", "PCI_BUS_ID", 2, [(7, 5), (9, 0)]),
        (None, None, 0, None),
    ],
)
def test_the_cards_that_cuda_sees(monkeypatch, visible, order, count, wanted):
    monkeypatch.setattr(_cards.ctypes, "CDLL", lambda name: Nvml(count))
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert _cards.cards.__wrapped__() == (None if wanted is None else ((12, 8), wanted))


def test_the_machines_cards():
    found = _cards.cards()
    assert found is None or (len(found[0]) == 2 and all(len(capability) == 2 for capability in found[1]))
