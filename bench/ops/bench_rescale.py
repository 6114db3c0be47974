"""(IA)^3's rescaling against plain multiplication: with the reduction for the scale's gradient, and that gradient alone."""

import torch

from bench.timing import Row, Settings, compiled, measure
from fastpeft.ops import rescale

SHAPES = [(2048, 768), (2048, 3072)]
GPU_SHAPES = [(8192, 4096)]  # 64 MB: beyond a GPU's caches


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in GPU_SHAPES if settings.device == "cuda" else SHAPES[:1] if settings.quick else SHAPES:
            x, dy = torch.randn(2, m, n, device=settings.device).to(dtype).unbind(0)
            scale = torch.randn(n, device=settings.device).to(dtype)
            for name, needs in {"both": (True, True), "scale": (False, True)}.items():
                inputs = [t.detach().requires_grad_(need) for t, need in zip((x, scale), needs)]
                fns = {"fastpeft": rescale, **compiled(torch.mul, settings), "torch": torch.mul}
                moved, phases = (2 * x.nbytes, (2 + needs[0]) * x.nbytes), ("fwd", "bwd", "fwd+bwd") if name == "both" else ("bwd",)
                rows += measure(f"rescale {name}", f"{m}x{n}", dtype, fns, inputs, settings, cotangent=dy, bytes_moved=moved, phases=phases)
    return rows
