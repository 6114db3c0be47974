"""mm_adapter against the paper's module (two RepAdapters of grouped convolutions), with float64 as the truth."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mm_adapter_cases import SCALE, make, paper, plain, same_under_dropout

from fastpeft import _library
from fastpeft.ops.mm_adapter import mm_adapter, mm_adapter_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = _library.FORCED == "triton"


def ours(*tensors):
    return mm_adapter(*tensors, SCALE)


def reference(*tensors):
    return mm_adapter_reference(*tensors, SCALE)


def test_backend():
    assert _library.backend_of()["mm_adapter_bwd"]["CPU"].startswith("triton" if INTERPRETED else "composite")


@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_reference_is_the_papers_module(check, per_token):
    inputs = [t.double() for t in plain(make(per_token=per_token))]
    got, exact = check.run(reference, inputs), check.run(paper, inputs)
    for a, b in zip(got[0] + got[1], exact[0] + exact[1]):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(reference, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_every_gradient_alone_and_together(check, dtype, per_token):
    inputs = plain(make(2, 33, 64, 8, per_token=per_token, dtype=dtype))
    check.no_worse(ours, reference, paper, inputs)
    for i in range(0, len(inputs), 2 if INTERPRETED else 1):
        check.no_worse(ours, reference, paper, inputs, [j == i for j in range(len(inputs))])


def test_every_gradient_subset(check):
    inputs = make(2, 9, 16)
    for needs in list(check.subsets(6))[:: 9 if INTERPRETED else 1]:
        check.no_worse(ours, reference, paper, plain(inputs), needs)


@pytest.mark.parametrize("M, C, h, groups", [(1, 1, 1, 1), (7, 252, 8, 2), (33, 257, 5, 1), (3, 768, 24, 3)])
def test_odd_sizes(check, M, C, h, groups):
    inputs = make(2, M, C, h, groups)
    fn = lambda *t: mm_adapter(*t, SCALE, groups)  # noqa: E731
    check.no_worse(fn, lambda *t: mm_adapter_reference(*t, SCALE, groups), lambda *t: paper(*t, SCALE, groups), plain(inputs))


def test_strided_and_broadcast(check):
    x, *params = plain(make(2, 6, 12))
    for view in (torch.randn(2, 12, 6).transpose(1, 2), torch.randn(1, 6, 12).expand(2, -1, -1), torch.randn(2, 6, 30)[..., 5:17]):
        check.no_worse(ours, reference, paper, [view, *params])
    w_down, b_down, w_up, b_up, routing = params
    strided = [
        w_down.t().contiguous().t(),
        b_down[:1].expand(4),
        w_up.mT.contiguous().mT,
        b_up[:1].expand(2, -1),
        routing[:1].expand(2, -1),
    ]
    check.no_worse(ours, reference, paper, [x, *strided])


@pytest.mark.parametrize("B, M", [(0, 5), (2, 0)])
def test_empty(check, B, M):
    (out,), grads = check.run(ours, plain(make(B, M)))
    assert out.shape == (B, M, 12) and all((g == 0).all() for g in grads)


def test_float32_masters_on_a_bfloat16_trunk(check):
    def rounded(*tensors):
        return paper(*(t.bfloat16() for t in tensors))

    inputs = plain(make(2, 65, 64, 8, dtype=torch.bfloat16, params=torch.float32))
    (out,), grads = check.no_worse(ours, reference, rounded, inputs)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in grads[1:]} == {torch.float32}


def test_saved_bytes(check):
    """The docstring's table: a always, x for w_down."""
    B, M, C, h = 2, 5, 12, 4
    x, a = B * M * C * 4, B * M * h * 4
    for i in range(6):
        leaves = [t.requires_grad_(j == i) for j, t in enumerate(plain(make(B, M, C, h)))]
        assert check.saved_bytes(ours, leaves, free=leaves[1:]) == a + x * (i in (1, 2)), i


def test_flops(check):
    tokens, C, h, columns = 10, 12, 4, 2 * 4 // 2 + 2  # both experts' columns of a group, and the two biases
    inputs = plain(make())
    down, up = 2 * tokens * C * h, 2 * tokens * C * columns
    assert check.flops(lambda: ours(*inputs)) == down + up
    assert check.flops(lambda: check.run(ours, inputs)) == 3 * (down + up)
    assert check.flops(lambda: check.run(ours, inputs, [True] + [False] * 5)) == 2 * (down + up)


def test_compiles_and_deterministic(check):
    inputs = plain(make(2, 70, 36))
    check.compiles(ours, inputs)
    check.deterministic(ours, inputs)


def test_opcheck():
    ops = torch.ops.fastpeft
    x, *params = plain(make())
    a, args = torch.randn(10, 4), (0.5, 2, 0.0, None)
    torch.library.opcheck(ops.mm_adapter_fwd.default, (x, *params, *args))
    w_down, _, w_up, b_up, routing = params
    torch.library.opcheck(ops.mm_adapter_bwd.default, (x, x, a, w_down, w_up, b_up, routing, *args, True, True, True, True))


def test_dropout():
    """The mask falls on a, is drawn from one seed, and backward uses the same one."""
    same_under_dropout(lambda p: lambda *t: mm_adapter(*t, SCALE, 2, p), plain(make(2, 200, 12, 8)), lambda x, *params: x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(5, 12)}, "pass .B, M, C."),
        ({"groups": 3}, "do not divide"),
        (dict(zip(("w_down", "b_down", "w_up"), make(h=0)[2:5])), "h of 1 or more"),
        ({"w_up": torch.randn(2, 12, 4)}, "w_up has shape"),
        ({"routing": torch.randn(2, 3)}, "per sample or"),
        ({"dropout_p": -0.1}, "must lie in"),
    ],
)
def test_errors(change, message):
    names = ("x", "w_down", "b_down", "w_up", "b_up", "routing")
    with pytest.raises(ValueError, match=message):
        mm_adapter(**(dict(zip(names, plain(make()))) | change))


@settings(max_examples=6 if INTERPRETED else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_any_shape(check, B, M, width, per, groups, per_token):
    torch.manual_seed(M)
    inputs = plain(make(B, M, width * groups, per * groups, groups, per_token))
    got = check.run(lambda *t: mm_adapter(*t, SCALE, groups), inputs)
    want = check.run(lambda *t: mm_adapter_reference(*t, SCALE, groups), [t.double() for t in inputs])
    for value, truth in zip(got[0] + got[1], want[0] + want[1]):
        assert check.error(value, truth, floor=1.0) < 1e-5
