"""LayerNorm against ATen: forward, and backward with all gradients, dx alone, parameters alone."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, backward_of, compare, compiled
from fastpeft.ops import add_layer_norm, layer_norm

SHAPES = [(2048, 768), (4096, 1024), (2048, 2048), (1024, 4096)]
GRADIENTS = {"all": (True, True, True), "dx": (True, False, False), "params": (False, True, True)}


def plain(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in SHAPES[:1] if settings.quick else SHAPES:
            x, dy, residual = torch.randn(3, m, n, device=settings.device).to(dtype).unbind(0)
            weight, bias = torch.randn(2, n, device=settings.device).to(dtype).unbind(0)
            shape, size = f"{m}x{n}", x.nbytes
            rivals = {
                "fastpeft": lambda: layer_norm(x, weight, bias, 1e-5),  # noqa: B023
                "torch": lambda: F.layer_norm(x, [n], weight, bias, 1e-5),  # noqa: B023
            }
            rows += compare("layer_norm fwd", shape, dtype, rivals, settings, bytes_moved=2 * size)
            rivals = {
                "fastpeft": lambda: add_layer_norm(x, residual, weight, bias, 1e-5),  # noqa: B023
                "torch": lambda: F.layer_norm(x + residual, [n], weight, bias, 1e-5),  # noqa: B023
            }
            rows += compare("add_layer_norm fwd", shape, dtype, rivals, settings, bytes_moved=4 * size)
            for name, needs in GRADIENTS.items():
                inputs = [t.detach().requires_grad_(need) for t, need in zip((x, weight, bias), needs)]
                fns = {"fastpeft": lambda *a: layer_norm(*a, 1e-5), **compiled(plain, settings), "torch": plain}
                rivals = {rival: backward_of(fn, inputs, dy) for rival, fn in fns.items()}
                rows += compare(f"layer_norm bwd {name}", shape, dtype, rivals, settings, bytes_moved=(2 + needs[0]) * size)
    return rows
