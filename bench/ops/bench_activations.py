"""SwiGLU, and GELU with an (IA)^3 scale, against the same in plain PyTorch and through torch.compile."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compiled, measure
from fastpeft.ops import gelu, swiglu

SHAPES = [(1024, 3072), (512, 11008)]
GPU_SHAPES = [(4096, 11008)]  # 90 MB: beyond a GPU's caches


def plain_swiglu(gate, up):
    return F.silu(gate) * up


def plain_gelu(x, scale):
    return F.gelu(x) * scale


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in GPU_SHAPES if settings.device == "cuda" else SHAPES[:1] if settings.quick else SHAPES:
            gate, up, dy = torch.randn(3, m, n, device=settings.device).to(dtype).unbind(0)
            scale, how = torch.randn(n, device=settings.device).to(dtype), {"cotangent": dy}
            gate, up, scale = (t.detach().requires_grad_() for t in (gate, up, scale))
            fns = {"fastpeft": swiglu, **compiled(plain_swiglu, settings), "torch": plain_swiglu}
            moved = (3 * gate.nbytes, 5 * gate.nbytes)
            rows += measure("swiglu", f"{m}x{n}", dtype, fns, (gate, up), settings, bytes_moved=moved, **how)
            fns = {"fastpeft": gelu, **compiled(plain_gelu, settings), "torch": plain_gelu}
            moved = (2 * gate.nbytes, 3 * gate.nbytes)
            rows += measure("gelu with scale", f"{m}x{n}", dtype, fns, (gate, scale), settings, bytes_moved=moved, **how)
    return rows
