"""Dropout from a seed, in one launch: y = D(x).

Element i of x, in the order of its shape, is kept where the number of Philox at (seed, i) is at least p: one call of Philox gives four
neighbours theirs. Memory moved: x and y. Backward is the same call on dy.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels.lora_branch import kept

BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def _dropout_kernel(x_ptr, seed_ptr, y_ptr, n, p, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
    keep = kept(tl.load(seed_ptr), start // 4 + tl.arange(0, BLOCK // 4), p, x.shape)
    y = tl.where(keep, x.to(tl.float32) * (1.0 / (1.0 - p)), 0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """``x`` of any shape; seed int64 [1], on x's device."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](x_ptr=x, seed_ptr=seed, y_ptr=y, n=x.numel(), p=p, BLOCK=BLOCK)
    return y


def aot_cases(shared: int):
    for dtype in ("fp32", "bf16"):
        types = {"x_ptr": f"*{dtype}", "seed_ptr": "*i64", "y_ptr": f"*{dtype}", "n": "i32", "p": "fp32"}
        yield f"dropout/{dtype}", _dropout_kernel, types, {"BLOCK": BLOCK}, {}
