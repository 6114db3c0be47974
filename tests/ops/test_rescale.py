"""rescale against PyTorch's multiplication, with float64 as the truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops import rescale
from fastpeft.ops.rescale import rescale_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TRIPLE = (rescale, rescale_reference, lambda x, scale: x * scale)


def test_backend():
    want = "native" if (_library.FORCED or "native") == "native" else "composite"
    assert _library.backend_of()["rescale_bwd"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 252, 257, 768, 901])
def test_every_gradient_subset(check, n, dtype):
    x = torch.randn(3, 5, n).to(dtype)
    for shape in [(n,), (5, 1), (3, 1, n), (3, 5, 1), (1, 5, n), (), (3, 5, n)]:
        scale = torch.randn(shape).to(dtype)
        for needs in check.subsets(2):
            check.no_worse(*TRIPLE, [x, scale], needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_many_rows_and_strides(check, dtype):
    q = torch.randn(2, 70, 4, 33).to(dtype)
    check.no_worse(*TRIPLE, [q.transpose(1, 2), torch.randn(4, 1, 33).to(dtype)])  # l [H, 1, d] on [B, H, M, d]
    check.no_worse(*TRIPLE, [torch.randn(1500, 33).to(dtype), torch.randn(33).to(dtype)])
    check.no_worse(*TRIPLE, [torch.randn(3, 600).to(dtype)[:, 7:264], torch.randn(257, 1).to(dtype)[:, 0]])
    check.no_worse(*TRIPLE, [torch.randn(1, 257).to(dtype).expand(6, 257), torch.randn(1).to(dtype).expand(257)])
    if dtype == torch.bfloat16:
        check.no_worse(rescale, rescale_reference, lambda x, s: x * s.bfloat16(), [q, torch.randn(33)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whoever_multiplies_gives_the_same_bits(dtype):
    """ATen where dtypes are alike, csrc elsewhere: forward, and backward for x alone."""
    x, scale = torch.randn(5, 257).to(dtype).requires_grad_(), torch.randn(257).to(dtype)
    y = rescale(x, scale)
    assert torch.equal(y, torch.ops.fastpeft.rescale_fwd(x.detach(), scale)) and torch.equal(y, x * scale)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(dx, torch.ops.fastpeft.rescale_bwd(y.detach(), None, scale, True, False)[0])


def test_zeros_are_exact(check):
    x, scale = torch.randn(4, 7), torch.zeros(7)
    (y,), (dx, dscale) = check.run(rescale, [x, scale])
    assert not y.any() and not dx.any() and dscale.all()


def test_empty_batch(check):
    (y,), (dx, dscale) = check.run(rescale, [torch.empty(0, 7), torch.ones(7)])
    assert y.shape == dx.shape == (0, 7) and not dscale.any()


def test_saved_bytes(check):
    x, scale = torch.randn(5, 7), torch.randn(7)
    for needs, want in {(True, True): x.nbytes, (True, False): 0, (False, True): x.nbytes, (False, False): 0}.items():
        inputs = [t.clone().requires_grad_(need) for t, need in zip((x, scale), needs)]
        assert check.saved_bytes(rescale, inputs, free=inputs[1:]) == want


def test_gradients_operators_compiler(check):
    x, scale = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rescale, (x, scale))
    ops = torch.ops.fastpeft
    torch.library.opcheck(ops.rescale_fwd, (x.detach(), scale.detach()))
    torch.library.opcheck(ops.rescale_bwd, (x.detach(), x.detach(), scale.detach(), True, True))
    torch.library.opcheck(ops.rescale_bwd, (x.detach(), None, scale.detach(), True, False))
    check.compiles(rescale, [torch.randn(3, 5), torch.randn(5)])
    check.deterministic(rescale, [torch.randn(900, 33), torch.randn(33)])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_any_broadcast(shape, data):
    """dscale is the gradient of a broadcast multiplication, whichever dimensions the scale broadcasts over."""
    kept = [n if data.draw(st.booleans()) else 1 for n in shape][data.draw(st.integers(0, len(shape))) :]
    x, dy = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    scale = torch.randn(kept, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(*[torch.autograd.grad(f(x, scale), scale, dy)[0] for f in (rescale, torch.mul)])


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="does not broadcast"):
        rescale(torch.randn(3, 8), torch.randn(3))
    with pytest.raises(ValueError, match="does not broadcast"):
        rescale(torch.randn(8), torch.randn(3, 8))
    with pytest.raises(TypeError, match="cast scale"):
        rescale(torch.randn(3, 8), torch.randn(8).half())
    with pytest.raises(ValueError, match="at least one dimension"):
        rescale(torch.tensor(1.0), torch.tensor(1.0))
