"""Inputs and calls that the tests of attention and of its backends share."""

import torch
import torch.nn.functional as F

from fastpeft.ops import attention_backends as backends

NAMES = ("q", "k", "v", "P_k", "P_v", "l_k", "l_v")


def make(B=2, H=4, G=2, M=5, N=7, d=8, n=3, dtype=torch.float32):
    shapes = ((B, H, M, d), (B, G, N, d), (B, G, N, d), (G, n, d), (G, n, d), (G, d), (G, d))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def padding(B, N):
    """A sample without any key, a full one, the rest at random."""
    mask = torch.rand(B, N) > 0.4
    mask[0], mask[-1] = False, True
    return mask


def calling(fn, causal=False, mask=None, prefix=True, rescale=True):
    def call(*tensors):
        q, k, v, *rest = tensors
        extra = {"prefix": tuple(rest[:2])} if prefix else {}
        extra |= {"rescale": tuple(rest[-2:])} if rescale else {}
        return fn(q, k, v, causal=causal, key_padding_mask=mask, **extra)

    return call


def written_out(q, k, v, *, causal=False, key_padding_mask=None, prefix=None, rescale=None):
    """Scaled and concatenated keys and values, expanded heads, SDPA."""
    if rescale is not None:
        k, v = k * rescale[0][:, None], v * rescale[1][:, None]
    mask = backends.allowed_keys(q, k, causal, key_padding_mask)
    if prefix is not None:
        k, v = (torch.cat([p.expand(q.shape[0], -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        mask = None if mask is None else F.pad(mask, (prefix[0].shape[1], 0), value=True)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def pick(tensors, prefix, rescale):
    return tensors[:3] + (tensors[3:5] if prefix else []) + (tensors[5:] if rescale else [])
