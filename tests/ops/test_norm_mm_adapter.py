"""norm_mm_adapter against RMSNorm and the paper's module (two RepAdapters of grouped convolutions), with float64 as the truth."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mm_adapter_cases import EPS, SCALE, make, paper, same_under_dropout

from fastpeft import _library
from fastpeft.ops.norm_mm_adapter import norm_mm_adapter, norm_mm_adapter_reference
from fastpeft.ops.rms_norm import rms_norm_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = _library.FORCED == "triton"


def paper_with_norm(x, gamma, *params):
    return paper(F.rms_norm(x, gamma.shape, gamma, EPS), *params)


def normed(x, gamma, *params):
    return norm_mm_adapter(x, gamma, EPS, *params, SCALE)


def normed_reference(x, gamma, *params):
    return norm_mm_adapter_reference(x, gamma, EPS, *params, SCALE)


def test_backend():
    assert _library.backend_of()["norm_mm_adapter_fwd"]["CPU"].startswith("triton" if INTERPRETED else "composite")


@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_reference_is_the_papers_module(check, per_token):
    inputs = [t.double() for t in make(per_token=per_token)]
    got, exact = check.run(normed_reference, inputs), check.run(paper_with_norm, inputs)
    for a, b in zip(got[0] + got[1], exact[0] + exact[1]):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(normed_reference, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_every_gradient_alone_and_together(check, dtype, per_token):
    inputs = make(2, 33, 64, 8, per_token=per_token, dtype=dtype)
    check.no_worse(normed, normed_reference, paper_with_norm, inputs)
    for i in range(0, len(inputs), 2 if INTERPRETED else 1):
        check.no_worse(normed, normed_reference, paper_with_norm, inputs, [j == i for j in range(len(inputs))])


def test_every_gradient_subset(check):
    inputs = make(2, 9, 16)
    for needs in list(check.subsets(7))[:: 17 if INTERPRETED else 1]:
        check.no_worse(normed, normed_reference, paper_with_norm, inputs, needs)


@pytest.mark.parametrize("B, M", [(0, 5), (2, 0)])
def test_empty(check, B, M):
    (out,), grads = check.run(normed, make(B, M))
    assert out.shape == (B, M, 12) and all((g == 0).all() for g in grads)


def test_saved_bytes(check):
    """The docstring's table: a always; x and rstd for w_down and what comes before it; never y."""
    B, M, C, h = 2, 5, 12, 4
    x, a, rstd = B * M * C * 4, B * M * h * 4, B * M * 4
    for i in range(7):
        leaves = [t.requires_grad_(j == i) for j, t in enumerate(make(B, M, C, h))]
        assert check.saved_bytes(normed, leaves, free=leaves[1:]) == a + (x + rstd) * (i < 4), i


def test_flops(check):
    tokens, C, h, columns = 10, 12, 4, 2 * 4 // 2 + 2  # both experts' columns of a group, and the two biases
    down, up = 2 * tokens * C * h, 2 * tokens * C * columns
    assert check.flops(lambda: check.run(normed, make())) == 3 * (down + up)


def test_compiles_and_deterministic(check):
    inputs = make(2, 70, 36)
    check.compiles(normed, inputs)
    check.deterministic(normed, inputs)


def test_opcheck():
    ops = torch.ops.fastpeft
    x, gamma, *params = make()
    a, rstd, args = torch.randn(10, 4), torch.rand(10), (0.5, 2, 0.0, None)
    torch.library.opcheck(ops.norm_mm_adapter_fwd.default, (x, gamma, EPS, *params, *args))
    torch.library.opcheck(ops.norm_mm_adapter_bwd.default, (x, x, gamma, rstd, a, *params, *args, True, True, True, True, True))


def test_dropout():
    """The mask falls on a, is drawn from one seed, and backward uses the same one."""
    same_under_dropout(
        lambda p: lambda x, gamma, *t: norm_mm_adapter(x, gamma, EPS, *t, SCALE, 2, p),
        make(2, 200, 12, 8),
        lambda x, gamma, *params: rms_norm_reference(x, gamma, EPS),
    )


@settings(max_examples=6 if INTERPRETED else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_any_shape(check, B, M, width, per, groups, per_token):
    torch.manual_seed(M)
    inputs = make(B, M, width * groups, per * groups, groups, per_token)
    got = check.run(lambda *t: norm_mm_adapter(*t[:2], 1e-2, *t[2:], SCALE, groups), inputs)
    want = check.run(lambda *t: norm_mm_adapter_reference(*t[:2], 1e-2, *t[2:], SCALE, groups), [t.double() for t in inputs])
    for value, truth in zip(got[0] + got[1], want[0] + want[1]):
        assert check.error(value, truth, floor=1.0) < 1e-5
