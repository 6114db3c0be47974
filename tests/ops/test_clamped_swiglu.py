"""SwiGLU of clamped gates: at the bounds, with infinities and NaN, as torch.clamp's derivative has them; and gates of transformers."""

import importlib

import pytest
import torch

from fastpeft import ops
from fastpeft.fused.layers import experts
from fastpeft.ops.clamped_swiglu import clamped_swiglu_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS = [{"alpha": 1.702, "one": 1.0, "interleaved": True}, {"interleaved": False}]


def step(fn, x, dy):
    x = x.clone().requires_grad_()
    y = fn(x)
    return y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype))


@pytest.mark.parametrize("form", FORMS, ids=["in turn", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_bounds(check, form, dtype):
    """0.1 is no number of any of these dtypes: it is rounded first, and what equals it passes its gradient."""
    limit = 0.1
    edge = torch.tensor(limit, dtype=dtype).item()
    values = [edge, -edge, 2 * edge, -2 * edge, edge / 2, -edge / 2, 0.0, 300.0, -300.0, 1e4, -1e4, torch.inf, torch.nan]
    x = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * 2).repeat(1, 300).to(dtype)
    dy = torch.ones(len(x), 300)
    y, dx = step(lambda t: ops.clamped_swiglu(t, limit, **form), x, dy)
    exact, exact_dx = step(lambda t: clamped_swiglu_reference(t, edge, **form), x.double(), dy)
    eager, eager_dx = step(lambda t: clamped_swiglu_reference(t, limit, **form), x, dy)
    assert (
        torch.equal(y.isnan(), exact.isnan())
        and torch.equal(dx == 0, (eager_dx == 0) | (dx == 0))
        and torch.equal(dx.isnan(), exact_dx.isnan())
    )
    for ours, theirs, truth in ((y, eager, exact), (dx, eager_dx, exact_dx)):
        ours, theirs, truth = (t.double().nan_to_num(7.0) for t in (ours, theirs, truth))
        assert check.error(ours, truth) <= check.error(theirs, truth) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", experts.CLAMPED)
def test_gates_of_transformers(form):
    module, _, name = experts.GATES[form].rpartition(".")
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    own = cls.__new__(cls)
    torch.nn.Module.__init__(own)
    own.limit = own.swiglu_limit = 0.6
    own.alpha = own.swiglu_alpha = 1.3
    own.act_fn = torch.nn.SiLU()
    x, dy = torch.randn(7, 40, dtype=torch.float64), torch.randn(7, 20)
    options = experts._clamped(own, experts.CLAMPED[form], own.act_fn)
    for ours, theirs in zip(step(lambda t: ops.clamped_swiglu(t, **options), x, dy), step(own._apply_gate, x, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    own.limit = own.swiglu_limit = torch.tensor(0.6)
    assert experts._clamped(own, experts.CLAMPED[form], own.act_fn) is None


def test_another_activation_is_left():
    own = torch.nn.Module()
    own.limit = 0.6
    with_its_own = next(form for form in experts.CLAMPED.values() if form.acts)
    assert experts._clamped(own, with_its_own, torch.nn.SiLU()) and experts._clamped(own, with_its_own, torch.nn.GELU()) is None


@pytest.mark.parametrize(
    "x, limit, match",
    [(torch.zeros(3, 5), 1.0, "as many of each"), (torch.tensor(1.0), 1.0, "as many"), (torch.zeros(2), -1.0, "negative")],
)
def test_what_does_not_fit(x, limit, match):
    with pytest.raises(ValueError, match=match):
        ops.clamped_swiglu(x, limit)
