"""csrc's CUDA kernels at the shapes they are made for, run on the CPU by tests/cuda/cuda_runtime.h: `make test-cuda`."""

import ctypes
import importlib
import itertools
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastpeft import _library, ops
from fastpeft.ops.activations import gelu_reference, swiglu_reference
from fastpeft.ops.layer_norm import layer_norm_reference
from fastpeft.ops.rescale import rescale_reference
from fastpeft.ops.rms_norm import rms_norm_reference
from fastpeft.ops.rotary import rotary_reference

pytestmark = pytest.mark.skipif("FASTPEFT_LIBRARY" not in os.environ, reason="make test-cuda compiles the CUDA sources for the CPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# whole warps and idle lanes, one to four Packs a thread; of float32 more than a block holds; odd ones go an element at a time
WIDTHS = [8, 256, 768, 1024, 1288, 2048, 3072, 4096, 5120, 6152, 8192, 4099]


def test_the_cuda_sources_serve():
    assert _library.native_missing == ""
    served = _library.backend_of()
    some = ("layer_norm_bwd", "rms_norm_fwd", "rescale_bwd", "rotary", "gelu_fwd", "attention_inputs_bwd")
    assert all(served[op]["CPU"] == "native" for op in some)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_norms(check, n, dtype):
    """Seventeen rows: no multiple of those a block takes. All gradients, dx alone, parameters alone; rows of a wider tensor; a residual."""
    wide = torch.randn(17, 2 * n).to(dtype)
    (weight, bias), residual = torch.randn(2, n).to(dtype).unbind(0), torch.randn(17, n).to(dtype)

    def layer(x, *params):
        return F.layer_norm(x, (n,), *params, 1e-5)

    def layer_sum(x, r, *params):
        return layer(x + r, *params), x + r

    def rms_sum(x, r, w):
        return rms_norm_reference(x + r, w, 1e-6), x + r

    for x in (wide[:, :n].contiguous(), wide[:, n:]):
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, True, True), (True, False, True)):
            check.no_worse(ops.layer_norm, lambda *a: layer_norm_reference(*a, 1e-5), layer, [x, weight, bias], needs)
            theirs = lambda *a: rms_norm_reference(*a, 1e-6)  # noqa: E731
            check.no_worse(ops.rms_norm, theirs, theirs, [x, weight], needs[:2])
    check.no_worse(ops.add_layer_norm, layer_sum, layer_sum, [x, residual, weight, bias])
    check.no_worse(ops.add_rms_norm, rms_sum, rms_sum, [x, residual, weight])


@pytest.mark.parametrize("n", [16384, 16392])
def test_norms_of_rows_that_backward_or_neither_holds(check, n):
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((2, n), (n,), (n,)))
    reference = lambda *a: layer_norm_reference(*a, 1e-5)  # noqa: E731
    check.no_worse(ops.layer_norm, reference, reference, [x, weight, bias])


@pytest.mark.parametrize("n", [512, 768, 1024])
def test_norms_of_more_rows_than_are_under_way(check, n):
    """A block's groups walk over rows, of which two are read ahead, and stop in different rounds."""
    dy, both, dh = torch.randn(3, 203, 2 * n).bfloat16().unbind(0)
    dy, h, dh = (t[:, :n] for t in (dy, both, dh))  # rows further apart than they are wide
    weight, bias = torch.randn(2, n).bfloat16().unbind(0)
    exact = [t.double().requires_grad_() for t in (h, weight, bias)]
    true = torch.autograd.grad(layer_norm_reference(*exact, 1e-5), exact, dy.double())
    mean, rstd = h.double().mean(-1).float(), (h.double().var(-1, correction=0) + 1e-5).rsqrt().float()
    for carry in (None, dh):
        backward = partial(torch.ops.fastpeft.layer_norm_bwd, dy, h, weight, mean, rstd, carry, True)
        first, again, (alone, *_) = backward(True, True), backward(True, True), backward(False, False)
        assert all(torch.equal(one, two) for one, two in zip(first, again))
        assert torch.equal(first[0], alone)
        for got, want in zip(first, (true[0] if carry is None else true[0] + carry, *true[1:])):
            assert check.error(got, want) <= 2**-8


@pytest.mark.parametrize("n", [768, 4099])
def test_a_norms_backward_is_two_launches(n):
    """The rows, then the sums of both parameters together; one where there is nothing to sum."""
    launches = ctypes.CDLL(os.environ["FASTPEFT_LIBRARY"]).emulated_launches
    for norm, params in ((ops.layer_norm, 2), (ops.rms_norm, 1)):
        for needs in itertools.product((False, True), repeat=1 + params):
            leaves = [t.requires_grad_(need) for t, need in zip((torch.randn(40, n), *torch.randn(params, n)), needs)]
            if not (needs[0] or needs[1]):  # a bias alone is one sum of ATen's
                continue
            y = norm(*leaves)
            before = launches()
            y.backward(torch.ones_like(y))
            assert launches() - before == (2 if any(needs[1:]) else 1), needs


