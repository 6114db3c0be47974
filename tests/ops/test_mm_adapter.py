"""mm_adapter and norm_mm_adapter against the paper's module (two RepAdapters of grouped convolutions), with float64 as the truth."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops.mm_adapter import mm_adapter, mm_adapter_reference
from fastpeft.ops.norm_mm_adapter import norm_mm_adapter, norm_mm_adapter_reference
from fastpeft.ops.rms_norm import rms_norm_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = _library.FORCED == "triton"
EPS, SCALE = 1e-6, 0.7


def paper(x, w_down, b_down, w_up, b_up, routing, scale=SCALE, groups=2):
    """Sequence last, convolutions of width 1, both adapters in full."""
    t = x.transpose(1, 2)
    a = F.conv1d(t, w_down[:, :, None], b_down)
    out = t
    for i in range(2):
        branch = F.conv1d(a, w_up[i][:, :, None], b_up[i], groups=groups)
        weight = routing[:, i, None, None] if routing.dim() == 2 else routing[..., i][:, None]
        out = out + scale * weight * branch
    return out.transpose(1, 2)


def paper_with_norm(x, gamma, *params):
    return paper(F.rms_norm(x, gamma.shape, gamma, EPS), *params)


def make(B=2, M=5, C=12, h=4, groups=2, per_token=False, dtype=torch.float32, params=None):
    shapes = [(B, M, C), (C,), (h, C), (h,), (2, C, h // groups), (2, C), (B, M, 2) if per_token else (B, 2)]
    tensors = [torch.randn(shape) * (C**-0.5 if i == 2 else 1.0) for i, shape in enumerate(shapes)]
    return [t.to(params or dtype) if i else t.to(dtype) for i, t in enumerate(tensors)]


def plain(tensors):
    return [tensors[0], *tensors[2:]]


def ours(*tensors):
    return mm_adapter(*tensors, SCALE)


def reference(*tensors):
    return mm_adapter_reference(*tensors, SCALE)


def normed(x, gamma, *params):
    return norm_mm_adapter(x, gamma, EPS, *params, SCALE)


def normed_reference(x, gamma, *params):
    return norm_mm_adapter_reference(x, gamma, EPS, *params, SCALE)


def test_backend():
    for op in ("mm_adapter_bwd", "norm_mm_adapter_fwd"):
        assert _library.backend_of()[op]["CPU"].startswith("triton" if INTERPRETED else "composite")


@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_reference_is_the_papers_module(check, per_token):
    inputs = [t.double() for t in make(per_token=per_token)]
    for fn, want, tensors in ((reference, paper, plain(inputs)), (normed_reference, paper_with_norm, inputs)):
        got, exact = check.run(fn, tensors), check.run(want, tensors)
        for a, b in zip(got[0] + got[1], exact[0] + exact[1]):
            torch.testing.assert_close(a, b)
        assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_every_gradient_alone_and_together(check, dtype, per_token):
    inputs = make(2, 33, 64, 8, per_token=per_token, dtype=dtype)
    for fn, exact, theirs, tensors in ((ours, reference, paper, plain(inputs)), (normed, normed_reference, paper_with_norm, inputs)):
        check.no_worse(fn, exact, theirs, tensors)
        for i in range(0, len(tensors), 2 if INTERPRETED else 1):
            check.no_worse(fn, exact, theirs, tensors, [j == i for j in range(len(tensors))])


def test_every_gradient_subset(check):
    inputs = make(2, 9, 16)
    for needs in list(check.subsets(6))[:: 9 if INTERPRETED else 1]:
        check.no_worse(ours, reference, paper, plain(inputs), needs)
    for needs in list(check.subsets(7))[:: 17 if INTERPRETED else 1]:
        check.no_worse(normed, normed_reference, paper_with_norm, inputs, needs)


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
    for fn, tensors in ((ours, plain(make(B, M))), (normed, make(B, M))):
        (out,), grads = check.run(fn, tensors)
        assert out.shape == (B, M, 12) and all((g == 0).all() for g in grads)


def test_float32_masters_on_a_bfloat16_trunk(check):
    def rounded(*tensors):
        return paper(*(t.bfloat16() for t in tensors))

    inputs = plain(make(2, 65, 64, 8, dtype=torch.bfloat16, params=torch.float32))
    (out,), grads = check.no_worse(ours, reference, rounded, inputs)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in grads[1:]} == {torch.float32}


def test_saved_bytes(check):
    """The docstrings' tables: a always, x for w_down; with the norm x and rstd, and never y."""
    B, M, C, h = 2, 5, 12, 4
    x, a, rstd = B * M * C * 4, B * M * h * 4, B * M * 4
    for i in range(6):
        leaves = [t.requires_grad_(j == i) for j, t in enumerate(plain(make(B, M, C, h)))]
        assert check.saved_bytes(ours, leaves, free=leaves[1:]) == a + x * (i in (1, 2)), i
    for i in range(7):
        leaves = [t.requires_grad_(j == i) for j, t in enumerate(make(B, M, C, h))]
        assert check.saved_bytes(normed, leaves, free=leaves[1:]) == a + (x + rstd) * (i < 4), i


