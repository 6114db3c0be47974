"""16-bit linear layers, losses and attention on a CPU that lacks the arithmetic (fastpeft/ops/_gemm.py), against PyTorch's own calls.

``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`` makes any x86 CPU such a one, for PyTorch and for us; the environment's ``lacks`` says
what this process computes in float32. Where nothing is lacking, both sides multiply as the CPU does. Sizes that a naive product bears.
"""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, measure
from fastpeft import ops
from fastpeft.ops.lora_linear import linear

R, SCALING = 8, 2.0


def naive(x, W, b, A, B):
    return F.linear(x, W, b) + F.linear(F.linear(x, A), B) * SCALING


def loss(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def run(settings: Settings) -> list[Row]:
    if settings.device != "cpu":
        return []
    rows, phases = [], ("fwd", "fwd+bwd")
    for dtype in (torch.bfloat16, torch.float16):
        m, k, n = (64, 512, 512) if settings.quick else (256, 1024, 1024)
        sizes = ((m, k), (n, k), (n,), (R, k), (n, R))
        x, W, b, A, B = ((torch.randn(s) * s[-1] ** -0.5).to(dtype) for s in sizes)
        inputs = x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_()
        fns = {"fastpeft": lambda *args: ops.lora_linear(*args, SCALING), "torch": naive}
        base, branch = 2 * m * n * k, 2 * m * R * (n + k)
        how = {"cotangent": torch.randn(m, n).to(dtype), "flops": (base + branch, base + 2 * branch)}
        rows += measure("lora_linear", f"{m}x{k}x{n} r{R}", dtype, fns, inputs, settings, phases=phases, **how)

        layer = (x.detach().requires_grad_(), W, b)
        how = {"cotangent": torch.randn(m, n).to(dtype), "flops": (base, base)}
        fns = {"fastpeft": linear, "torch": F.linear}
        rows += measure("frozen linear", f"{m}x{k}x{n}", dtype, fns, layer, settings, phases=phases, **how)

        m, c, v = (16, 512, 4096) if settings.quick else (32, 768, 8192)
        inputs = torch.randn(m, c).to(dtype).requires_grad_(), (torch.randn(v, c) * c**-0.5).to(dtype)
        labels = torch.randint(0, v, (m,))
        fns = {"fastpeft": lambda h, w, y: ops.linear_cross_entropy(h, w, None, y), "torch": loss}
        how = {"flops": (2 * m * c * v, 2 * m * c * v), "phases": phases[1:]}  # ours forms gradients in forward
        rows += measure("linear_cross_entropy, frozen head", f"{m}x{c}x{v}", dtype, fns, (*inputs, labels), settings, **how)

        heads = [torch.randn(2, 12, 128, 64).to(dtype).requires_grad_() for _ in range(3)]
        fns = {"fastpeft": ops.attention, "torch": F.scaled_dot_product_attention}
        product = 2 * 2 * 12 * 128 * 128 * 64
        how = {"cotangent": torch.randn(2, 12, 128, 64).to(dtype), "flops": (2 * product, 5 * product)}
        rows += measure("attention", "2x12x128x64", dtype, fns, heads, settings, phases=phases, **how)
    return rows
