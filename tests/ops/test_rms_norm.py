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
WIDTHS = [1, 7, 252, 257, 768, 901]


def ours(x, weight):
    return rms_norm(x, weight, EPS)


def theirs(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def reference(x, weight):
    return rms_norm_reference(x, weight, EPS)


def fused(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


@pytest.fixture
def norm(norms):
    return norms.Norm(ours, fused, reference, theirs, params=1)


def make(n, dtype):
    return [torch.randn(3, 5, n).to(dtype), (torch.randn(n) + 1).to(dtype)]


def test_backend():
    want = {"native": "native", "composite": "composite", "triton": "composite"}[_library.FORCED or "native"]
    assert _library.backend_of()["rms_norm_bwd"]["CPU"].startswith(want)


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


def test_without_weight_and_with_a_wide_one(check):
    x, weight = make(257, torch.bfloat16)
    check.no_worse(lambda x: ours(x, None), lambda x: reference(x, None), lambda x: theirs(x, None), [x])
    # float32 master over a bfloat16 trunk: PyTorch promotes, we keep x's dtype
    check.no_worse(ours, reference, lambda x, w: theirs(x, w.bfloat16()), [x, weight.float()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(check, norm, dtype):
    norm.residual(check, dtype)


def test_saved_bytes(check, norm):
    norm.saved_bytes(check, statistics=1, nothing=((False, False),))


def test_reference_gradients(norm):
    norm.reference_gradients()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_operators(dtype):
    x, weight = make(7, dtype)
    residual = torch.randn_like(x)
    ops = torch.ops.fastpeft
    # what AOTAutograd makes of an operator does not depend on the dtype
    how = {} if dtype == torch.float32 else {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    for second in (None, residual):
        for keep in (False, True):
            torch.library.opcheck(ops.rms_norm_fwd, (x, second, weight, EPS, keep), **how)
    _, h, rstd = ops.rms_norm_fwd(x, residual, weight, EPS, True)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.rms_norm_bwd, (x, h, weight, rstd, None, *needs), **how)
        torch.library.opcheck(ops.rms_norm_bwd, (x, h, None, rstd, residual, *needs), **how)


def test_compiles_and_repeats(check, norm):
    norm.compiles_and_repeats(check)


def test_same_sums_on_any_number_of_threads(norm):
    if not _library.backend_of()["rms_norm_bwd"]["CPU"].startswith("native"):
        pytest.skip("ATen cuts its sums by thread")
    norm.same_sums_on_any_number_of_threads()


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
