"""LayerNorm against ATen, torch.compile and Liger: with all gradients, dx alone, parameters alone, and with a residual added first."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compiled, liger, measure
from fastpeft.ops import add_layer_norm, layer_norm

SHAPES = [(2048, 768), (4096, 1024), (2048, 2048), (1024, 4096)]
GPU_SHAPES = [(8192, 4096), (65536, 768)]  # 64 MB and more: beyond a GPU's caches
GRADIENTS = {"all": (True, True, True), "dx": (True, False, False), "params": (False, True, True)}


def plain(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def plain_sum(x, residual, weight, bias):
    h = x + residual
    return plain(h, weight, bias), h


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in GPU_SHAPES if settings.device == "cuda" else SHAPES[:1] if settings.quick else SHAPES:
            x, dy, residual = torch.randn(3, m, n, device=settings.device).to(dtype).unbind(0)
            params, size = torch.randn(2, n, device=settings.device).to(dtype).unbind(0), x.nbytes
            for name, needs in GRADIENTS.items():
                inputs = [t.detach().requires_grad_(need) for t, need in zip((x, *params), needs)]
                fns = {"fastpeft": lambda *a: layer_norm(*a, 1e-5), **compiled(plain, settings)}
                fns |= liger("liger_layer_norm", settings, eps=1e-5) | {"torch": plain}
                moved, phases = (2 * size, (2 + needs[0]) * size), ("fwd", "bwd", "fwd+bwd") if name == "all" else ("bwd",)
                rows += measure(
                    f"layer_norm {name}", f"{m}x{n}", dtype, fns, inputs, settings, cotangent=dy, bytes_moved=moved, phases=phases
                )
            inputs = [t.detach().requires_grad_() for t in (x, residual, *params)]
            fns = {"fastpeft": lambda *a: add_layer_norm(*a, 1e-5), **compiled(plain_sum, settings), "torch": plain_sum}
            moved = (4 * size, 4 * size)
            rows += measure("add_layer_norm", f"{m}x{n}", dtype, fns, inputs, settings, cotangent=(dy, dy), bytes_moved=moved)
    return rows
