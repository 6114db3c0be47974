"""gelu, swiglu and geglu, with and without an (IA)^3 scale, against PyTorch, with float64 as the truth."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastpeft import _library
from fastpeft.ops import geglu, gelu, swiglu
from fastpeft.ops.activations import geglu_reference, gelu_reference, swiglu_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 252, 257, 901]


def their_swiglu(gate, up, scale=None):
    y = F.silu(gate) * up
    return y if scale is None else y * scale


def their_gelu(x, scale):
    return F.gelu(x) * scale


SWIGLU = (swiglu, swiglu_reference, their_swiglu)
GELU = (gelu, gelu_reference, their_gelu)


def geglus(approximate):
    def theirs(gate, up, scale=None):
        y = F.gelu(gate, approximate=approximate) * up
        return y if scale is None else y * scale

    return [partial(geglu, approximate=approximate), partial(geglu_reference, approximate=approximate), theirs]


def make(n, dtype, rows=(3, 5)):
    return [(torch.randn(*rows, n) * 3).to(dtype), torch.randn(*rows, n).to(dtype), torch.randn(n).to(dtype)]


def test_backend():
    want = "native" if (_library.FORCED or "native") == "native" else "composite"
    assert _library.backend_of()["swiglu_bwd"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_every_gradient_subset(check, n, dtype):
    gate, up, scale = make(n, dtype)
    floor = 1.0 if n == 1 else 1e-30  # the sum of one column may cancel
    for needs in check.subsets(3):
        check.no_worse(*SWIGLU, [gate, up, scale], needs, floor=floor)
    for needs in check.subsets(2):
        check.no_worse(*SWIGLU, [gate, up], needs)
        check.no_worse(*GELU, [gate, scale], needs, floor=floor)


def test_plain_and_tanh_gelu(check):
    for dtype in DTYPES:
        x, _, scale = make(257, dtype)
        check.no_worse(gelu, gelu_reference, F.gelu, [x])
        tanh = [lambda x, s: gelu(x, s, "tanh"), lambda x, s: gelu_reference(x, s, "tanh"), lambda x, s: F.gelu(x, approximate="tanh") * s]
        check.no_worse(*tanh, [x, scale])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu(check, dtype, approximate):
    for n in (1, 257):
        inputs, floor = make(n, dtype), 1.0 if n == 1 else 1e-30
        for needs in check.subsets(3):
            check.no_worse(*geglus(approximate), inputs, needs, floor=floor)
        check.no_worse(*geglus(approximate), inputs[:2])
    gate, up, scale = make(257, dtype, rows=(300,))
    check.no_worse(*geglus(approximate), [gate.t().contiguous().t(), up[:1].expand(300, 257), scale[:1].expand(257)])


def test_tanh_gelus_slope(check):
    """Where the sigmoid is nearly 1, next to the exponential's clamp, and far outside."""
    x, one = torch.linspace(-12, 12, 20001)[:, None], torch.ones(1)
    theirs = lambda x, s: F.gelu(x, approximate="tanh") * s  # noqa: E731
    check.no_worse(lambda x, s: gelu(x, s, "tanh"), lambda x, s: gelu_reference(x, s, "tanh"), theirs, [x, one], (True, False))
    far = torch.tensor([[60.0], [-60.0], [1e4], [-1e4], [1e38], [-1e38]], requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(far, one, "tanh").sum(), far)
    if _library.FORCED == "":  # ATen's is nan in the last two
        assert torch.equal(slope[:, 0], torch.tensor([1.0, 0.0] * 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_strides_and_wide_scales(check, dtype):
    gate, up, scale = make(257, dtype, rows=(300,))
    check.no_worse(*SWIGLU, [gate, up, scale])
    check.no_worse(*GELU, [gate, scale])
    both = torch.randn(3, 5, 514).to(dtype)
    check.no_worse(*SWIGLU, [*both.chunk(2, -1), scale])  # halves of one projection, read in place
    check.no_worse(*SWIGLU, [gate.t().contiguous().t(), up[:1].expand(300, 257), scale[:1].expand(257)])
    if dtype == torch.bfloat16:
        wide = [lambda g, u, s: swiglu(g, u, s), swiglu_reference, lambda g, u, s: their_swiglu(g, u, s.bfloat16())]
        check.no_worse(*wide, [gate, up, scale.float()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(check, dtype):
    """The sigmoid's own exponential: where it saturates, underflows, and next to its clamps."""
    top = 6e4 if dtype == torch.float16 else 1e38
    gate = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 20, -20, 86.9, -86.9, 88.1, -88.1, 104, -104, 1e3, -1e3, top, -top]).to(dtype)
    check.no_worse(*SWIGLU, [gate, torch.ones_like(gate)])
    odd = torch.tensor([float("nan"), float("inf")]).to(dtype)
    assert torch.equal(swiglu(odd, torch.ones_like(odd)).isnan(), torch.tensor([True, False]))


def test_exponential_is_exact_to_two_units():
    gate = torch.linspace(-30, 30, 20001)
    truth = swiglu_reference(gate.double(), torch.ones_like(gate, dtype=torch.float64))
    error = (swiglu(gate, torch.ones_like(gate)).double() - truth).abs() / truth.abs().clamp_min(1e-30)
    assert error.max() < 4 * 2**-23


def test_empty_batch(check):
    empty, scale = torch.empty(2, 0, 7), torch.ones(7)
    (y,), (dgate, _dup, dscale) = check.run(swiglu, [empty, empty, scale])
    assert y.shape == dgate.shape == empty.shape and not dscale.any()
    assert not check.run(gelu, [empty, scale])[1][1].any()


def test_saved_bytes(check):
    gate, up, scale = make(257, torch.bfloat16)

    def saved(fn, needs, *inputs):
        inputs = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs)]
        return check.saved_bytes(fn, inputs, free=[t for t in inputs if t.dim() == 1])

    assert saved(swiglu, (True, True), gate, up) == gate.nbytes + up.nbytes
    assert saved(swiglu, (False, True), gate, up) == gate.nbytes
    assert saved(swiglu, (False, False, True), gate, up, scale) == gate.nbytes + up.nbytes
    assert saved(geglu, (True, True), gate, up) == gate.nbytes + up.nbytes
    assert saved(geglu, (False, True), gate, up) == gate.nbytes
    assert saved(gelu, (True, True), gate, scale) == gate.nbytes  # the scale's gradient needs no activation
    assert saved(gelu, (False, False), gate, scale) == 0


