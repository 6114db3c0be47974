"""ATen's flash attention with its log-sum-exp, and the backward that takes any output and log-sum-exp: the same two calls on CPU and CUDA.

    o = softmax(scale Q K^T) V      lse = logsumexp of the scaled scores
    backward:  P = exp(scale Q K^T - lse)      dS = P (dO V^T - rowsum(dO O))

Given the output and lse of attention to more keys than K, backward is exact for its own K and V and gives their share of dQ.
Shapes: q, o [B, H, M, d]; k, v [B, H_kv, N, d]; lse [B, H, M], float32 (float64 for float64). ``causal`` is aligned at the first query and
the first key; ``mask``, additive, is the CPU's alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.utils.flop_counter import flop_registry, register_flop_formula

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_cuda_bwd = torch.ops.aten._scaled_dot_product_flash_attention_backward


def cuda_flash_serves(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """Whether CUDA's kernel takes these tensors as they are: 16 bit, d a multiple of 8, a GPU that has it, not switched off."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[3] % 8:
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1]))


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None, scale: float | None = None):
    """(o, lse)"""
    if q.device.type == "cpu":
        return _cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return _cuda(q, k, v, 0.0, causal, scale=scale)[:2]


def flash_bwd(do, q, k, v, o, lse, causal: bool = False, mask: Tensor | None = None, scale: float | None = None):
    """(dq, dk, dv)"""
    if q.device.type == "cpu":
        return _cpu_bwd(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read where there is dropout
    return _cuda_bwd(do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale)


def _count(query, key, products: int) -> int:
    return products * 2 * query[0] * query[1] * query[2] * key[2] * query[3]


if flop_registry.get(_cpu) is None:  # torch counts SDPA's CUDA kernels only; like it, causality is not discounted

    @register_flop_formula(_cpu)
    def _flash_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return _count(query, key, 2)

    @register_flop_formula(_cpu_bwd)
    def _flash_bwd_flops(grad_out, query, key, *args, out_shape=None, **kwargs) -> int:
        return _count(query, key, 5)
