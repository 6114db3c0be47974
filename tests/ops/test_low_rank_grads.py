"""The gradients of a low-rank branch from one reading of dy, against two products, with float64 as the truth."""

import pytest
import torch

from fastpeft import _library
from fastpeft.ops.low_rank_grads import RANK, low_rank_grads, low_rank_grads_reference


def make(M, N, r, dtype=torch.float32):
    torch.manual_seed(M * N + r)
    return torch.randn(M, N, dtype=dtype), torch.randn(N, r, dtype=dtype), torch.randn(r, M, dtype=dtype)


def error(value, truth):
    return float((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


# odd sizes around vectors, blocks of three and of rows; several parts; ranks of one block and of two, and beyond csrc's
@pytest.mark.parametrize(
    "M, N, r", [(1, 1, 1), (2, 7, 3), (37, 101, 5), (64, 768, 8), (190, 252, 16), (5, 130, 9), (801, 2700, 8), (12, 40, RANK + 4)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_worse_than_pytorch(M, N, r, dtype):
    dy, B, S = make(M, N, r, dtype)
    truth = low_rank_grads_reference(*(t.double() for t in (dy, B, S)), 0.3)
    theirs = low_rank_grads_reference(dy, B, S, 0.3)
    grace = 4 * torch.finfo(dtype).eps
    for ours, other, exact in zip(low_rank_grads(dy, B, S, 0.3), theirs, truth):
        assert ours.shape == exact.shape and ours.dtype == dtype and ours.is_contiguous()
        assert error(ours, exact) <= error(other, exact) + grace


def test_either_alone_is_the_same():
    dy, B, S = make(70, 90, 6)
    dS, dB = low_rank_grads(dy, B, S, 2.0)
    alone_S, none = low_rank_grads(dy, B, None, 2.0)
    assert none is None and torch.equal(alone_S, dS)
    none, alone_B = low_rank_grads(dy, None, S, 2.0)
    assert none is None and torch.equal(alone_B, dB)
    assert low_rank_grads(dy, None, None, 2.0) == (None, None)


def test_strides():
    """Rows of a wider matrix are read in place, columns are copied; B and S may be transposed."""
    wide, B, S = make(33, 200, 4)
    for dy in (wide[:, 50:150], wide.t().contiguous().t()[:, :100]):
        for ours, same in zip(low_rank_grads(dy, B[:100], S, 1.0), low_rank_grads(dy.clone(), B[:100].clone(), S, 1.0)):
            assert torch.equal(ours, same)
    turned = low_rank_grads(wide, B.t().contiguous().t(), S.t().contiguous().t(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(turned, low_rank_grads(wide, B, S, 1.0)))


def test_no_rows():
    dS, dB = low_rank_grads(torch.empty(0, 12), torch.randn(12, 3), torch.empty(3, 0), 1.0)
    assert dS.shape == (3, 0) and dB.shape == (12, 3) and not dB.any()


def test_masters_are_scaled_in_their_own_dtype():
    dy, B, S = (t.bfloat16() for t in make(16, 24, 4))
    _, dB = low_rank_grads(dy, B, S, 0.3, torch.float32)
    assert dB.dtype == torch.float32 and torch.equal(dB, (S @ dy).t().float().mul(0.3))


def test_same_whatever_the_threads():
    dy, B, S = make(801, 2700, 8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(low_rank_grads(dy, B, S, 1.0))
    finally:
        torch.set_num_threads(before)
    if _library.backend_of()["low_rank_grads"]["CPU"] == "native":
        assert all(torch.equal(a, b) for a, b in zip(*found))
    else:
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*found))