def test_the_driver_is_asked_once():
    """How many blocks a multiprocessor holds, and for more shared memory: not at every call, which takes the host microseconds."""
    asked = ctypes.CDLL(os.environ["FASTPEFT_LIBRARY"]).emulated_asked
    for n in (776, 4104):
        x, weight = torch.randn(9, n, requires_grad=True), torch.randn(n, requires_grad=True)
        ops.rms_norm(x, weight).sum().backward()
        before = asked()
        for _ in range(3):
            ops.rms_norm(x, weight).sum().backward()
        assert asked() == before > 0


def test_a_grid_has_an_end(check):
    """More columns than a grid has room for at 65,535 blocks of them; on the CPU that is seven."""
    gate, up, scale = torch.randn(3, 7 * 256 + 300, dtype=torch.float64).unbind(0)
    for needs in ((True, True, True), (False, False, True)):
        check.no_worse(ops.swiglu, swiglu_reference, swiglu_reference, [gate[None], up[None], scale], needs)
    wide = torch.randn(3, 2 * 7 * 256 + 3)[:, 1:]
    check.no_worse(ops.gelu, gelu_reference, gelu_reference, [wide, torch.randn(wide.shape[1])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters(check, dtype):
    x, weight, bias = torch.randn(9, 768).to(dtype), torch.randn(768), torch.randn(768)
    reference = lambda *a: layer_norm_reference(*a, 1e-5)  # noqa: E731
    check.no_worse(ops.layer_norm, reference, reference, [x, weight, bias])
    check.no_worse(ops.rescale, rescale_reference, rescale_reference, [x, weight])
    check.no_worse(ops.swiglu, swiglu_reference, swiglu_reference, [x, x.flip(0), weight])


def test_more_rows_than_partial_sums(check):
    x, weight, bias = torch.randn(4000, 24), torch.randn(24), torch.randn(24)
    reference = lambda *a: layer_norm_reference(*a, 1e-5)  # noqa: E731
    check.no_worse(ops.layer_norm, reference, reference, [x, weight, bias])
    check.no_worse(ops.layer_norm, reference, reference, [x, weight, bias], (True, False, False))
    check.no_worse(ops.rescale, rescale_reference, rescale_reference, [x, weight])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescale(check, dtype):
    tokens = torch.randn(2, 37, 3 * 64).to(dtype)
    heads = tokens.view(2, 37, 3, 64).transpose(1, 2)  # [B, H, M, d], stored [B, M, H, d]
    wide = torch.randn(5, 11008).to(dtype)
    cases = [(heads, (3, 1, 64)), (heads, (64,)), (heads, (3, 1, 1)), (heads, (2, 3, 37, 64)), (heads, ()), (heads, (2, 1, 37, 1))]
    cases += [(tokens, (192,)), (tokens, (37, 192)), (wide, (11008,)), (wide, (5, 1)), (wide[:, 1:], (1,)), (wide[:, 1:9], (8,))]
    for x, shape in cases:
        for needs in ((True, True), (True, False), (False, True)):
            check.no_worse(ops.rescale, rescale_reference, rescale_reference, [x, torch.randn(shape).to(dtype)], needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [96, 2048, 11008])
def test_activations(check, n, dtype):
    both = torch.randn(7, 2 * n).to(dtype)
    gate, up, scale = both[:, :n], both[:, n:], torch.randn(n).to(dtype)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        check.no_worse(ops.swiglu, swiglu_reference, swiglu_reference, [gate, up, scale], needs)
    check.no_worse(ops.gelu, gelu_reference, gelu_reference, [gate, scale])
    check.no_worse(ops.gelu, gelu_reference, gelu_reference, [both[:, 1 : n + 1], scale])  # no row begins where a Pack can


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rot", [128, 64, 20])
def test_rotary(check, rot, dtype):
    wide = torch.randn(2, 9, 3, 144).to(dtype).transpose(1, 2)
    heads = wide[..., :128]
    angle = torch.rand(9, rot // 2).repeat(1, 2)
    for tables in ([angle.cos().to(dtype), angle.sin().to(dtype)], [angle.cos(), angle.sin()]):
        for x in (heads, heads.contiguous(), wide[..., 1 : rot + 9]):
            check.no_worse(ops.rotary, rotary_reference, rotary_reference, [x, *tables], (True, False, False))


def philox(counter: int, key: int) -> list[int]:
    """Philox4x32-10, as its authors write it; held to their known answer below."""
    c, k, low = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32], 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_dropout(dtype):
    """Philox's own numbers, whatever the width of a load: whole Packs, a tail, a tensor that begins between two, a permuted one."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    op, seed, index, p = torch.ops.fastpeft.dropout, torch.tensor([(5 << 32) + 77]), 3, 0.3
    wide = torch.randn(43 * 30 + 1).to(dtype)
    for x in (wide[:1200].view(40, 30), wide[:-1].view(43, 30), wide[1:].view(43, 30), wide[:1200].view(40, 30).t(), wide[:0], wide[5]):
        numbers = [n for i in range(-(-x.numel() // 4)) for n in philox(i, int(seed) + index)][: x.numel()]
        keep = torch.tensor(numbers, dtype=torch.float64).view(x.shape) >= p * 2**32
        want = torch.where(keep, x.to(torch.promote_types(dtype, torch.float32)) / (1 - p), 0.0)
        y = op(x, p, seed, index)
        assert y.dtype == dtype and y.is_contiguous()
        torch.testing.assert_close(y, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert torch.equal(y == 0, ~keep | (x == 0))
    launches = ctypes.CDLL(os.environ["FASTPEFT_LIBRARY"]).emulated_launches
    x, before = torch.randn(300, 77, requires_grad=True), launches()
    y = ops.dropout(x, 0.25)
    assert launches() - before == 1
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert launches() - before == 2
    assert torch.equal(grad == 0, y == 0) and abs((y == 0).double().mean() - 0.25) < 0.01


INPUTS = importlib.import_module("fastpeft.ops.attention_inputs")  # fastpeft.ops has the function under that name


def test_attention_inputs_launches():
    """All sides in one launch; in backward one more for the sum of each parameter."""
    launches = ctypes.CDLL(os.environ["FASTPEFT_LIBRARY"]).emulated_launches
    angle = torch.rand(1, 9, 32).repeat(1, 1, 2)
    how = INPUTS._How(angle.cos(), angle.sin(), *torch.randn(2, 64), *torch.randn(2, 2, 64), *torch.randn(2, 2, 3, 64))
    for trained in ((), ("q_norm", "k_norm"), ("l_k", "l_v"), ("q_norm", "k_norm", "l_k", "l_v")):
        how = how._replace(**{name: t.detach().requires_grad_(name in trained) for name, t in how._asdict().items()})
        q, k, v = (torch.randn(2, 9, heads, 64, requires_grad=True) for heads in (4, 2, 2))
        before = launches()
        outputs = INPUTS._together(q, k, v, how, INPUTS._Form(1e-6))
        assert launches() - before == 1
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        assert launches() - before == 2 + len(trained)


def test_attention_inputs_stops_what_it_cannot_do():
    x = torch.randn(1, 2, 1, 514)
    with pytest.raises(RuntimeError, match="512 at most"):
        INPUTS._together(x, x, x, INPUTS._How(l_k=torch.ones(1, 514)), INPUTS._Form())
    x = torch.randn(1, 2, 1, 64)
    with pytest.raises(RuntimeError, match="not kept"):
        torch.ops.fastpeft.attention_inputs_bwd(x, x, None, None, None, None, None, None, x[0, 0, 0], None, 0.0, 1e-6, None, None, 1)


def on_the_cpu(op, *args):
    """A call that reaches csrc's kernel whatever its tensors are."""
    return op.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)


def test_tensors_of_several_devices_are_refused():
    """A kernel that reads the host's memory ends CUDA for the whole process."""
    op, n = torch.ops.fastpeft, 8
    x, away = torch.randn(3, n), torch.empty(n, device="meta")
    rows, one = torch.empty(3, n, device="meta"), torch.ones(3)
    heads, far = torch.randn(1, 3, 1, n), torch.empty(1, 3, 1, n, device="meta")
    nothing = [None] * 10
    for call, *args in (
        (op.layer_norm_fwd, x, None, away, None, 1e-5, True),
        (op.layer_norm_fwd, x, rows, None, None, 1e-5, True),
        (op.layer_norm_bwd, x, x, away, one, one, None, True, True, False),
        (op.rms_norm_fwd, x, None, away, 1e-5, True),
        (op.rms_norm_bwd, rows, x, None, one, None, True, False),
        (op.rescale_fwd, x, away),
        (op.rescale_bwd, x, x, away, True, False),
        (op.rotary, x, rows, rows, False),
        (op.swiglu_fwd, x, rows, None),
        (op.gelu_fwd, x, away, "none"),
        (op.gelu_bwd, rows, x, None, "none", True, False),
        (op.attention_inputs_fwd, heads, far, heads, *nothing[:4], 0.0, 1e-5, *nothing[:4], 0, 0),
        (op.attention_inputs_bwd, None, heads, far, *nothing[:7], 0.0, 1e-5, None, None, 6),
    ):
        with pytest.raises(RuntimeError, match="several devices; move them"):
            on_the_cpu(call, *args)
