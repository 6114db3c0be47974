"""A LoRA'd linear layer, forward and backward (dx, dA, dB), over the frozen layer it adapts and PEFT's form of it.

The baseline is the frozen linear, dx included: a ratio of 0.91 means 1.10 times its time. Targets on CPU: 0.91 at 2048 x 2048, 0.87 at
768 x 768.
"""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compare, compiled, step_of
from fastpeft.ops.lora_linear import Projection, lora_linear, lora_linears

SHAPES = [(2048, 2048, 2048), (2048, 768, 768), (2048, 768, 2304), (4096, 4096, 4096)]
R, SCALING = 8, 2.0


def peft(x, W, b, A, B):
    return F.linear(x, W, b) + F.linear(F.linear(x, A), B) * SCALING


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for m, k, n in SHAPES[:2] if settings.quick else SHAPES[: 4 if settings.device == "cuda" else 3]:
            shapes = ((m, k), (n, k), (n,), (R, k), (n, R))
            x, W, b, A, B = (torch.randn(s, device=settings.device).to(dtype) * s[-1] ** -0.5 for s in shapes)
            dy = torch.randn(m, n, device=settings.device).to(dtype)
            x, A, B = (t.requires_grad_() for t in (x, A, B))
            rivals = {
                "fastpeft": step_of(lambda *t: lora_linear(*t, SCALING), (x, W, b, A, B), dy),
                "peft": step_of(peft, (x, W, b, A, B), dy),
                **{name: step_of(fn, (x, W, b, A, B), dy) for name, fn in compiled(peft, settings).items()},
                "frozen linear": step_of(F.linear, (x, W, b), dy),
            }
            flops = 4 * m * n * k + 6 * m * R * (n + k)
            rows += compare("lora_linear fwd+bwd", f"{m}x{k}x{n} r{R}", dtype, rivals, settings, flops=flops)
        m, c = 2048, 768  # q and v adapted, k not: BERT's self-attention
        x = torch.randn(m, c, device=settings.device).to(dtype).requires_grad_()
        W, b = torch.randn(3, c, c, device=settings.device).to(dtype) * c**-0.5, torch.randn(3, c, device=settings.device).to(dtype)
        A, B = (torch.randn(2, *s, device=settings.device).to(dtype).requires_grad_() for s in ((R, c), (c, R)))
        dys = list(torch.randn(3, m, c, device=settings.device).to(dtype))

        def grouped(x, A, B, W=W, b=b):
            q, v = (Projection(W[i], b[i], A[j], B[j], SCALING) for i, j in ((0, 0), (2, 1)))
            return lora_linears(x, [q, (W[1], b[1]), v])

        def apart(x, A, B, W=W, b=b):
            return peft(x, W[0], b[0], A[0], B[0]), F.linear(x, W[1], b[1]), peft(x, W[2], b[2], A[1], B[1])

        def frozen(x, W=W, b=b):
            return tuple(F.linear(x, w, c) for w, c in zip(W, b))

        def step(fn, *inputs, dys=dys):
            return lambda: torch.autograd.grad(fn(*inputs), inputs, dys)

        rivals = {"fastpeft": step(grouped, x, A, B), "peft": step(apart, x, A, B), "frozen linear": step(frozen, x)}
        rows += compare("lora_linears q,k,v fwd+bwd", f"{m}x{c} r{R}", dtype, rivals, settings)
    return rows