def test_flops(check):
    tokens, C, h, columns = 10, 12, 4, 2 * 4 // 2 + 2  # both experts' columns of a group, and the two biases
    inputs = plain(make())
    down, up = 2 * tokens * C * h, 2 * tokens * C * columns
    assert check.flops(lambda: ours(*inputs)) == down + up
    assert check.flops(lambda: check.run(ours, inputs)) == 3 * (down + up)
    assert check.flops(lambda: check.run(normed, make())) == 3 * (down + up)
    assert check.flops(lambda: check.run(ours, inputs, [True] + [False] * 5)) == 2 * (down + up)


def test_compiles_and_deterministic(check):
    for fn, tensors in ((ours, plain(make(2, 70, 36))), (normed, make(2, 70, 36))):
        check.compiles(fn, tensors)
        check.deterministic(fn, tensors)


def test_opcheck():
    ops = torch.ops.fastpeft
    x, gamma, *params = make()
    a, rstd, args = torch.randn(10, 4), torch.rand(10), (0.5, 2, 0.0, None)
    torch.library.opcheck(ops.mm_adapter_fwd.default, (x, *params, *args))
    torch.library.opcheck(ops.norm_mm_adapter_fwd.default, (x, gamma, EPS, *params, *args))
    w_down, _, w_up, b_up, routing = params
    torch.library.opcheck(ops.mm_adapter_bwd.default, (x, x, a, w_down, w_up, b_up, routing, *args, True, True, True, True))
    torch.library.opcheck(ops.norm_mm_adapter_bwd.default, (x, x, gamma, rstd, a, *params, *args, True, True, True, True, True))


def test_dropout():
    """The mask falls on a, is drawn from one seed, and backward uses the same one."""
    p, inputs = 0.4, make(2, 200, 12, 8)
    x, gamma, w_down, b_down, w_up, b_up, routing = leaves = [t.requires_grad_() for t in inputs]
    for with_norm in (False, True):
        used = leaves if with_norm else plain(leaves)
        fn = (lambda *t: norm_mm_adapter(*t[:2], EPS, *t[2:], SCALE, 2, p)) if with_norm else lambda *t: mm_adapter(*t, SCALE, 2, p)
        torch.manual_seed(5)
        out = fn(*used)
        torch.manual_seed(5)
        seed = torch.randint(0, 2**31, (1,))
        with torch.no_grad():
            args = [*plain(leaves), SCALE, 2, p, seed]
            a = torch.ops.fastpeft.mm_adapter_fwd(*args)[1]
        kept = a != 0
        assert abs(float(kept.float().mean()) - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
        y = rms_norm_reference(x, gamma, EPS) if with_norm else x
        a = F.linear(y, w_down, b_down) * kept.view(2, 200, 8) / (1 - p)
        want = y
        for i in range(2):
            expanded = torch.einsum("bmgj,gcj->bmgc", a.unflatten(-1, (2, 4)), w_up[i].unflatten(0, (2, 6))).flatten(2)
            want = want + SCALE * routing[:, i, None, None] * (expanded + b_up[i])
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        dout = torch.randn_like(out)
        for got, exact in zip(torch.autograd.grad(out, used, dout), torch.autograd.grad(want, used, dout)):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(5, 12)}, "pass .B, M, C."),
        ({"groups": 3}, "do not divide"),
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
    inputs = make(B, M, width * groups, per * groups, groups, per_token)
    for fn, exact, tensors in (
        (lambda *t: mm_adapter(*t, SCALE, groups), lambda *t: mm_adapter_reference(*t, SCALE, groups), plain(inputs)),
        (
            lambda *t: norm_mm_adapter(*t[:2], 1e-2, *t[2:], SCALE, groups),
            lambda *t: norm_mm_adapter_reference(*t[:2], 1e-2, *t[2:], SCALE, groups),
            inputs,
        ),
    ):
        got, want = check.run(fn, tensors), check.run(exact, [t.double() for t in tensors])
        for value, truth in zip(got[0] + got[1], want[0] + want[1]):
            assert check.error(value, truth, floor=1.0) < 1e-5
