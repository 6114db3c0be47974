"""Attention's backward for q alone: fewer products, the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from fastpeft.ops import attention
from fastpeft.ops.attention import attention_reference
from fastpeft.ops.attention_dq import BLOCK, dq_alone_pays


def make(M, N, d=128, dtype=torch.float32):
    return [torch.randn(2, length, 3, d).to(dtype).transpose(1, 2) for length in (M, N, N)]


def calling(fn, **how):
    return lambda q, k, v: fn(q, k, v, **how)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("M, N, causal", [(1, 1, False), (7, 257, False), (BLOCK + 3, 50, False), (2 * BLOCK + 5,) * 2 + (True,)])
def test_no_worse_than_pytorch(check, dtype, M, N, causal):
    inputs = make(M, N, dtype=dtype)
    assert dq_alone_pays(*inputs[:2], None)
    theirs = calling(F.scaled_dot_product_attention, is_causal=causal)
    fns = calling(attention, causal=causal), calling(attention_reference, causal=causal), theirs
    # with one key, dq is what is left of terms that cancel
    check.no_worse(*fns, inputs, (True, False, False), floor=1.0 if N == 1 else 1e-30)


def test_with_ia3s_factors(check):
    q, k, v = make(40, 50)
    factors = torch.rand(3, 128), torch.rand(3, 128)

    def call(fn):
        return lambda q, k, v, l_k, l_v: fn(q, k, v, rescale=(l_k, l_v))

    needs = (True, False, False, True, True)
    check.no_worse(call(attention), call(attention_reference), call(attention_reference), [q, k, v, *factors], needs)


def test_three_products_of_five(check):
    q, k, v = make(BLOCK, 64)
    product = 2 * q.numel() * k.shape[2]

    def step(*needs):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((q, k, v), needs)]
        return check.flops(lambda: attention(*leaves).sum().backward()) / product

    assert step(True, False, False) == 2 + 3
    assert step(True, True, False) == 2 + 5


def test_elsewhere_aten_serves():
    q, k, _ = make(8, 8)
    assert not dq_alone_pays(q.bfloat16(), k.bfloat16(), None)  # scores would be rounded before the exponential
    assert not dq_alone_pays(q, k, torch.zeros(2, 1, 1, 8))
    assert not dq_alone_pays(*make(8, 8, d=64)[:2], None)


def test_compiles_and_repeats(check):
    inputs, needs = make(BLOCK + 9, BLOCK + 9), (True, False, False)
    check.compiles(calling(attention, causal=True), inputs, needs)
    check.deterministic(calling(attention, causal=True), inputs, needs)
