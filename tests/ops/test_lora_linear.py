"""lora_linear and lora_linears against the layers PEFT writes, with float64 as the truth."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops.lora_linear import Projection, lora_linear, lora_linear_reference, lora_linears

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALING = 0.7
INTERPRETED = _library.FORCED == "triton"


def ours(x, weight, bias, A, B):
    return lora_linear(x, weight, bias, A, B, SCALING)


def theirs(x, weight, bias, A, B):
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B) * SCALING


def reference(x, weight, bias, A, B):
    return lora_linear_reference(x, weight, bias, A, B, SCALING)


def make(rows, n_in, n_out, r, dtype=torch.float32, adapters=None):
    shapes = ((*rows, n_in), (n_out, n_in), (n_out,), (r, n_in), (n_out, r))
    x, *params = (torch.randn(shape) * (shape[-1] ** -0.5 if i else 1.0) for i, shape in enumerate(shapes))
    return [t.to(dtype) for t in (x, *params[:2])] + [t.to(adapters or dtype) for t in params[2:]]


def test_backend():
    assert _library.backend_of()["lora_linears_bwd"]["CPU"].startswith("triton" if INTERPRETED else "composite")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gradient_subset(check, dtype):
    inputs = make((3, 7), 13, 9, 3, dtype)
    for needs in list(check.subsets(5))[:: 3 if INTERPRETED else 1]:  # 32 of them, 11 where each costs the interpreter 0.3 s
        check.no_worse(ours, reference, theirs, inputs, needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_in, n_out, r", [(1, 1, 1), (7, 252, 2), (257, 7, 4), (252, 257, 17)])
def test_odd_sizes(check, n_in, n_out, r, dtype):
    check.no_worse(ours, reference, theirs, make((1, 33), n_in, n_out, r, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_width_768(check, dtype):
    check.no_worse(
        ours,
        reference,
        theirs,
        make((65 if INTERPRETED else 130,), 768, 129 if INTERPRETED else 901, 8, dtype),
        [True, False, False, True, True],
    )


def test_strided_and_broadcast(check):
    x, *params = make((3, 5), 12, 10, 2)
    views = [
        torch.randn(3, 5, 30)[..., 8:20],
        x.transpose(0, 1),
        torch.randn(3, 12, 5).transpose(1, 2),
        x[:1, :1].expand(3, 5, 12),
        x[0, 0],
    ]
    for view in views:
        check.no_worse(ours, reference, theirs, [view, *params])
    weight, bias, _, B = params
    strided = [weight.t().contiguous().t(), bias[:1].expand(10), torch.randn(2, 24)[:, ::2], B.t().contiguous().t()]
    check.no_worse(ours, reference, theirs, [x, *strided])


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)])
def test_empty(check, shape):
    _, *params = make((1,), 12, 10, 2)
    (y,), grads = check.run(ours, [torch.randn(shape), *params])
    assert y.shape == (*shape[:-1], 10)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_ranks(p):
    """A branch of rank 0 adds nothing and asks for nothing in backward."""
    x, w, b, A, B = make((5,), 12, 10, 1)
    x, w, b, A, B = (t.requires_grad_() for t in (x, w, b, A[:0], B[:, :0]))
    y, plain = lora_linears(x, [(w, b, A, B, 0.5), (w, b)], p)
    (y - 2 * plain).sum().backward()
    assert torch.equal(y, plain) and A.grad is B.grad is None
    torch.testing.assert_close(x.grad, -w.sum(0).expand(5, -1))


@pytest.mark.parametrize("needs", [(True, False, False, True, True), (True, True, True, True, True)])
def test_float32_masters_on_a_bfloat16_trunk(check, needs):
    """The output is bfloat16, the adapters' gradients float32; the error is that of adapters kept in bfloat16, or less."""
    inputs = make((130,), 64, 48, 4, torch.bfloat16, adapters=torch.float32)

    def rounded(x, w, b, A, B):
        return theirs(x, w, b, A.to(x.dtype), B.to(x.dtype))

    (y,), grads = check.no_worse(ours, reference, rounded, inputs, needs)
    assert y.dtype == torch.bfloat16
    assert grads[3].dtype == grads[4].dtype == torch.float32


