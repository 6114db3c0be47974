"""The sanitizer of emulated CUDA kernels (tests/cuda/sanitizer.cpp): it finds planted faults, and none in csrc's kernels: `make test-cuda`.

Inputs are views between whose elements nobody may read, and which nobody may write; outputs and what lies between begin as nan; blocks and
threads run in several orders, which must give the same bits.
"""

import ctypes
import importlib
import os
import random
import re
import subprocess

import pytest
import torch

from fastpeft import ops

pytestmark = pytest.mark.skipif("FASTPEFT_LIBRARY" not in os.environ, reason="make test-cuda compiles the CUDA sources for the CPU")
ORDERS = (0, 1)  # forward and backward in turn, and one that is drawn
DTYPES = [torch.float32, torch.bfloat16]
INPUTS = importlib.import_module("fastpeft.ops.attention_inputs")  # fastpeft.ops has the function under that name


class Sanitizer:
    def __init__(self, check):
        self.check, path = check, os.environ["FASTPEFT_LIBRARY"]
        self.library = ctypes.CDLL(path)
        self.library.emulated_fault.restype = ctypes.c_char_p
        self.library.emulated_fault.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int]
        self.library.emulated_input.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self.library.emulated_shared.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]
        self.library.emulated_order.argtypes = [ctypes.c_uint64]
        for line in subprocess.run(["nm", "-SC", "--defined-only", path], capture_output=True, text=True, check=True).stdout.splitlines():
            place, size, kind, *name = line.split(maxsplit=3)
            if kind in "bB" and name and ")::" in name[0]:  # a static variable of a function
                self.library.emulated_shared(name[0].rpartition("::")[2].encode(), int(place, 16), int(size, 16))

    def guarded(self, t: torch.Tensor) -> torch.Tensor:
        """``t`` as it lies, in storage of its own, of which kernels may read t's elements and nothing else."""
        if not t.numel():
            return t.clone()
        storage = torch.empty(t.untyped_storage().nbytes() // t.itemsize, dtype=t.dtype)
        view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
        view.copy_(t)
        offsets = torch.arange(storage.numel()).as_strided(t.shape, t.stride(), t.storage_offset()).flatten().contiguous()
        self.library.emulated_input(storage.data_ptr(), offsets.data_ptr(), offsets.numel(), t.itemsize)
        return view

    def run(self, fn, inputs, needs=None):
        """Outputs and gradients, the same to the bit in every order."""
        runs = []
        for order in ORDERS:
            self.library.emulated_order(order)
            outputs, grads = self.check.run(fn, [self.guarded(t) for t in inputs], needs)
            runs.append([t for t in (*outputs, *grads) if t is not None])
        for other in runs[1:]:
            for first, again in zip(runs[0], other, strict=True):
                assert torch.equal(first, again) and first.isfinite().all()


@pytest.fixture
def sanitizer(check):
    torch.use_deterministic_algorithms(False)  # or ATen writes nan: the sanitizer's own tells what nobody wrote from what is nan
    sanitizer = Sanitizer(check)
    sanitizer.library.emulated_check(True)
    yield sanitizer
    sanitizer.library.emulated_check(False)
    sanitizer.library.emulated_order(0)


FAULTS = {  # what tests/cuda/faulty.cu calls them, in its order: what is said of them
    "sound": "",
    "sound copies": "",
    "no barrier": "race: reads|nobody wrote",
    "writes what others read": "race",
    "barrier of a warp": "race: reads|nobody wrote",
    "shuffle for a barrier": "race: reads|nobody wrote",
    "two counts": "different numbers of threads",
    "odd count": "no block has",
    "early return": "others do not reach",
    "barrier in a branch": "others do not reach",
    "lanes in two shuffles": "different shuffles",
    "half a warp": "others do not reach",
    "past a tensor": "past the end .*a tensor of",
    "before a tensor": "outside of all memory|past the end",
    "gap": "in a gap of a view",
    "writes an input": "writes an input",
    "past shared": "past the end|nobody wrote",
    "past dynamic": "past the end .*dynamic shared memory of 256 bytes",
    "unwritten shared": "reads shared memory that nobody wrote .*shared of 768 bytes",
    "unwritten tensor": "reads a tensor where nobody wrote",
    "one word": "race: writes",
    "sum without atomics": "race",
    "blocks write one word": "race: writes .*a tensor",
    "reads of another block": "race|nobody wrote",
    "no wait": "does not wait for an asynchronous copy",
    "no barrier after the wait": "race|does not wait",
    "copy over reads": "race",
    "copy left": "copies under way",
    "shared memory not asked for": "more shared memory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(sanitizer, fault):
    """In every order of threads, whatever the numbers turn out to be."""
    n = 100
    x = sanitizer.guarded(torch.ones(2 * n) if "cop" in fault or "wait" in fault else torch.ones(2 * n)[::2])
    for order in (0, 0, 1, 2, 3):
        sanitizer.library.emulated_order(order)
        y, other = torch.zeros(n), torch.empty(n)
        found = sanitizer.library.emulated_fault(list(FAULTS).index(fault), x.data_ptr(), y.data_ptr(), other.data_ptr(), n).decode()
        assert re.search(FAULTS[fault], found) if FAULTS[fault] else not found, found


def rows(m, n, dtype, offset=0):
    """[m, n], its rows further apart than they are wide, from an element on."""
    return torch.randn(m, n + 8 + offset).to(dtype)[:, offset : offset + n]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 8, 264, 301, 520, 776, 1288, 4104])
