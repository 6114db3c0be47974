"""dS and dB of a LoRA branch from one reading of dy, against two products."""

import torch

from bench.timing import Row, Settings, compiled, measure
from fastpeft.ops.low_rank_grads import low_rank_grads

SHAPES = [(1024, 1024, 8), (788, 3072, 8), (1024, 2752, 16)]


def products(dy, B, S):
    return B.t() @ dy.t(), dy.t() @ S.t()


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, n, r in SHAPES[:1] if settings.quick else SHAPES:
            inputs = [torch.randn(*shape, device=settings.device).to(dtype) for shape in ((m, n), (n, r), (r, m))]
            fns = {"fastpeft": lambda dy, B, S: low_rank_grads(dy, B, S, 1.0), **compiled(products, settings), "torch": products}
            rows += measure(
                "low_rank_grads", f"{m}x{n} r{r}", dtype, fns, inputs, settings, phases=("fwd",), bytes_moved=(inputs[0].nbytes, 0)
            )
    return rows
