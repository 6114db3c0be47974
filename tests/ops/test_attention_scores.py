"""Attention with dropout on the CPU: against the definition under the same mask, every gradient, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastpeft.ops import attention
from fastpeft.ops.attention_backends import allowed_keys
from fastpeft.ops.dropout import keep_mask, new_seed

B, H, M, N, d, n, P = 2, 4, 3, 5, 6, 2, 0.4


def inputs(kv_heads=H, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(B, H, M, d), (B, kv_heads, N, d), (B, kv_heads, N, d), (kv_heads, n, d), (kv_heads, n, d), (kv_heads, d), (kv_heads, d)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def options(tensors, with_prefix, with_rescale, **more):
    return {"prefix": tensors[3:5] if with_prefix else None, "rescale": tensors[5:] if with_rescale else None} | more


def literal(q, k, v, prefix=None, rescale=None, causal=False, key_padding_mask=None):
    """Every matrix formed, with the mask of the next seed."""
    allowed = allowed_keys(q, k, causal, key_padding_mask)
    if rescale is not None:
        k, v = k * rescale[0][:, None], v * rescale[1][:, None]
    if prefix is not None:
        k, v = (torch.cat([p.expand(B, -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        allowed = None if allowed is None else torch.nn.functional.pad(allowed, (n, 0), value=True)
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * d**-0.5
    scores = scores if allowed is None else scores.masked_fill(~allowed, -1e30)
    probabilities = scores.softmax(-1)
    if allowed is not None:
        probabilities = probabilities * allowed.any(-1, keepdim=True)
    return (probabilities * keep_mask(probabilities, P, new_seed())) @ v


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("with_prefix, with_rescale", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("causal, padded", [(False, False), (True, False), (False, True), (True, True)])
def test_values_and_gradients(kv_heads, with_prefix, with_rescale, causal, padded):
    mask = None
    if padded:
        mask = torch.ones(B, N, dtype=torch.bool)
        mask[0, 3:], mask[1] = False, False  # a sample without any key: zero output, zero gradient
    results = []
    for form, more in ((attention, {"dropout_p": P}), (literal, {})):
        t = inputs(kv_heads)
        torch.manual_seed(7)
        out = form(*t[:3], **options(t, with_prefix, with_rescale, causal=causal, key_padding_mask=mask, **more))
        used = t[:3] + (t[3:5] if with_prefix else []) + (t[5:] if with_rescale else [])
        results.append((out, *torch.autograd.grad(out.square().sum(), used)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 2), (5,), (6,)])
def test_any_subset_of_gradients(needed):
    grads = []
    for form, more in ((attention, {"dropout_p": P}), (literal, {})):
        t = [x.detach() for x in inputs()]
        for i in needed:
            t[i].requires_grad_()
        torch.manual_seed(7)
        out = form(*t[:3], **options(t, set(needed) & {3, 4}, set(needed) & {5, 6}, **more))
        grads.append(torch.autograd.grad(out.sum(), [t[i] for i in needed]))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_keeps_queries_keys_values_and_a_seed():
    """With (IA)^3's factors too: the scaled query is formed again; l_v keeps the output."""
    for with_rescale, more in ((False, 0), (True, B * H * M * d)):
        t, kept = inputs(), {}
        with saved_tensors_hooks(
            lambda x, kept=kept: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
        ):
            attention(*t[:3], dropout_p=P, **options(t, False, with_rescale))
        mine = {x.untyped_storage().data_ptr() for x in t}
        new = sum(size for address, size in kept.items() if address not in mine)
        assert new <= 8 * (more + 1) + (2 * H * d * 8 if with_rescale else 0)


@pytest.mark.parametrize("needed, kept", [((2,), "qk"), ((4,), "qk"), ((0,), "qkv"), ((3,), "qkv"), ((1, 2), "qkv")])
def test_values_are_kept_for_the_scores_gradients_alone(check, needed, kept):
    t = [x.detach() for x in inputs()]
    for i in needed:
        t[i].requires_grad_()
    prefix = set(needed) & {3, 4}
    sizes = dict(zip("qkv", (x.nbytes for x in t)))
    call = lambda *t: attention(*t[:3], dropout_p=P, **options(t, prefix, False))  # noqa: E731
    assert check.saved_bytes(call, t, free=t[3:]) == 8 + sum(sizes[name] for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    t = [x.detach() for x in inputs(dtype=dtype)]
    torch.manual_seed(7)
    got = attention(*t[:3], dropout_p=P)
    torch.manual_seed(7)
    keep_mask_in_float32 = literal(*(x.float() for x in t[:3]))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), keep_mask_in_float32, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
