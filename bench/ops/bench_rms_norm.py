"""RMSNorm against torch's F.rms_norm, transformers' LlamaRMSNorm (the naive form), torch.compile and Liger."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compiled, liger, measure
from fastpeft.ops import rms_norm

SHAPES = [(2048, 768), (2048, 2048), (1024, 4096)]
GPU_SHAPES = [(8192, 4096), (65536, 768)]  # 64 MB and more: beyond a GPU's caches


def llama(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n in GPU_SHAPES if settings.device == "cuda" else SHAPES[:1] if settings.quick else SHAPES:
            x, dy = torch.randn(2, m, n, device=settings.device).to(dtype).unbind(0)
            weight = torch.randn(n, device=settings.device).to(dtype)
            fns = {
                "fastpeft": lambda x, w: rms_norm(x, w, 1e-6),
                "transformers": llama,
                **compiled(llama, settings),
                **liger("liger_rms_norm", settings, eps=1e-6, in_place=False),  # in place, backward overwrites the cotangent
                "torch": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
            }
            for name, needs in {"all": (True, True), "dx": (True, False)}.items():
                inputs = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needs)]
                moved, phases = (2 * x.nbytes, 3 * x.nbytes), ("fwd", "bwd", "fwd+bwd") if name == "all" else ("bwd",)
                rows += measure(
                    f"rms_norm {name}", f"{m}x{n}", dtype, fns, inputs, settings, cotangent=dy, bytes_moved=moved, phases=phases
                )
    return rows
