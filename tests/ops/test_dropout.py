"""Dropout that keeps a seed."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastpeft.ops.dropout import dropout, dropout_reference, dropped, new_seed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (3, 257), (2, 5, 768), (0, 4)])
def test_zero_or_scaled_in_the_share_asked_for(dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    y = dropout(x, 0.25)
    assert y.dtype == dtype and y.shape == x.shape
    assert set(y.flatten().tolist()) <= {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}
    if x.numel() > 5000:
        assert abs((y == 0).double().mean() - 0.25) < 0.03


def test_backward_draws_the_same_mask():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    torch.manual_seed(0)
    seed = new_seed()
    torch.manual_seed(0)
    torch.testing.assert_close(dropout(x, 0.4), dropout_reference(x, 0.4, seed))


def test_keeps_eight_bytes():
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(torch.randn(64, 64, requires_grad=True), 0.1)
    assert sum(t.nbytes for t in kept) == 8


def test_off_is_the_input_itself():
    x = torch.randn(3, requires_grad=True)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_bad_probability(p):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        dropout(torch.randn(3), p)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_on_the_device_is_not_read(dtype):
    x = torch.ones(40, 500, dtype=dtype, device="cuda", requires_grad=True)
    seeds = [torch.tensor([number], device="cuda") for number in (5, 5, 6)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [dropped(x, 0.25, seed) for seed in seeds]
        drawn[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, again, other = (y.detach().cpu() for y in drawn)
    assert torch.equal(first, again) and torch.equal(x.grad.cpu(), first)
    zero, both = (first == 0).double().mean(), ((first == 0) & (other == 0)).double().mean()
    assert abs(float(zero) - 0.25) < 0.02 and abs(float(both) - 0.0625) < 0.01