def group(x, *params):
    """q with bias and LoRA, k without LoRA, v with LoRA of another rank."""
    wq, bq, aq, bbq, wk, wv, av, bv = params
    return lora_linears(x, [Projection(wq, bq, aq, bbq, SCALING), (wk,), (wv, None, av, bv, 2.0)])


def group_theirs(x, *params):
    wq, bq, aq, bbq, wk, wv, av, bv = params
    return theirs(x, wq, bq, aq, bbq), F.linear(x, wk), F.linear(x, wv) + F.linear(F.linear(x, av), bv) * 2.0


def make_group(dtype=torch.float32):
    x, *q = make((2, 9), 16, 12, 3, dtype)
    _, wk, *_ = make((1,), 16, 5, 1, dtype)
    _, wv, _, av, bv = make((1,), 16, 7, 2, dtype)
    return [x, *q, wk, wv, av, bv]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_of_one_input(check, dtype):
    inputs = make_group(dtype)
    check.no_worse(group, group_theirs, group_theirs, inputs)
    for i in range(0, len(inputs), 3 if INTERPRETED else 1):
        check.no_worse(group, group_theirs, group_theirs, inputs, [j == i for j in range(len(inputs))])


@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_output_that_is_not_used(check, used):
    inputs = make_group()
    needs = [True] + [i in ((1, 2, 3, 4), (5,), (6, 7, 8))[used] for i in range(1, 9)]
    check.no_worse(lambda *a: group(*a)[used], lambda *a: group_theirs(*a)[used], lambda *a: group_theirs(*a)[used], inputs, needs)


def test_saved_bytes(check):
    """The docstring's table: x once if dA or dW needs it, S for dB, nothing for dx; x is never kept twice by q, k and v."""
    inputs = make((2, 9), 16, 12, 3)
    x, s = 2 * 9 * 16 * 4, 2 * 9 * 3 * 4
    for needs in check.subsets(5):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs)]
        need_x, need_s = needs[1] or needs[3], needs[4]
        assert check.saved_bytes(ours, leaves, free=leaves[1:]) == x * need_x + s * need_s, needs
    leaves = [t.clone().requires_grad_() for t in make_group()]
    assert check.saved_bytes(group, leaves, free=leaves[1:]) == x + 2 * 9 * (3 + 2) * 4


def test_flops(check):
    M, n_in, n_out, r = 18, 16, 12, 3
    inputs = make((2, 9), n_in, n_out, r)
    base, branch = 2 * M * n_in * n_out, 2 * M * r
    forward = base + branch * (n_in + n_out)
    frozen = (True, False, False, True, True)
    assert check.flops(lambda: ours(*inputs)) == forward
    assert check.flops(lambda: check.run(ours, inputs, frozen)) == forward + base + branch * 2 * (n_in + n_out)
    only_b = (False, False, False, False, True)
    assert check.flops(lambda: check.run(ours, inputs, only_b)) == forward + branch * n_out


def test_compiles(check):
    check.compiles(ours, make((2, 9), 16, 12, 3))
    check.compiles(group, make_group(), [True, False, False, True, True, False, False, True, True])


def test_deterministic(check):
    check.deterministic(ours, make((200,), 33, 65, 5))


def test_opcheck():
    x, W, b, A, B = make((2, 9), 16, 12, 3)
    ops, dy, s = torch.ops.fastpeft, torch.randn(2, 9, 12), torch.randn(3, 18)
    torch.library.opcheck(ops.lora_linears_fwd.default, (x, [W, W], [b, None], [A, None], [B, None], [0.5, 1.0], 0.0, None))
    args = ([dy, None], x, [W, W], [A, None], [B, None], s, [0.5, 1.0], 0.0, None, True, [15, 3])
    torch.library.opcheck(ops.lora_linears_bwd.default, args)


