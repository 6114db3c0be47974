"""Rotary embedding against transformers' formula, on heads still laid out by token: forward and backward."""

import torch

from bench.timing import Row, Settings, compare, compiled, step_of
from fastpeft.ops import rotary

SHAPES = [(1, 32, 512, 128), (4, 12, 512, 64)]


def transformers(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for b, h, m, d in SHAPES[:1] if settings.quick else SHAPES:
            x, dy = (t.transpose(1, 2) for t in torch.randn(2, b, m, h, d, device=settings.device).to(dtype).unbind(0))
            angle = torch.rand(m, d // 2, device=settings.device).repeat(1, 2)
            inputs = (x.detach().requires_grad_(), angle.cos().to(dtype), angle.sin().to(dtype))
            fns = {"fastpeft": rotary, **compiled(transformers, settings), "transformers": transformers}
            rivals = {name: step_of(fn, inputs, dy) for name, fn in fns.items()}
            rows += compare("rotary fwd+bwd", f"{b}x{h}x{m}x{d}", dtype, rivals, settings, bytes_moved=4 * x.nbytes)
    return rows
