"""Rotary embedding against transformers' formula, eager and through torch.compile, on heads still laid out by token."""

import torch

from bench.timing import Row, Settings, compiled, measure
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
            moved = (2 * x.nbytes, 2 * x.nbytes)
            rows += measure("rotary", f"{b}x{h}x{m}x{d}", dtype, fns, inputs, settings, cotangent=dy, bytes_moved=moved)
    return rows
