"""Attention around a flash kernel of someone else: PyTorch's SDPA, and on CUDA flash-attn or xformers where installed.

| backend    | function                                                   | layout       | causal from         | takes           |
|------------|------------------------------------------------------------|--------------|---------------------|-----------------|
| flash-attn | flash_attn_func(q, k, v, dropout_p, softmax_scale, causal) | [B, M, H, d] | last query and key  | 16-bit, d <= 256|
| flash-attn | flash_attn_varlen_func, for padding without causality      | [T, H, d]    |                     | likewise        |
| flash-attn | flash_attn.cute.flash_attn_func: version 4, no dropout     | [B, M, H, d] | last query and key  | 16-bit, d <= 128|
| xformers   | memory_efficient_attention(q, k, v, attn_bias, p, scale)   | [B, M, H, d] | first query and key | 16-bit          |
| SDPA       | scaled_dot_product_attention                               | [B, H, M, d] | first query and key | everything      |

xformers takes grouped heads as [B, M, H_kv, H / H_kv, d], without a backward: where a gradient is asked for, SDPA serves them. So it does
whatever needs a mask: padding under causality; in xformers also padding, a prefix under causality, M != N under causality.
A package counts as installed where its functions are: FlashAttention-4 alone leaves a ``flash_attn`` without any (its own are in
``flash_attn.cute``, for cards from sm_90 on; version 2's need sm_80), and xformers may come without its attention, which newer ones keep in
the package ``mslk``.
Version 2 leaves to SDPA what cuDNN's kernel would take there, unless it is asked for.
``FASTPEFT_ATTENTION=sdpa|flash-attn|xformers`` restricts the choice; neither package is imported before a tensor could use it.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from fastpeft import _library
from fastpeft.ops._flash import takes_cudnn

CHOICE = _library.chosen("FASTPEFT_ATTENTION", ("sdpa", "flash-attn", "xformers"))


# name: (module, its functions that are called in any case), the best first
FUNCTIONS = {
    "flash-attn": (("flash_attn", ("flash_attn_func",)), ("flash_attn.cute", ("flash_attn_func",))),
    "xformers": tuple((home, ("memory_efficient_attention", "LowerTriangularMask")) for home in ("xformers.ops", "mslk.attention.fmha")),
}


@functools.cache
def _module(name: str):
    """The module with this backend's functions, None where there is none: imported once, when a tensor could first use it."""
    for module, functions in FUNCTIONS[name]:
        try:
            found = importlib.import_module(module)
        except Exception:  # a package built for another torch fails in ways of its own
            continue
        if all(callable(getattr(found, function, None)) for function in functions):
            return found
    return None


def _installed(name: str) -> bool:
    return CHOICE in ("", name) and _module(name) is not None


def _widest(device: torch.device) -> int:
    """Channels of a head that flash-attn takes on this device; 0: none."""
    if not _installed("flash-attn"):
        return 0
    widest, oldest = (128, (9, 0)) if _version_4() else (256, (8, 0))
    return widest if torch.cuda.get_device_capability(device) >= oldest else 0


