"""Attention under any mask, constant biases, soft caps, sinks, trained biases: against the definition in float64, every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastpeft.ops import attention
from fastpeft.ops.attention_scores import attention_with_scores

B, H, M, N, d = 2, 4, 5, 7, 6


def inputs(kv_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(B, heads, rows, d, dtype=dtype).requires_grad_() for heads, rows in ((H, M), (kv_heads, N), (kv_heads, N))]


def definition(q, k, v, allowed=None, bias=None, softcap=None, sinks=None, scale=0.3, uniform=False):
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores if allowed is None else scores.masked_fill(~allowed, -1e300)
    if sinks is None:
        P = scores.softmax(-1)
    else:
        P = torch.cat([scores, sinks.view(1, H, 1, 1).expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    if allowed is not None and not uniform:
        P = P * allowed.any(-1, keepdim=True)
    return P @ v


def compare(mine, theirs, wanted):
    assert torch.isfinite(mine).all()
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    weight = torch.randn(mine.shape, dtype=mine.dtype)
    got, want = (torch.autograd.grad((out * weight).sum(), wanted) for out in (mine, theirs))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def a_mask(shape):
    torch.manual_seed(3)
    mask = torch.rand(shape) < 0.5
    mask[..., 2] = True
    return mask


@pytest.mark.parametrize("shape", [(B, 1, M, N), (1, H, M, N), (B, H, M, N), (1, 1, M, N), (B, 1, 1, N), (1, 1, 1, N)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_masks_and_constant_biases(shape, with_bias):
    q, k, v = inputs()
    allowed, bias = a_mask(shape), torch.randn(shape, dtype=torch.float64) if with_bias else None
    compare(attention(q, k, v, attn_mask=allowed, bias=bias, scale=0.3), definition(q, k, v, allowed, bias), (q, k, v))
    if with_bias:
        compare(attention(q, k, v, bias=bias, scale=0.3), definition(q, k, v, None, bias), (q, k, v))
        padding = a_mask((B, N))
        compare(
            attention(q, k, v, bias=bias, key_padding_mask=padding, scale=0.3), definition(q, k, v, padding[:, None, None], bias), (q, k, v)
        )


@pytest.mark.parametrize("rows", [N, 3])
def test_a_bias_under_causality(rows):
    q, k, v = inputs()
    q = torch.randn(B, H, rows, d, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, H, rows, N, dtype=torch.float64)
    triangle = torch.ones(rows, N, dtype=torch.bool).tril(N - rows)
    compare(attention(q, k, v, causal=True, bias=bias, scale=0.3), definition(q, k, v, triangle, bias), (q, k, v))


def test_a_query_without_keys():
    q, k, v = inputs()
    allowed = a_mask((B, 1, M, N))
    allowed[0, 0, 1], allowed[1] = False, False
    compare(attention(q, k, v, attn_mask=allowed, scale=0.3), definition(q, k, v, allowed), (q, k, v))
    compare(attention_with_scores(q, k, v, allowed, 0.3), definition(q, k, v, allowed), (q, k, v))
    with torch.no_grad():
        mine = attention_with_scores(q, k, v, allowed, 0.3, uniform=True)
        torch.testing.assert_close(mine, definition(q, k, v, allowed, uniform=True), rtol=1e-10, atol=1e-12)


def test_uniform_gradients_are_eager_attentions():
    """Scores plus float64's least number: the values forget the score, the gradient does not."""
    q, k, v = inputs()
    allowed = a_mask((B, 1, M, N))
    allowed[0, 0, 1] = False
    least = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    compare(attention_with_scores(q, k, v, allowed, 0.3, uniform=True), definition(q, k, v, None, least), (q, k, v))


@pytest.mark.parametrize("softcap, with_sinks, with_bias, masked", itertools.product((None, 0.7), *[(False, True)] * 3))
def test_soft_caps_sinks_and_trained_biases(softcap, with_sinks, with_bias, masked):
    q, k, v = inputs()
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if with_sinks else None
    bias = torch.randn(1, H, M, N, dtype=torch.float64, requires_grad=True) if with_bias else None
    allowed = a_mask((B, 1, M, N)) if masked else None
    if masked and with_sinks:
        allowed[0, 0, 1] = False  # its sink takes all
    mine = attention_with_scores(q, k, v, allowed, 0.3, softcap=softcap, sinks=sinks, bias=bias)
    compare(mine, definition(q, k, v, allowed, bias, softcap, sinks), [t for t in (q, k, v, sinks, bias) if t is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_pytorch(dtype):
    q, k, v = inputs(dtype=torch.float64)
    sinks, truth = torch.randn(H, dtype=torch.float64), None
    truth = definition(q, k, v, softcap=5.0, sinks=sinks)
    low = [t.detach().to(dtype) for t in (q, k, v, sinks)]
    mine = attention_with_scores(*low[:3], None, 0.3, softcap=5.0, sinks=low[3])
    theirs = definition(*low[:3], softcap=5.0, sinks=low[3])
    assert mine.dtype == dtype
    assert (mine - truth).abs().max() <= 1.05 * (theirs - truth).abs().max() + torch.finfo(dtype).eps


def test_saved():
    """Masks and biases are kept as they came: layers that share one keep it once."""
    q, k, v = inputs()
    allowed, bias, kept = a_mask((B, 1, M, N)), torch.randn(1, H, M, N, dtype=torch.float64), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(q, k, v, attn_mask=allowed, bias=bias)
    storages = {t.untyped_storage().data_ptr() for t in kept}
    assert {t.untyped_storage().data_ptr() for t in (q, k, v, allowed, bias)} < storages and len(storages) == 7  # and o, lse
    kept.clear()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention_with_scores(q, k, v, allowed, 0.3, softcap=5.0)
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (q, k, v, allowed)}


@pytest.mark.parametrize(
    "given, says",
    [
        ({"attn_mask": torch.ones(B, 1, M, N)}, "bool"),
        ({"attn_mask": torch.ones(B, 1, M, N, dtype=torch.bool), "key_padding_mask": torch.ones(B, N, dtype=torch.bool)}, "one of the two"),
        ({"attn_mask": torch.ones(B, M, N, dtype=torch.bool)}, "broadcast"),
        ({"bias": torch.ones(3, 1, M, N)}, "broadcast"),
        ({"bias": torch.ones(B, 1, M, N, dtype=torch.long)}, "floating"),
        ({"bias": torch.ones(B, 1, M, N, requires_grad=True)}, "trained"),
        ({"bias": torch.ones(B, 1, M, N), "prefix": (torch.ones(2, 3, d), torch.ones(2, 3, d))}, "prefix"),
    ],
)
def test_bad_masks(given, says):
    q, k, v = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=says):
        attention(q, k, v, **given)
