"""ATen's attention kernels with their log-sum-exp, and the backward that takes any output and log-sum-exp: the same two calls everywhere.

    o = softmax(scale Q K^T + mask) V      lse = logsumexp of the scaled scores
    backward:  P = exp(scale Q K^T + mask - lse)      dS = P (dO V^T - rowsum(dO O))

Given the output and lse of attention to more keys than K, backward is exact for its own K and V and gives their share of dQ.

| kernel    | where                                        | takes                                        |
|-----------|----------------------------------------------|----------------------------------------------|
| cpu       | CPU                                          | everything                                   |
| flash     | CUDA                                         | 16 bit, grouped heads, no mask               |
| efficient | CUDA, where flash does not take it           | float32 too; a mask; grouped heads expanded  |

Shapes: q, o [B, H, M, d]; k, v [B, H_kv, N, d]; mask additive, broadcastable to [B, H, M, N]; lse [B, H, M], float32 (float64 for
float64). ``causal`` is aligned at the first query and the first key. What a query without any key gets is the kernel's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention
from torch.nn.functional import pad

from fastpeft import _library
from fastpeft.ops._gemm import work_dtype

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_cuda_bwd = torch.ops.aten._scaled_dot_product_flash_attention_backward
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_bwd = torch.ops.aten._scaled_dot_product_efficient_attention_backward
MASK_ROW = 16  # elements: the efficient kernels read a mask's rows from addresses aligned to 16 bytes
LSE_ROW = 32  # elements: and a log-sum-exp's in whole blocks of queries; infinity makes P = 0 for those that are not there

# MKL has 16-bit products for any CPU, which the forward kernel calls and the backward kernel does not. Measured on an Intel Xeon under
# ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2, one thread, time in float32 over bfloat16: forward 1.5 at
# B2 H12 M128 d64, 0.95 at B1 H8 M512 d64, 1.02 at d128; forward and backward 0.3 at the first (float16 0.15).
FORWARD_IN_16_BIT = torch.backends.mkl.is_available()


def kernel_of(q: Tensor, k: Tensor, v: Tensor, causal: bool, masked: bool) -> str:
    """Which kernel takes these tensors as they are; "" for none. On CUDA PyTorch is asked, so that its switches count."""
    if q.device.type != "cuda":
        return "cpu" if q.device.type == "cpu" else ""
    plain = not masked and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0
    if plain and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])):
        return "flash"
    if q.dtype != torch.float64:
        k, v = (t[:, :1].expand(-1, q.shape[1], -1, -1) for t in (k, v))
        if can_use_efficient_attention(SDPAParams(q, k, v, None, 0.0, causal, False)):
            return "efficient"
    return ""


def takes_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> bool:
    """Whether SDPA takes cuDNN's kernel for a call with as many queries as keys, or without causality: from sm_90 on PyTorch asks that
    one first."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] < 9:
        return False
    return can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1]))


def _for_efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None):
    """k and v for every query head; the mask [B, H, M, N], broadcast by strides, its rows starting where the kernel can read them."""
    groups, N = q.shape[1] // k.shape[1], k.shape[2]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    if mask is not None:
        mask = pad(mask, (0, -N % MASK_ROW))[..., :N].expand(*q.shape[:3], N)
    return k, v, mask


def _in(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None, scale: float | None = None):
    """(o, lse)"""
    kernel = kernel_of(q, k, v, causal, mask is not None)
    if kernel == "cpu":
        work = q.dtype if FORWARD_IN_16_BIT else work_dtype(q)
        o, lse = _cpu(*_in(work, q, k, v), 0.0, causal, attn_mask=_in(work, mask)[0], scale=scale)
        return o.to(q.dtype), lse
    if kernel != "efficient":
        return _cuda(q, k, v, 0.0, causal, scale=scale)[:2]
    k, v, mask = _for_efficient(q, k, v, mask)
    o, lse, *_ = _efficient(q, k, v, mask, True, 0.0, causal, scale=scale)
    return o, lse[:, :, : q.shape[2]]


def flash_bwd(do, q, k, v, o, lse, causal: bool = False, mask: Tensor | None = None, scale: float | None = None):
    """(dq, dk, dv)"""
    kernel = kernel_of(q, k, v, causal, mask is not None)
    if kernel == "cpu":
        work = work_dtype(q)
        grads = _cpu_bwd(*_in(work, do, q, k, v, o), lse, 0.0, causal, attn_mask=_in(work, mask)[0], scale=scale)
        return tuple(grad.to(q.dtype) for grad in grads)
    if kernel != "efficient":
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read where there is dropout
        return _cuda_bwd(do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale)
    heads, seed = k.shape[1], torch.empty((), dtype=torch.int64, device=q.device)
    k, v, mask = _for_efficient(q, k, v, mask)
    do, o = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (do, o))  # as the kernel leaves o: no copy then
    lse = pad(lse, (0, -lse.shape[2] % LSE_ROW), value=torch.inf)
    needs = [True, True, True, False]
    dq, dk, dv, _ = _efficient_bwd(do, q, k, v, mask, o, lse, seed, seed, 0.0, needs, causal, scale=scale)
    if heads != k.shape[1]:
        dk, dv = (t.unflatten(1, (heads, -1)).sum(2) for t in (dk, dv))
    return dq, dk, dv


def _count(query, key, products: int) -> int:
    return products * 2 * query[0] * query[1] * query[2] * key[2] * query[3]


# torch counts SDPA's CUDA kernels only; like it, causality is not discounted
@_library.flop_formula(_cpu)
def _flash_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return _count(query, key, 2)


@_library.flop_formula(_cpu_bwd)
def _flash_bwd_flops(grad_out, query, key, *args, out_shape=None, **kwargs) -> int:
    return _count(query, key, 5)
