"""layer_norm and add_layer_norm against PyTorch, with float64 as the truth."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops import add_layer_norm, layer_norm
from fastpeft.ops.layer_norm import layer_norm_reference

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 252, 257, 768, 901]


def ours(x, weight, bias):
    return layer_norm(x, weight, bias, EPS)


def theirs(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def reference(x, weight, bias):
    return layer_norm_reference(x, weight, bias, EPS)


def make(n, dtype, rows=(3, 5)):
    return [torch.randn(*rows, n).to(dtype), (torch.randn(n) + 1).to(dtype), torch.randn(n).to(dtype)]


def test_backend():
    want = {"native": "native", "composite": "composite", "triton": "composite"}[_library.FORCED or "native"]
    assert _library.backend_of()["layer_norm_bwd"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_every_gradient_subset(check, n, dtype):
    inputs = make(n, dtype)
    for needs in check.subsets(3):
        check.no_worse(
            ours, reference, theirs, inputs, needs, floor=1.0 if n == 1 else 1e-30
        )  # at width 1, dx is what eps leaves of a difference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(check, dtype):
    """Several parts per sum, and several blocks per part."""
    check.no_worse(ours, reference, theirs, make(768, dtype, rows=(901,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_broadcast(check, dtype):
    x, weight, bias = make(257, dtype)
    views = {
        "slice of a wider projection": torch.randn(3, 5, 600).to(dtype)[..., 100:357],
        "transposed tokens": x.transpose(0, 1),
        "transposed channels": torch.randn(3, 257, 5).to(dtype).transpose(1, 2),
        "broadcast rows": x[:1, :1].expand(3, 5, 257),
        "one row": x[0, 0],
    }
    for view in views.values():
        check.no_worse(ours, reference, theirs, [view, weight, bias])
    check.no_worse(ours, reference, theirs, [x, weight[:1].expand(257), bias])
    # a cotangent of any strides: sum() gives one of stride 0
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, weight, bias).float().sum(), leaf)
    (want,) = torch.autograd.grad(reference(leaf, weight, bias).float().sum(), leaf)
    torch.testing.assert_close(grad.float(), want.float(), atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(check, dtype):
    n, big = 768, 2e4 if dtype == torch.float16 else 1e4
    _, weight, bias = make(n, dtype)
    noise = torch.randn(4, n)
    rows = [noise * big / 4, noise + 100, torch.full((4, n), 3.0), noise * 1e-4, torch.zeros(4, n)]
    for x in rows:
        check.no_worse(ours, reference, theirs, [x.to(dtype), weight, bias])
    zero = weight.clone()
    zero[::3] = 0  # x_hat must not be rebuilt from y
    check.no_worse(ours, reference, theirs, [noise.to(dtype), zero, bias])


@pytest.mark.parametrize("shape", [(0, 768), (2, 0, 7)])
def test_empty_batch(check, shape):
    x, weight, bias = torch.empty(shape), torch.ones(shape[-1]), torch.ones(shape[-1])
    (y,), (dx, dweight, dbias) = check.run(ours, [x, weight, bias])
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


def test_without_parameters_and_with_wide_ones(check):
    x, weight, bias = make(257, torch.bfloat16)
    check.no_worse(lambda x: ours(x, None, None), lambda x: reference(x, None, None), lambda x: theirs(x, None, None), [x])
    check.no_worse(lambda x, w: ours(x, w, None), lambda x, w: reference(x, w, None), lambda x, w: theirs(x, w, None), [x, weight])
    check.no_worse(ours, reference, theirs, [x, weight.float(), bias.float()])  # float32 masters over a bfloat16 trunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(check, dtype):
    x, weight, bias = make(257, dtype)
    residual = torch.randn_like(x)

    def fused(x, residual, weight, bias):
        return add_layer_norm(x, residual, weight, bias, EPS)

    def plain(norm):
        return lambda x, residual, weight, bias: (norm(x + residual, weight, bias), x + residual)

    for needs in check.subsets(4):
        check.no_worse(fused, plain(reference), plain(theirs), [x, residual, weight, bias], needs)
    one = check.run(lambda *a: fused(*a)[0], [x, residual, weight, bias])
    check.no_worse(
        lambda *a: fused(*a)[0], lambda *a: plain(reference)(*a)[0], lambda *a: plain(theirs)(*a)[0], [x, residual, weight, bias]
    )
    assert torch.equal(one[1][0], one[1][1])  # the same gradient for both terms
    _, grads = check.run(lambda *a: fused(*a)[1], [x, residual, weight, bias], (True, True, False, False))  # y unused
    assert torch.equal(grads[0], grads[1])


def test_saved_bytes(check):
    x, weight, bias = make(768, torch.bfloat16)
    stats, leaf = 2 * 15 * 4, lambda *on: [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), on)]
    for needs, want in {
        (True, True, True): x.nbytes + stats,
        (True, False, False): x.nbytes + stats,
        (False, True, False): x.nbytes + stats,
        (False, False, True): 0,
        (False, False, False): 0,
    }.items():
        inputs = leaf(*needs)
        assert check.saved_bytes(ours, inputs, free=inputs[1:]) == want, needs
    inputs = [*leaf(True, True, True), x.clone().requires_grad_()]
    fused = check.saved_bytes(lambda x, w, b, r: add_layer_norm(x, r, w, b, EPS)[0], inputs, free=inputs[1:3])
    assert fused == x.nbytes + stats  # the sum, not its terms


def test_reference_gradients():
    inputs = [t.requires_grad_() for t in make(7, torch.float64)]
    assert torch.autograd.gradcheck(reference, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_operators(dtype):
    x, weight, bias = make(7, dtype)
    residual = torch.randn_like(x)
    ops = torch.ops.fastpeft
    for second in (None, residual):
        for keep in (False, True):
            torch.library.opcheck(ops.layer_norm_fwd, (x, second, weight, bias, EPS, keep))
    _, h, mean, rstd = ops.layer_norm_fwd(x, residual, weight, bias, EPS, True)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.layer_norm_bwd, (x, h, weight, mean, rstd, None, *needs))
        torch.library.opcheck(ops.layer_norm_bwd, (x, h, None, mean, rstd, residual, *needs))


def test_compiles_and_repeats(check):
    inputs = make(257, torch.float32)
    check.compiles(ours, inputs)
    check.compiles(ours, inputs, (False, True, False))
    check.compiles(lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), [inputs[0], torch.randn_like(inputs[0]), *inputs[1:]])
    check.deterministic(ours, make(768, torch.float32, rows=(400,)))


def test_same_sums_on_any_number_of_threads():
    if not _library.backend_of()["layer_norm_bwd"]["CPU"].startswith("native"):
        pytest.skip("ATen cuts its sums by thread")
    x, weight, bias = make(768, torch.float32, rows=(500,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = weight.clone().requires_grad_()
            results.append(torch.autograd.grad(ours(x, leaf, bias).square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    n=st.integers(1, 70),
    shift=st.floats(-100, 100),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_properties(shape, n, shift, scale):
    """Normalised rows have mean 0 and variance 1 (less eps), whatever was added to or multiplied into x."""
    x = torch.randn(*shape, n, dtype=torch.float64)
    y, moved = layer_norm(x, None, None, 0.0 if n > 1 else 1.0), layer_norm(x * scale + shift, None, None, 0.0 if n > 1 else 1.0)
    torch.testing.assert_close(y.mean(-1), torch.zeros(shape, dtype=torch.float64), atol=1e-9, rtol=0)
    if n > 1:
        torch.testing.assert_close(y.square().mean(-1), torch.ones(shape, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(y, moved, atol=1e-6, rtol=1e-6)


def test_errors_say_what_to_do():
    x, weight, bias = make(8, torch.float32)
    with pytest.raises(ValueError, match=r"pass \[8\]"):
        layer_norm(x, weight[:4], bias, EPS)
    with pytest.raises(TypeError, match="cast weight"):
        layer_norm(x, weight.double(), bias, EPS)
    with pytest.raises(TypeError, match="cast one to the other"):
        layer_norm(x.bfloat16(), weight, bias.bfloat16(), EPS)
    with pytest.raises(TypeError, match="cast it to"):
        layer_norm(x.long(), weight, bias, EPS)
    with pytest.raises(ValueError, match="last dimension"):
        layer_norm(torch.tensor(1.0), None, None, EPS)
    with pytest.raises(ValueError, match="expand or cast residual"):
        add_layer_norm(x, x[:1], weight, bias, EPS)
    with pytest.raises(ValueError, match="negative"):
        layer_norm(x, weight, bias, -1.0)
