"""Linear layers of experts with low-rank branches, and rows with a factor each: against the definition, in float64 and below."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.ops.activations import silu
from fastpeft.ops.expert_linear import Experts, expert_linear, expert_linear_reference, row_factors

ENDS = {"all": (3, 8, 12), "one without rows": (5, 5, 12), "the last alone": (0, 0, 12), "the first alone": (12, 12, 12)}


def make(ends, rank=2, bias=True, turned=False, dtype=torch.float64, width=7, out=5):
    torch.manual_seed(1)
    E, rows = len(ends), ends[-1]
    weight = torch.randn(E, width, out, dtype=torch.float64).mT if turned else torch.randn(E, out, width, dtype=torch.float64)
    branch = [torch.randn(E, rank, width, dtype=torch.float64), torch.randn(E, out, rank, dtype=torch.float64)] if rank else [None, None]
    tensors = [torch.randn(rows, width, dtype=torch.float64), weight, torch.randn(E, out, dtype=torch.float64) if bias else None, *branch]
    return [t if t is None else t.to(dtype) for t in tensors]


def call(fn, ends, scaling=0.7):
    return lambda x, weight, bias, down, up: fn(x, ends, Experts(weight, bias, down, up, scaling))


@pytest.mark.parametrize("rank, bias, turned", [(2, True, False), (3, False, True), (0, True, True), (0, False, False), (20, False, False)])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_every_gradient(check, ends, rank, bias, turned):
    tensors = make(ends, rank, bias, turned)
    needs = [t is not None for t in tensors]
    (y,), grads = check.run(call(expert_linear, ends), tensors, needs)
    (want,), wanted = check.run(call(expert_linear_reference, ends), tensors, needs)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, wanted):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_rows(check):
    (y,), grads = check.run(call(expert_linear, (0, 0, 0)), make((0, 0, 0)))
    assert y.shape == (0, 5) and not any(g.any() for g in grads)


def test_every_subset_of_gradients(check):
    tensors = make(ENDS["one without rows"])
    _, every = check.run(call(expert_linear, ENDS["one without rows"]), tensors)
    for needs in check.subsets(5):
        _, grads = check.run(call(expert_linear, ENDS["one without rows"]), tensors, needs)
        for need, ours, whole in zip(needs, grads, every):
            assert (ours is not None) == need
            if need:
                torch.testing.assert_close(ours, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_pytorch(check, dtype):
    """Which sums weight and branch before the product."""
    ends = (40, 40, 130)
    tensors = make(ends, 4, dtype=dtype, width=64, out=48)
    truth = check.run(call(expert_linear_reference, ends), [t.double() for t in tensors])
    runs = [check.run(call(fn, ends), tensors) for fn in (expert_linear, expert_linear_reference)]
    for ours, theirs, exact in zip(*(outputs + grads for outputs, grads in (*runs, truth))):
        assert ours.dtype == dtype
        assert check.error(ours, exact) <= 2 * check.error(theirs, exact) + torch.finfo(dtype).eps


def test_products_are_counted():
    x, weight, _, down, up = make((3, 8, 12), bias=False)
    leaves = [x.requires_grad_(), down.requires_grad_(), up.requires_grad_()]
    with FlopCounterMode(display=False) as counter:
        expert_linear(leaves[0], (3, 8, 12), Experts(weight, None, *leaves[1:])).sum().backward()
    wide, low_in, low_out = 12 * 7 * 5, 12 * 7 * 2, 12 * 5 * 2
    assert counter.get_total_flops() == 2 * (2 * wide + 3 * low_in + 3 * low_out)


def test_what_is_kept():
    """Of the input its recipe, where the branch is trained; of a frozen layer nothing."""
    ends = ENDS["all"]
    x, weight, bias, down, up = make(ends)
    z, factors = x.clone().requires_grad_(), torch.randn(12, dtype=torch.float64, requires_grad=True)

    def kept(fn):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
            fn()
        return sorted(t.numel() for p, t in found.items() if p not in {t.data_ptr() for t in (z, factors, weight, bias, down, up)})

    down.requires_grad_(), up.requires_grad_()
    assert kept(lambda: expert_linear(silu(z), ends, Experts(weight, bias))) == []
    assert kept(lambda: expert_linear(silu(z), ends, Experts(weight, bias, down, up))) == [2 * 12]
    assert kept(lambda: expert_linear(row_factors(silu(z), factors), ends, Experts(weight, bias, down, up))) == [2 * 12]
    assert kept(lambda: row_factors(silu(z), factors)) == []
    with fp.without("remake"):
        assert kept(lambda: row_factors(silu(z), factors)) == [12 * 7]


def test_row_factors(check):
    x, factors = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    for needs in check.subsets(2):
        (y,), grads = check.run(row_factors, [x, factors], needs)
        (want,), wanted = check.run(lambda x, f: x * f[:, None], [x, factors], needs)
        assert torch.equal(y, want)
        for ours, theirs in zip(grads, wanted):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    (_,), (dx, df) = check.run(row_factors, [x.bfloat16(), factors.float()])
    assert dx.dtype == torch.bfloat16 and df.dtype == torch.float32


def test_operators_say_what_they_do():
    x, weight, bias, down, up = make(ENDS["all"])
    y, low = torch.ops.fastpeft.expert_linear_fwd(x, [3, 8, 12], weight, bias, down, up, 0.7)
    calls = {"expert_linear_fwd": (x, [3, 8, 12], weight, bias, down, up, 0.7)}
    calls["expert_linear_bwd"] = (y, x, [3, 8, 12], weight, down, up, low, 0.7, [True] * 5)
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, args, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit():
    x, weight, bias, down, up = make(ENDS["all"])
    wrong = {
        "do not fit; pass": (x[:, 1:], (3, 8, 12), Experts(weight)),
        "do not cut 12 rows into 3": (x, (3, 8, 11), Experts(weight)),
        "do not cut": (x, (8, 3, 12), Experts(weight)),
        "pass both": (x, (3, 8, 12), Experts(weight, None, down)),
        "do not fit weight": (x, (3, 8, 12), Experts(weight, None, down, up[:, 1:])),
        "bias": (x, (3, 8, 12), Experts(weight, bias[1:])),
    }
    for message, args in wrong.items():
        with pytest.raises(ValueError, match=message):
            expert_linear(*args)
    with pytest.raises(TypeError, match="one dtype"):
        expert_linear(x, (3, 8, 12), Experts(weight.float()))
