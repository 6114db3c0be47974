"""Attention around a flash kernel of someone else: PyTorch's SDPA, and on CUDA flash-attn or xformers where installed.

| backend    | function                                                   | layout       | causal from         | takes           |
|------------|------------------------------------------------------------|--------------|---------------------|-----------------|
| flash-attn | flash_attn_func(q, k, v, dropout_p, softmax_scale, causal) | [B, M, H, d] | last query and key  | 16-bit, d <= 256|
| xformers   | memory_efficient_attention(q, k, v, attn_bias, p, scale)   | [B, M, H, d] | first query and key | 16-bit          |
| SDPA       | scaled_dot_product_attention                               | [B, H, M, d] | first query and key | everything      |

xformers takes grouped heads as [B, M, H_kv, H / H_kv, d]. Whatever needs a mask (padding, a prefix under causality, M != N
under causality) goes to SDPA. ``FASTPEFT_ATTENTION=sdpa|flash-attn|xformers`` restricts the choice; neither package is
imported before a tensor could use it.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from fastpeft import _library

CHOICE = _library.chosen("FASTPEFT_ATTENTION", ("sdpa", "flash-attn", "xformers"))


def _installed(package: str, name: str) -> bool:
    return CHOICE in ("", name) and importlib.util.find_spec(package) is not None


def fits(q: Tensor, k: Tensor) -> str:
    """The backend that will serve these tensors: "flash-attn", "xformers" or "sdpa"."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8:
        return "sdpa"
    if q.shape[-1] <= 256 and _installed("flash_attn", "flash-attn"):
        return "flash-attn"
    return "xformers" if _installed("xformers", "xformers") else "sdpa"


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float) -> Tensor:
    function = importlib.import_module("flash_attn").flash_attn_func
    o = function(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=dropout_p, softmax_scale=scale, causal=causal)
    return o.transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    heads, groups = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if heads != groups:  # grouped heads: a fifth dimension, k and v expanded over it without a copy
        q = q.unflatten(2, (groups, -1))
        k, v = (t[:, :, :, None].expand(-1, -1, -1, heads // groups, -1) for t in (k, v))
    bias = ops.LowerTriangularMask() if causal else None
    o = ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale)
    return (o.flatten(2, 3) if heads != groups else o).transpose(1, 2)


def unmasked(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float) -> Tensor | None:
    """The output [B, H, M, d], or None where SDPA should serve. ``causal`` here implies M = N."""
    backend = {"flash-attn": flash_attn, "xformers": xformers}.get(fits(q, k))
    return None if backend is None else backend(q, k, v, causal, scale, dropout_p)


def allowed_keys(q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None) -> Tensor | None:
    """[B or 1, 1, M or 1, N] bool, True = attend; causality is aligned at the last query and the last key."""
    M, N = q.shape[2], k.shape[2]
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
    if causal and M > 1:
        triangle = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(N - M)
        mask = triangle[None, None] if mask is None else mask & triangle
    return mask


def around_sdpa(q, k, v, causal, padding, scale, prefix, dropout_p) -> Tensor:
    """Any device, any dropout. Rows without a key attend everywhere and are then blanked: no backend gets to make NaN."""
    B, _, M, _ = q.shape
    is_causal = causal and k.shape[2] == M and padding is None and prefix is None
    mask = allowed_keys(q, k, causal and not is_causal, padding)
    if prefix is not None:
        n = prefix[0].shape[1]
        k, v = (torch.cat([p.to(t.dtype).expand(B, -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        mask = mask if mask is None else torch.nn.functional.pad(mask, (n, 0), value=True)
    alive = None
    if mask is None:
        o = unmasked(q, k, v, is_causal, scale, dropout_p)
        if o is not None:
            return o
    elif prefix is None:
        alive = mask.any(-1, keepdim=True)
        mask = mask | ~alive
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, **gqa)
    return o if alive is None else o.masked_fill(~alive, 0.0)
