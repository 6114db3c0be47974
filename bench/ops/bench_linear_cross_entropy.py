"""The answer-only loss against F.cross_entropy(F.linear(...)) on all rows, eager, compiled and Liger's; the head frozen and trained."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compiled, liger, measure
from fastpeft.ops import linear_cross_entropy

# tokens, width, vocabulary, share labelled: BERT decoder of a VQA batch, and a LLaMA-like head (narrower where it is a CPU)
SHAPES = [(120, 768, 30524, 0.8), (512, 1024, 32000, 0.25)]
GPU_SHAPES = [*SHAPES, (2048, 4096, 32000, 0.25)]


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def ours(hidden, weight, labels):
    return linear_cross_entropy(hidden, weight, None, labels)


def run(settings: Settings) -> list[Row]:
    rows = []
    shapes = GPU_SHAPES if settings.device == "cuda" else SHAPES
    for dtype in settings.dtypes:
        for m, c, v, share in shapes[:1] if settings.quick else shapes:
            hidden, weight = torch.randn(m, c, device=settings.device).to(dtype), torch.randn(v, c, device=settings.device).to(dtype)
            labels = torch.randint(0, v, (m,))
            labels[int(m * share) :] = -100
            there = labels.to(settings.device)
            for name, trained in {"frozen head": False, "trained head": True}.items():
                inputs = (hidden.detach().requires_grad_(), (weight * c**-0.5).detach().requires_grad_(trained))
                fns = {"fastpeft": (ours, (*inputs, labels)), **compiled(plain, settings)}  # ours with labels on the host: nothing waits
                fns |= liger("liger_fused_linear_cross_entropy", settings) | {"torch": plain}
                once = 2 * int(m * share) * c * v
                shape, how = (
                    f"{m}x{c}x{v}, {share:.0%} labelled",
                    {"flops": once * (3 if trained else 2)},
                )  # ours forms gradients in forward
                rows += measure(f"linear_cross_entropy, {name}", shape, dtype, fns, (*inputs, there), settings, **how)
    return rows
