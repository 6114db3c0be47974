"""LaVIN's adapter with the RMSNorm before it, against the paper's module in plain PyTorch.

The baseline is that module: grouped convolutions of width 1 on transposed tensors, both adapters in full. Target on CPU,
both together: 3.
"""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compiled, measure
from fastpeft.ops.mm_adapter import mm_adapter
from fastpeft.ops.norm_mm_adapter import norm_mm_adapter
from fastpeft.ops.rms_norm import rms_norm

SHAPES = [(4, 512, 2048), (2, 512, 4096)]
GPU_SHAPES = [(4, 512, 4096), (16, 512, 4096)]
H, EPS = 8, 1e-6


def paper(x, gamma, w_down, b_down, w_up, b_up, routing):
    wide = x.float()
    t = ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * gamma).transpose(1, 2)
    a = F.conv1d(t, w_down[:, :, None], b_down)
    branches = (F.conv1d(a, w_up[i][:, :, None], b_up[i], groups=2) * routing[:, i, None, None] for i in range(2))
    return (sum(branches) + t).transpose(1, 2).contiguous()


def fused(x, gamma, *params):
    return norm_mm_adapter(x, gamma, EPS, *params)


def apart(x, gamma, *params):
    return mm_adapter(rms_norm(x, gamma, EPS), *params)


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        shapes = GPU_SHAPES + SHAPES if settings.device == "cuda" else SHAPES
        for B, M, C in shapes[: len(shapes) // 2] if settings.quick else shapes:
            sizes = ((B, M, C), (C,), (H, C), (H,), (2, C, H // 2), (2, C), (B, 2))
            inputs = [torch.randn(s, device=settings.device).to(dtype).requires_grad_(i != 1) for i, s in enumerate(sizes)]
            dout = torch.randn(B, M, C, device=settings.device).to(dtype)
            fns = {"fastpeft": fused, "two ops": apart, **compiled(paper, settings), "the paper's": paper}
            how = {"cotangent": dout, "bytes_moved": (2 * dout.nbytes, 3 * dout.nbytes)}
            rows += measure("norm_mm_adapter", f"{B}x{M}x{C} h{H}", dtype, fns, inputs, settings, **how)
    return rows
