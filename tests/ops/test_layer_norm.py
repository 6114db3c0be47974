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


def fused(x, residual, weight, bias):
    return add_layer_norm(x, residual, weight, bias, EPS)


@pytest.fixture
def norm(norms):
    return norms.Norm(ours, fused, reference, theirs, params=2)


def make(n, dtype):
    return [torch.randn(3, 5, n).to(dtype), (torch.randn(n) + 1).to(dtype), torch.randn(n).to(dtype)]


def test_backend():
    want = {"native": "native", "composite": "composite", "triton": "composite"}[_library.FORCED or "native"]
    assert _library.backend_of()["layer_norm_bwd"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_every_gradient_subset(check, norm, n, dtype):
    norm.every_gradient_subset(check, n, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(check, norm, dtype):
    """Several parts per sum, and several blocks per part."""
    norm.compare(check, norm.make(768, dtype, rows=(901,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_broadcast(check, norm, dtype):
    norm.strided_and_broadcast(check, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(check, norm, dtype):
    norm.hard_rows(check, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 7, 17, 257, 901])
def test_every_16_bit_number(norm, dtype, n):
    norm.every_16_bit_number(dtype, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(check, norm, dtype):
    norm.wide_rows(check, dtype)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("rows, n", [(6000, 1024), (1500, 4096)])
def test_larger_than_caches(norm, rows, n, carry):
    norm.larger_than_caches(rows, n, carry)


@pytest.mark.parametrize("shape", [(0, 768), (2, 0, 7)])
def test_empty_batch(check, norm, shape):
    norm.empty_batch(check, shape)


def test_without_parameters_and_with_wide_ones(check):
    x, weight, bias = make(257, torch.bfloat16)
    check.no_worse(lambda x: ours(x, None, None), lambda x: reference(x, None, None), lambda x: theirs(x, None, None), [x])
    check.no_worse(lambda x, w: ours(x, w, None), lambda x, w: reference(x, w, None), lambda x, w: theirs(x, w, None), [x, weight])
    check.no_worse(ours, reference, theirs, [x, weight.float(), bias.float()])  # float32 masters over a bfloat16 trunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(check, norm, dtype):
    norm.residual(check, dtype)


def test_saved_bytes(check, norm):
    norm.saved_bytes(check, statistics=2, nothing=((False, False, False), (False, False, True)))


def test_reference_gradients(norm):
    norm.reference_gradients()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_operators(dtype):
    x, weight, bias = make(7, dtype)
    residual = torch.randn_like(x)
    ops = torch.ops.fastpeft
    # what AOTAutograd makes of an operator does not depend on the dtype
    how = {} if dtype == torch.float32 else {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    for second in (None, residual):
        for keep in (False, True):
            torch.library.opcheck(ops.layer_norm_fwd, (x, second, weight, bias, EPS, keep), **how)
    _, h, mean, rstd = ops.layer_norm_fwd(x, residual, weight, bias, EPS, True)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.layer_norm_bwd, (x, h, weight, mean, rstd, None, *needs), **how)
        torch.library.opcheck(ops.layer_norm_bwd, (x, h, None, mean, rstd, residual, *needs), **how)


def test_compiles_and_repeats(check, norm):
    norm.compiles_and_repeats(check)


def test_same_sums_on_any_number_of_threads(norm):
    if not _library.backend_of()["layer_norm_bwd"]["CPU"].startswith("native"):
        pytest.skip("ATen cuts its sums by thread")
    norm.same_sums_on_any_number_of_threads()


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