def test_reference_gradcheck():
    inputs = [t.requires_grad_() for t in make((2, 3), 5, 4, 2, torch.float64)]
    assert torch.autograd.gradcheck(reference, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


def mask_of(seed, shape, p):
    """D(1), read through the op itself: A and B are identities and W is zero."""
    torch.manual_seed(seed)
    n, eye = shape[-1], torch.eye(shape[-1])
    return lora_linear(torch.ones(shape), torch.zeros(n, n), None, eye, eye, 1.0, p)


def test_dropout_is_pefts():
    """Independent zeros on the branch's input, the rest scaled up; gradients of the very same mask; masks differ between branches."""
    p, shape = 0.3, (40, 20)
    mask = mask_of(5, shape, p)
    assert torch.all((mask == 0) | ((mask - 1 / 0.7).abs() < 1e-6))
    assert abs(float((mask == 0).float().mean()) - p) < 4 * (p * 0.7 / mask.numel()) ** 0.5
    inputs = [t.requires_grad_() for t in make(shape[:1], 20, 20, 3)]
    torch.manual_seed(5)
    y = lora_linear(*inputs, SCALING, p)
    x, W, b, A, B = inputs
    want = F.linear(x, W, b) + F.linear(F.linear(x * mask, A), B) * SCALING
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    for got, exact in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy)):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=2e-5)
    eye, zero = torch.eye(20), torch.zeros(20, 20)
    first, second = lora_linears(torch.ones(shape), [(zero, None, eye, eye), (zero, None, eye, eye)], p)
    assert not torch.equal(first, second)
    assert not torch.equal(first, lora_linears(torch.ones(shape), [(zero, None, eye, eye)], p)[0])


def test_dropout_saves_a_seed(check):
    leaves = [t.requires_grad_() for t in make((2, 9), 16, 12, 3)]
    saved = check.saved_bytes(lambda *a: lora_linear(*a, SCALING, 0.5), leaves, free=leaves[1:])
    assert saved == 2 * 9 * (16 + 3) * 4 + 8


@pytest.mark.skipif(not INTERPRETED, reason="the kernels' own choices")
def test_several_programs(check, monkeypatch):
    """Whatever is summed over spans of rows and blocks of columns: the same numbers."""
    from fastpeft.kernels import lora_branch

    monkeypatch.setattr(lora_branch, "PROGRAMS", 4)
    frozen = (True, False, False, True, True)
    for dtype in (torch.float32, torch.bfloat16):
        check.no_worse(ours, reference, theirs, make((197,), 136, 528, 4, dtype), frozen)
        check.no_worse(group, group_theirs, group_theirs, make_group(dtype))
    check.deterministic(ours, make((197,), 70, 33, 17))
    test_dropout_is_pefts()


@pytest.mark.skipif(INTERPRETED, reason="PEFT is compared in the other modes")
def test_same_as_peft():
    layer = pytest.importorskip("peft.tuners.lora").Linear
    try:
        peft = layer(torch.nn.Linear(16, 12), "default", r=3, lora_alpha=6)
    except TypeError:  # newer PEFT takes a config
        from peft import LoraConfig

        peft = layer(torch.nn.Linear(16, 12), "default", config=LoraConfig(r=3, lora_alpha=6), r=3, lora_alpha=6)
    A, B = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    torch.nn.init.normal_(B)
    x = torch.randn(5, 16)
    got = lora_linear(x, peft.base_layer.weight, peft.base_layer.bias, A, B, peft.scaling["default"])
    torch.testing.assert_close(got, peft(x))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.randn(3, 11)}, ValueError, "do not fit"),
        ({"weight": torch.randn(10, 12).bfloat16()}, TypeError, "cast one"),
        ({"bias": torch.randn(9)}, ValueError, "pass shape"),
        ({"lora_A": None}, ValueError, "pass both"),
        ({"lora_B": torch.randn(10, 3)}, ValueError, "pass lora_A"),
        ({"x": torch.ones(3, 12, dtype=torch.long)}, TypeError, "cast it"),
        ({"dropout_p": 1.0}, ValueError, "must lie in"),
    ],
)
def test_errors(change, error, message):
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    with pytest.raises(error, match=message):
        lora_linear(**(dict(zip(names, make((3,), 12, 10, 2))) | change))


def test_no_projections():
    with pytest.raises(ValueError, match="at least one"):
        lora_linears(torch.randn(3, 12), [])


@settings(
    max_examples=8 if INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 70), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.tuples(*[st.booleans()] * 5))
def test_any_shape(check, rows, n_in, n_out, r, needs):
    torch.manual_seed(rows)
    check.no_worse(ours, reference, theirs, make((rows,), n_in, n_out, r), needs)