def fits(q: Tensor, k: Tensor) -> str:
    """The backend that will serve these tensors: "flash-attn", "xformers" or "sdpa"."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8:
        return "sdpa"
    if q.shape[-1] <= _widest(q.device):
        return "flash-attn"
    return "xformers" if _installed("xformers") else "sdpa"


def serving() -> str:
    """What serves CUDA tensors here, and why: for ``fastpeft doctor``."""
    found = [name for name in FUNCTIONS if _installed(name)]
    if found:
        return f"{found[0]} in 16 bit, sdpa elsewhere" + (f" (FASTPEFT_ATTENTION={CHOICE})" if CHOICE else "")
    if CHOICE == "sdpa":
        return "sdpa (FASTPEFT_ATTENTION=sdpa)"
    missing = f"FASTPEFT_ATTENTION={CHOICE}, which is" if CHOICE else "flash-attn and xformers are"
    return f"sdpa ({missing} not installed)"


def _version_4() -> bool:
    return _module("flash-attn").__name__ == "flash_attn.cute"


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float) -> Tensor:
    options = {"deterministic": torch.are_deterministic_algorithms_enabled()}  # of the backward, as PyTorch's own kernels ask
    options |= {} if _version_4() else {"dropout_p": dropout_p}
    o = _module("flash-attn").flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale, causal=causal, **options)
    return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)  # version 4 gives the log-sum-exp, too


def flash_attn_varlen(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Keys that are padding go behind all the others, where no sample's length reaches. How many there are stays on the device: tables
    keep their size, and nothing waits."""
    function = _module("flash-attn").flash_attn_varlen_func
    (B, _, M, _), N, device = q.shape, k.shape[2], q.device
    order = padding.flatten().logical_not().to(torch.uint8).argsort(stable=True)  # [B N]
    starts = torch.nn.functional.pad(padding.sum(1).cumsum(0), (1, 0)).to(torch.int32)  # [B + 1]
    behind = (torch.arange(B * N, device=device) >= starts[-1])[:, None, None]
    # what backward leaves behind the last length is not written at all: the mask keeps it from dk and dv
    k, v = (t.transpose(1, 2).flatten(0, 1).index_select(0, order).masked_fill(behind, 0.0) for t in (k, v))  # [B N, H_kv, d]
    o = function(
        q.transpose(1, 2).flatten(0, 1),
        k,
        v,
        cu_seqlens_q=torch.arange(0, (B + 1) * M, M, dtype=torch.int32, device=device),
        cu_seqlens_k=starts,
        max_seqlen_q=M,
        max_seqlen_k=N,
        dropout_p=dropout_p,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return o.unflatten(0, (B, M)).transpose(1, 2).masked_fill(~padding.any(1)[:, None, None, None], 0.0)


def xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float) -> Tensor:
    ops = _module("xformers")
    heads, groups = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if heads != groups:  # grouped heads: a fifth dimension, k and v expanded over it without a copy
        q = q.unflatten(2, (groups, -1))
        k, v = (t[:, :, :, None].expand(-1, -1, -1, heads // groups, -1) for t in (k, v))
    bias = ops.LowerTriangularMask() if causal else None
    o = ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale)
    return (o.flatten(2, 3) if heads != groups else o).transpose(1, 2)


def _cudnn_is_faster(q: Tensor, k: Tensor, v: Tensor, causal: bool, n: int, dropout_p: float) -> bool:
    """Whether SDPA's own choice beats version 2: on an H200 cuDNN's kernel took 1.10 ms where PyTorch's build of version 2 took 1.89,
    forward and backward at 4 x 2048, 32 heads of 128 (bench/results/attention_h200.md)."""
    square = not n and not (causal and q.shape[2] != k.shape[2])
    return square and not CHOICE and not _version_4() and not dropout_p and takes_cudnn(q, k, v, causal)


def beside_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, padding: Tensor | None, n: int, scale: float, dropout_p: float):
    """The output [B, H, M, d], or None where SDPA should serve. The first ``n`` keys are a prefix, seen by every query."""
    backend, M, N = fits(q, k), q.shape[2], k.shape[2] - n
    if backend == "flash-attn":
        if _version_4() and (dropout_p or padding is not None):
            return None
        if padding is not None:
            whole = causal or not hasattr(_module("flash-attn"), "flash_attn_varlen_func")
            return None if whole else flash_attn_varlen(q, k, v, padding, scale, dropout_p)
        if _cudnn_is_faster(q, k, v, causal, n, dropout_p):
            return None
        # aligned at the last key, causality leaves the prefix to every query that sees a key at all
        return flash_attn(q, k, v, causal, scale, dropout_p) if not (causal and n and M > N) else None
    if backend != "xformers" or padding is not None or (causal and (n or M != N)):
        return None
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return None if trained and q.shape[1] != k.shape[1] else xformers(q, k, v, causal, scale, dropout_p)


def allowed_keys(q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None) -> Tensor | None:
    """[B or 1, H or 1, M or 1, N] bool, True = attend; causality is aligned at the last query and the last key. ``key_padding_mask``:
    [B, N], or a mask of four dimensions already."""
    M, N = q.shape[2], k.shape[2]
    mask = key_padding_mask
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    if causal and M > 1:
        triangle = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(N - M)
        mask = triangle[None, None] if mask is None else mask & triangle
    return mask


def around_sdpa(q, k, v, causal, padding, scale, prefix, dropout_p) -> Tensor:
    """Any device, any dropout. Rows without a key attend everywhere and are then blanked: no backend gets to make NaN."""
    B, _, M, _ = q.shape
    causal = causal and M > 1
    is_causal = causal and k.shape[2] == M and padding is None and prefix is None
    seen = (q, k, causal and not is_causal, padding)
    n = 0 if prefix is None else prefix[0].shape[1]
    if prefix is not None:
        k, v = (torch.cat([p.to(t.dtype).expand(B, -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        padding = padding if padding is None else torch.nn.functional.pad(padding, (n, 0), value=True)
    if 0 not in (q.numel(), k.numel()):
        o = beside_sdpa(q, k, v, causal, padding, n, scale, dropout_p)
        if o is not None:
            return o
    mask, alive = allowed_keys(*seen), None
    if mask is not None and prefix is not None:
        mask = torch.nn.functional.pad(mask, (n, 0), value=True)
    elif mask is not None:
        alive = mask.any(-1, keepdim=True)
        mask = mask | ~alive
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, **gqa)
    return o if alive is None else o.masked_fill(~alive, 0.0)
