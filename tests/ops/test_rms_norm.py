"""rms_norm and add_rms_norm against PyTorch, with float64 as the truth."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops import add_rms_norm, rms_norm
from fastpeft.ops.rms_norm import rms_norm_reference

EPS = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def ours(x, weight):
    return rms_norm(x, weight, EPS)


def theirs(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def reference(x, weight):
    return rms_norm_reference(x, weight, EPS)


def make(n, dtype, rows=(3, 5)):
    return [torch.randn(*rows, n).to(dtype), (torch.randn(n) + 1).to(dtype)]


def test_backend():
    want = {"native": "native", "composite": "composite", "triton": "composite"}[_library.FORCED or "native"]
    assert _library.backend_of()["rms_norm_bwd"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 252, 257, 768, 901])
def test_every_gradient_subset(check, n, dtype):
    inputs = make(n, dtype)
    for needs in check.subsets(2):
        check.no_worse(
            ours, reference, theirs, inputs, needs, floor=1.0 if n == 1 else 1e-30
        )  # at width 1, dx is what eps leaves of a difference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(check, dtype):
    check.no_worse(ours, reference, theirs, make(768, dtype, rows=(901,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_broadcast(check, dtype):
    x, weight = make(257, dtype)
    views = [
        torch.randn(3, 5, 600).to(dtype)[..., 100:357],
        x.transpose(0, 1),
        torch.randn(3, 257, 5).to(dtype).transpose(1, 2),
        x[:1, :1].expand(3, 5, 257),
        x[0, 0],
    ]
    for view in views:
        check.no_worse(ours, reference, theirs, [view, weight])
    check.no_worse(ours, reference, theirs, [x, weight[:1].expand(257)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(check, dtype):
    n, big = 768, 2e4 if dtype == torch.float16 else 1e4
    _, weight = make(n, dtype)
    noise = torch.randn(4, n)
    for x in (noise * big / 4, noise + 100, torch.full((4, n), 3.0), noise * 1e-4, torch.zeros(4, n)):
        check.no_worse(ours, reference, theirs, [x.to(dtype), weight])
    zero = weight.clone()
    zero[::3] = 0
    check.no_worse(ours, reference, theirs, [noise.to(dtype), zero])


@pytest.mark.parametrize("shape", [(0, 768), (2, 0, 7)])
def test_empty_batch(check, shape):
    (y,), (dx, dweight) = check.run(ours, [torch.empty(shape), torch.ones(shape[-1])])
    assert y.shape == dx.shape == shape and torch.equal(dweight, torch.zeros(shape[-1]))


def test_without_weight_and_with_a_wide_one(check):
    x, weight = make(257, torch.bfloat16)
    check.no_worse(lambda x: ours(x, None), lambda x: reference(x, None), lambda x: theirs(x, None), [x])
    # float32 master over a bfloat16 trunk: PyTorch promotes, we keep x's dtype
    check.no_worse(ours, reference, lambda x, w: theirs(x, w.bfloat16()), [x, weight.float()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(check, dtype):
    x, weight = make(257, dtype)
    inputs = [x, torch.randn_like(x), weight]

    def fused(x, residual, weight):
        return add_rms_norm(x, residual, weight, EPS)

    def plain(norm):
        return lambda x, residual, weight: (norm(x + residual, weight), x + residual)

    for needs in check.subsets(3):
        check.no_worse(fused, plain(reference), plain(theirs), inputs, needs)
    first = [lambda *a, f=f: f(*a)[0] for f in (fused, plain(reference), plain(theirs))]
    check.no_worse(*first, inputs)
    _, grads = check.run(lambda *a: fused(*a)[1], inputs, (True, True, False))  # y unused
    assert torch.equal(grads[0], grads[1])


def test_saved_bytes(check):
    x, weight = make(768, torch.bfloat16)
    stats = 15 * 4
    for needs in check.subsets(2):
        inputs = [t.clone().requires_grad_(need) for t, need in zip((x, weight), needs)]
        assert check.saved_bytes(ours, inputs, free=inputs[1:]) == (x.nbytes + stats if any(needs) else 0), needs
    inputs = [t.clone().requires_grad_() for t in (x, x, weight)]
    assert check.saved_bytes(lambda *a: add_rms_norm(*a, EPS)[0], inputs, free=inputs[2:]) == x.nbytes + stats


def test_reference_gradients():
    inputs = [t.requires_grad_() for t in make(7, torch.float64)]
    assert torch.autograd.gradcheck(reference, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_operators(dtype):
    x, weight = make(7, dtype)
    residual = torch.randn_like(x)
    ops = torch.ops.fastpeft
    for second in (None, residual):
        for keep in (False, True):
            torch.library.opcheck(ops.rms_norm_fwd, (x, second, weight, EPS, keep))
    _, h, rstd = ops.rms_norm_fwd(x, residual, weight, EPS, True)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.rms_norm_bwd, (x, h, weight, rstd, None, *needs))
        torch.library.opcheck(ops.rms_norm_bwd, (x, h, None, rstd, residual, *needs))


def test_compiles_and_repeats(check):
    inputs = make(257, torch.float32)
    check.compiles(ours, inputs)
    check.compiles(lambda x, r, w: add_rms_norm(x, r, w, EPS), [inputs[0], torch.randn_like(inputs[0]), inputs[1]])
    check.deterministic(ours, make(768, torch.float32, rows=(400,)))


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=3), n=st.integers(1, 70), scale=st.sampled_from([1e-3, -1.0, 1e3]))
def test_properties(shape, n, scale):
    """Rows come out with mean square 1, and a factor on x moves only the sign."""
    x = torch.randn(*shape, n, dtype=torch.float64)
    y = rms_norm(x, None, 0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(shape, dtype=torch.float64))
    torch.testing.assert_close(rms_norm(x * scale, None, 0.0), y if scale > 0 else -y)


def test_errors_say_what_to_do():
    x, weight = make(8, torch.float32)
    with pytest.raises(ValueError, match=r"pass \[8\]"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(TypeError, match="cast weight"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="expand or cast residual"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match="negative"):
        rms_norm(x, weight, -1.0)
