"""SwiGLU, and GELU with an (IA)^3 scale, against the same in plain PyTorch: forward and backward."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compare, compiled, step_of
from fastpeft.ops import gelu, swiglu

SHAPES = [(1024, 3072), (512, 11008)]


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in SHAPES[:1] if settings.quick else SHAPES:
            gate, up, dy = torch.randn(3, m, n, device=settings.device).to(dtype).unbind(0)
            scale = torch.randn(n, device=settings.device).to(dtype)
            gate, up, scale = (t.detach().requires_grad_() for t in (gate, up, scale))
            rivals = {
                "fastpeft": step_of(swiglu, (gate, up), dy),
                **{name: step_of(fn, (gate, up), dy) for name, fn in compiled(lambda g, u: F.silu(g) * u, settings).items()},
                "torch": step_of(lambda g, u: F.silu(g) * u, (gate, up), dy),
            }
            rows += compare("swiglu fwd+bwd", f"{m}x{n}", dtype, rivals, settings, bytes_moved=8 * gate.nbytes)
            rivals = {
                "fastpeft": step_of(gelu, (gate, scale), dy),
                "torch": step_of(lambda g, s: F.gelu(g) * s, (gate, scale), dy),
            }
            rows += compare("gelu with scale fwd+bwd", f"{m}x{n}", dtype, rivals, settings, bytes_moved=5 * gate.nbytes)
    return rows
