"""The row pass of linear_cross_entropy: a chunk of logits becomes its losses and, in place, its gradient, in two reads and a write.

    loss = lse(z) - (1 - e) z_y - (e / V) sum_v z_v            G = s (softmax(z) - (1 - e) onehot(y) - e / V)

One program per row, looping over blocks of the vocabulary with a running maximum and a rescaled sum (Milakov, Gimelshein, "Online
normalizer calculation for softmax", 2018). The GEMMs around it stay with cuBLAS: at 100 rows and more its speed is out of reach.
Shapes: z [M, V] float32 or float64, overwritten by G where FORM; labels y [M] int64; row_scale s [M]; loss [M].
Compiled for sm_80, sm_90 and sm_100, and run in Triton's interpreter; not yet timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class RowsConfig:
    """One row per program: enough loads in flight to stream it. 4,096 float32 over 8 warps are 16 registers a thread."""

    BLOCK_V: int = 4096
    num_warps: int = 8


CONFIG = RowsConfig()


@triton.jit
def _cross_entropy_rows_kernel(
    z_ptr,
    labels_ptr,
    row_scale_ptr,
    loss_ptr,
    V,
    stride_zm,
    SMOOTHING: tl.constexpr,  # a constant: as a run-time argument it would be rounded to float32
    HAS_SCALE: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zm
    dtype = loss_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    at_label = tl.load(z_ptr + label)
    offs_v = tl.arange(0, BLOCK_V)
    size = tl.zeros([], dtype) + V  # an int divided as float32 would cost float64 its digits

    top = tl.full([], float("-inf"), dtype)
    total = tl.zeros([], dtype)
    plain = tl.zeros([], dtype)  # sum of logits, for smoothing
    for start in range(0, V, BLOCK_V):
        mask_v = start + offs_v < V
        z = tl.load(z_ptr + start + offs_v, mask=mask_v, other=float("-inf"))  # [BLOCK_V]
        higher = tl.maximum(top, tl.max(z, 0))
        # a block of -inf alone: nothing to sum yet, and -inf - -inf would be nan
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base), 0)
        top = higher
        plain += tl.sum(tl.where(mask_v, z, 0.0), 0)

    loss = tl.log(total) + top - (1.0 - SMOOTHING) * at_label
    if SMOOTHING > 0.0:  # not added at 0: a logit of -inf would make 0 * inf
        loss -= SMOOTHING * plain / size
    tl.store(loss_ptr + row, loss)
    if FORM:
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(row_scale_ptr + row)
        for start in range(0, V, BLOCK_V):
            mask_v = start + offs_v < V
            z = tl.load(z_ptr + start + offs_v, mask=mask_v, other=float("-inf"))  # [BLOCK_V]
            g = tl.exp(z - top) / total - SMOOTHING / size
            g = tl.where(start + offs_v == label, g - (1.0 - SMOOTHING), g) * scale
            tl.store(z_ptr + start + offs_v, g, mask=mask_v)


def cross_entropy_rows(
    z: torch.Tensor, labels: torch.Tensor, smoothing: float, row_scale: torch.Tensor | None, form: bool
) -> torch.Tensor:
    """Losses [M] of logits ``z`` [M, V]; z becomes G if ``form``. ``labels`` lie in [0, V)."""
    M, V = z.shape
    loss = torch.empty(M, dtype=z.dtype, device=z.device)
    if M == 0:
        return loss
    BLOCK_V = min(CONFIG.BLOCK_V, triton.next_power_of_2(V))
    _cross_entropy_rows_kernel[(M,)](
        z_ptr=z,
        labels_ptr=labels,
        row_scale_ptr=row_scale,
        loss_ptr=loss,
        V=V,
        stride_zm=z.stride(0),
        SMOOTHING=smoothing,
        HAS_SCALE=row_scale is not None,
        FORM=form,
        BLOCK_V=BLOCK_V,
        num_warps=CONFIG.num_warps,
    )
    return loss


def aot_cases(shared: int):
    """(name, kernel, signature, constexprs, options) for bench/aot.py."""
    signature = {
        "z_ptr": "*fp32",
        "labels_ptr": "*i64",
        "row_scale_ptr": "*fp32",
        "loss_ptr": "*fp32",
        "V": "i32",
        "stride_zm": "i32",
    }
    for form in (False, True):
        constexprs = {"SMOOTHING": 0.1, "HAS_SCALE": True, "FORM": form, "BLOCK_V": CONFIG.BLOCK_V}
        name = "linear_cross_entropy/rows" + ("_grad" if form else "")
        yield name, _cross_entropy_rows_kernel, signature, constexprs, {"num_warps": CONFIG.num_warps}
