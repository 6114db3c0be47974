"""RMSNorm against torch's F.rms_norm and transformers' LlamaRMSNorm."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, backward_of, compare, compiled
from fastpeft.ops import rms_norm

SHAPES = [(2048, 768), (2048, 2048), (1024, 4096)]


def llama(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in SHAPES[:1] if settings.quick else SHAPES:
            x, dy = torch.randn(2, m, n, device=settings.device).to(dtype).unbind(0)
            weight = torch.randn(n, device=settings.device).to(dtype)
            rivals = {
                "fastpeft": lambda x, w: rms_norm(x, w, 1e-6),
                "transformers": llama,
                **compiled(llama, settings),
                "torch": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
            }
            forward = {name: lambda fn=fn: fn(x, weight) for name, fn in rivals.items()}  # noqa: B023
            rows += compare("rms_norm fwd", f"{m}x{n}", dtype, forward, settings, bytes_moved=2 * x.nbytes)
            for name, needs in {"all": (True, True), "dx": (True, False)}.items():
                inputs = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needs)]
                backward = {rival: backward_of(fn, inputs, dy) for rival, fn in rivals.items()}
                rows += compare(f"rms_norm bwd {name}", f"{m}x{n}", dtype, backward, settings, bytes_moved=3 * x.nbytes)
    return rows
