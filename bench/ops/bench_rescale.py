"""(IA)^3's rescaling against plain multiplication: backward with the reduction for the scale, and the scale's gradient alone."""

import torch

from bench.timing import Row, Settings, backward_of, compare
from fastpeft.ops import rescale

SHAPES = [(2048, 768), (2048, 3072)]


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in SHAPES[:1] if settings.quick else SHAPES:
            x, dy = torch.randn(2, m, n, device=settings.device).to(dtype).unbind(0)
            scale = torch.randn(n, device=settings.device).to(dtype)
            for name, needs in {"both": (True, True), "scale": (False, True)}.items():
                inputs = [t.detach().requires_grad_(need) for t, need in zip((x, scale), needs)]
                rivals = {"fastpeft": backward_of(rescale, inputs, dy), "torch": backward_of(torch.mul, inputs, dy)}
                rows += compare(f"rescale bwd {name}", f"{m}x{n}", dtype, rivals, settings, bytes_moved=(2 + needs[0]) * x.nbytes)
    return rows