def test_reference_gradients():
    gate, up, scale = (t.requires_grad_() for t in make(7, torch.float64, rows=(2,)))
    for fn in (swiglu, swiglu_reference):
        assert torch.autograd.gradcheck(fn, (gate, up, scale))
    for fn in (gelu, gelu_reference):
        assert torch.autograd.gradcheck(fn, (gate, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_operators(dtype):
    gate, up, scale = make(7, dtype)
    ops = torch.ops.fastpeft
    torch.library.opcheck(ops.swiglu_fwd, (gate, up, None))
    torch.library.opcheck(ops.swiglu_bwd, (gate, gate, up, scale, True, True, True))
    torch.library.opcheck(ops.swiglu_bwd, (gate, gate, None, None, False, True, False))
    torch.library.opcheck(ops.gelu_fwd, (gate, scale, "none"))
    torch.library.opcheck(ops.gelu_bwd, (up, gate, scale, "none", True, True))


def test_compiles_and_repeats(check):
    gate, up, scale = make(257, torch.float32)
    check.compiles(swiglu, [gate, up, scale])
    check.compiles(gelu, [gate, scale])
    check.deterministic(swiglu, make(257, torch.float32, rows=(400,)))


def test_errors_say_what_to_do():
    gate, up, scale = make(8, torch.float32)
    with pytest.raises(ValueError, match="must match"):
        swiglu(gate, up[:1])
    with pytest.raises(ValueError, match=r"pass \[8\]"):
        swiglu(gate, up, scale[:4])
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        gelu(gate, scale, "erf")
    with pytest.raises(TypeError, match="cast scale"):
        gelu(gate, scale.half())