def test_norms(sanitizer, n, dtype):
    """One to four Packs a thread, one to eight warps a row, an element at a time; rows of a wider tensor, between two Packs too."""
    (weight, bias), m = torch.randn(2, n).to(dtype).unbind(0), 9 if n < 1000 else 3
    for x in (rows(m, n, dtype), rows(m, n, dtype, 1)):
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            sanitizer.run(ops.layer_norm, [x, weight, bias], needs)
            sanitizer.run(ops.rms_norm, [x, weight], needs[:2])
    sanitizer.run(ops.add_layer_norm, [x, rows(m, n, dtype), weight, bias])
    sanitizer.run(ops.add_rms_norm, [rows(m, n, dtype), x, weight.float()])
    sanitizer.run(ops.layer_norm, [x[:0], weight, bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_walk_over_rows(sanitizer, dtype):
    for n in (8, 768):
        x, params = rows(67, n, dtype), torch.randn(2, n).to(dtype)
        sanitizer.run(ops.add_layer_norm, [x, x.flip(0), *params])
        sanitizer.run(ops.rms_norm, [x, params[0]], (True, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 24, 257, 2056])
def test_activations(sanitizer, n, dtype):
    scale = torch.randn(n).to(dtype)
    for offset in (0, 3):
        gate, up = rows(7, n, dtype, offset), rows(7, n, dtype)
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            sanitizer.run(ops.swiglu, [gate, up, scale], needs)
        sanitizer.run(lambda *a: ops.geglu(*a, approximate="tanh"), [gate, up, scale])
        sanitizer.run(ops.gelu, [gate, scale])
        sanitizer.run(ops.gelu, [gate], (True,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescale_and_rotary(sanitizer, dtype):
    heads = rows(2 * 11, 3 * 40, dtype).view(2, 11, 3, 40).transpose(1, 2)
    wide = rows(5, 2100, dtype)
    cases = [(heads, (3, 1, 40)), (heads, (40,)), (heads, (3, 1, 1)), (heads, ()), (heads, (2, 1, 11, 1)), (heads, (2, 3, 11, 40))]
    for x, shape in [*cases, (wide, (2100,)), (wide, (5, 1)), (wide[:, 1:], (1,)), (wide[:, 3:12], (9,))]:
        for needs in ((True, True), (True, False), (False, True)):
            sanitizer.run(ops.rescale, [x, torch.randn(shape).to(dtype)], needs)
    for rot in (32, 20, 6):
        angle = torch.rand(11, rot // 2).repeat(1, 2)
        for x in (heads, heads[..., 3:], heads.contiguous()):
            sanitizer.run(ops.rotary, [x, angle.cos(), angle.sin()], (True, False, False))


def philox(key: int, counter: int) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011)."""
    keys, c = [key & 0xFFFFFFFF, key >> 32], [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    for _ in range(10):
        one, two = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(two >> 32) ^ c[1] ^ keys[0], two & 0xFFFFFFFF, (one >> 32) ^ c[3] ^ keys[1], one & 0xFFFFFFFF]
        keys = [(k + step) & 0xFFFFFFFF for k, step in zip(keys, (0x9E3779B9, 0xBB67AE85))]
    return c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(sanitizer, dtype):
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's known answer
    for x in (rows(5, 24, dtype), rows(3, 7, dtype), rows(1, 1031, dtype, 1)):
        sanitizer.run(lambda x: torch.ops.fastpeft.dropout(x, 0.3, torch.tensor([2**62]), 3), [x], (False,))
        kept = torch.tensor([philox(2**62 + 3, i // 4)[i % 4] >= int(0.3 * 2**32) for i in range(x.numel())]).view(x.shape)
        made = torch.ops.fastpeft.dropout(x, 0.3, torch.tensor([2**62]), 3)
        assert torch.equal(made, torch.where(kept, x.float() * (1 / 0.7), 0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, rot", [(64, 64), (80, 20), (6, 2), (512, 128), (72, 0)])
def test_attention_inputs(sanitizer, d, rot, dtype):
    q, k, v = rows(2 * 7, 9 * d, dtype).view(2, 7, 9, d).split([5, 2, 2], 2)  # a group takes two heads: one is left of five
    angle = torch.rand(1, 7, rot // 2).repeat(1, 1, 2)
    parameters = {"norms": torch.randn(2, d), "factors": torch.randn(2, 2, d), "prefix": torch.randn(2, 2, 3, d)}
    for kinds in (("norms", "factors", "prefix"), ("norms",), ("factors",), ()):
        given = [t.to(dtype) for kind in kinds for t in parameters[kind]]

        def call(q, k, v, *rest, kinds=kinds):
            rest = list(rest)
            tables = [rest.pop(0) for _ in range(2)] if rot else [None, None]
            how = {kind: (rest.pop(0), rest.pop(0)) for kind in kinds}
            how = INPUTS._How(*tables, *(t for kind in parameters for t in how.get(kind, (None, None))))
            return INPUTS._together(q, k, v, how, INPUTS._Form(1e-6, 1.0))

        tables = [angle.cos().to(dtype), angle.sin().to(dtype)] if rot else []
        sanitizer.run(call, [q, k, v, *tables, *given], (True, True, True, *(False for _ in tables), *(True for _ in given)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_drawn_shapes(sanitizer, seed, dtype):
    """Any width, number of rows, place of a row's first element, and subset of gradients."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6):
        widest = draw.randrange(4096, 9000) if draw.random() < 0.3 else 1
        n = draw.choice((draw.randrange(1, 600), 8 * draw.randrange(1, 300), widest))
        m = draw.randrange(1, 5 if n > 2000 else 40)
        x, other = (rows(m, n, dtype, draw.choice((0, 0, 1, 2, 8))) for _ in range(2))
        weight, bias = torch.randn(2, n).to(draw.choice((dtype, torch.promote_types(dtype, torch.float32)))).unbind(0)
        needs = [draw.random() < 0.7 for _ in range(4)]
        sanitizer.run(ops.add_layer_norm, [x, other, weight, bias], needs)
        sanitizer.run(ops.add_rms_norm, [x, other, weight], needs[:3])
        sanitizer.run(ops.swiglu, [x, other, weight], needs[:3])
        sanitizer.run(ops.gelu, [x, weight], needs[:2])
        shape = draw.choice(((n,), (m, 1), (m, n), ()))
        sanitizer.run(ops.rescale, [x, torch.randn(shape).to(weight.dtype)], needs[:2])
        if n % 2 == 0:
            rot = 2 * draw.randrange(1, n // 2 + 1)
            sanitizer.run(ops.rotary, [x, *torch.randn(2, m, rot).to(weight.dtype)], (needs[0], False, False))
