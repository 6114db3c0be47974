"""A LoRA'd linear layer (dx, dA, dB) over the frozen layer it adapts: PEFT's own module where installed, its form by hand, torch.compile.

The baseline is the frozen linear, dx included: a ratio of 0.91 means 1.10 times its time. Targets on CPU, both together: 0.91 at
2048 x 2048, 0.87 at 768 x 768. On CUDA the same step again by the passes of kernels/lora_linear.py and by ATen's products alone, in C++
where csrc/autograd is built: up to which size the latter should serve.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bench.timing import Row, Settings, compare, compiled, measure
from fastpeft import _library
from fastpeft._library import has_triton
from fastpeft.ops.lora_linear import DLA, DLB, Projection, _bwd, _fwd, lora_linear, lora_linears

SHAPES = [(2048, 2048, 2048), (2048, 768, 768), (2048, 768, 2304), (4096, 4096, 4096)]
GPU_SHAPES = [(8192, 768, 768), (8192, 2048, 2048), (8192, 4096, 4096), (8192, 4096, 11008)]
# about the places where the rule changes its answer
FORM_SHAPES = [(m, *kn) for m in (512, 8192) for kn in ((768, 768), (768, 3072), (2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096))]
R, SCALING, DROPOUT = 8, 2.0, 0.1


def naive(x, W, b, A, B, p=0.0):
    return F.linear(x, W, b) + F.linear(F.linear(F.dropout(x, p) if p else x, A), B) * SCALING


def ours(x, W, b, A, B, p=0.0):
    return lora_linear(x, W, b, A, B, SCALING, p)


def frozen(x, W, b, A, B):
    return F.linear(x, W, b)


def peft(x, W, b, A, B) -> dict:
    """PEFT's module around the same weights, where it is installed."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(*W.shape[::-1], device="meta")
    base.weight, base.bias = nn.Parameter(W, requires_grad=False), nn.Parameter(b, requires_grad=False)
    config = LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=["0"], lora_dropout=0.0)
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(A.detach()), nn.Parameter(B.detach())
    return {"peft": (lambda x, *_: layer(x), (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight))}


def grouped(x, W, b, A, B):
    q, v = (Projection(W[i], b[i], A[j], B[j], SCALING) for i, j in ((0, 0), (2, 1)))
    return lora_linears(x, [q, (W[1], b[1]), v])


def apart(x, W, b, A, B):
    return naive(x, W[0], b[0], A[0], B[0]), F.linear(x, W[1], b[1]), naive(x, W[2], b[2], A[1], B[1])


def frozen_three(x, W, b):
    return tuple(F.linear(x, w, c) for w, c in zip(W, b))


def forms(settings: Settings, dtype: torch.dtype) -> list[Row]:
    """dx, dA and dB behind y, straight from the backends."""
    from fastpeft.kernels import lora_linear as kernels

    def step(fwd, bwd, x, W, b, A, B, dy):
        y, s = fwd(x, [W], [b], [A], [B], [SCALING], 0.0, None)
        return y, *bwd([dy], x, [W], [A], [B], s, [SCALING], 0.0, None, True, [DLA | DLB])

    def products(x, W, b, A, B, dy):
        return F.linear(x, W, b), dy @ W

    rows = []
    for m, k, n in (GPU_SHAPES[0], GPU_SHAPES[2]) if settings.quick else FORM_SHAPES:
        sizes = ((m, k), (n, k), (n,), (16, k), (n, 16), (m, n))
        tensors = [torch.randn(s, device=settings.device).to(dtype) * s[-1] ** -0.5 for s in sizes]
        rivals = {"passes": partial(step, kernels.lora_linears_fwd, kernels.lora_linears_bwd, *tensors)}
        if (ext := _library.autograd) is not None:
            rivals["products in C++"] = partial(step, ext.lora_linears_fwd_on_gpu, ext.lora_linears_bwd_on_gpu, *tensors)
        rivals |= {"composite": partial(step, _fwd, _bwd, *tensors), "frozen linear": partial(products, *tensors)}
        flops = 4 * m * n * k + 6 * m * 16 * (n + k)
        rows += compare("lora_linear forms", f"{m}x{k}x{n} r16", dtype, rivals, settings, flops=flops)
    return rows


def extended(settings: Settings, dtype: torch.dtype) -> list[Row]:
    """[x | x A^T] [W | s B]^T as one product, and dx likewise, where x and dy already lie in wider buffers, as their producers might leave
    them: the best that form can give. The same work as ``forms``."""
    rows = []
    for m, k, n in GPU_SHAPES if settings.device == "cuda" else SHAPES[1:2] if settings.quick else SHAPES:
        x, W, b, A, B, dy = (
            torch.randn(s, device=settings.device).to(dtype) * s[-1] ** -0.5 for s in ((m, k), (n, k), (n,), (R, k), (n, R), (m, n))
        )
        xs, Ws, dys, Wt = (x.new_empty(s) for s in ((m, k + R), (n, k + R), (m, n + R), (n + R, k)))
        xs[:, :k], Ws[:, :k], dys[:, :n], Wt[:n] = x, W, dy, W

        def one(xs=xs, Ws=Ws, dys=dys, Wt=Wt, A=A, B=B, b=b, k=k, n=n):
            x, dy = xs[:, :k], dys[:, :n]
            Ws[:, k:], Wt[n:] = B * SCALING, A
            torch.mm(x, A.t(), out=xs[:, k:])
            torch.mm(dy, Ws[:, k:], out=dys[:, n:])
            return F.linear(xs, Ws, b), dys @ Wt, dys[:, n:].t() @ x, dy.t() @ xs[:, k:]

        def today(x=x, W=W, b=b, A=A, B=B, dy=dy):
            y, s = torch.ops.fastpeft.lora_linears_fwd(x, [W], [b], [A], [B], [SCALING], 0.0, None)
            return y, *torch.ops.fastpeft.lora_linears_bwd([dy], x, [W], [A], [B], s, [SCALING], 0.0, None, True, [DLA | DLB])

        def frozen(x=x, W=W, b=b, dy=dy):
            return F.linear(x, W, b), dy @ W

        rivals = {"fastpeft": today, "extended K": one, "frozen linear": frozen}
        rows += compare("lora_linear extended K", f"{m}x{k}x{n} r{R}", dtype, rivals, settings, flops=4 * m * n * k + 6 * m * R * (n + k))
    return rows


def run(settings: Settings) -> list[Row]:
    rows = []
    shapes = GPU_SHAPES if settings.device == "cuda" else SHAPES[1:2] if settings.quick else SHAPES[:3]
    for dtype in settings.dtypes:
        for m, k, n in shapes:
            sizes = ((m, k), (n, k), (n,), (R, k), (n, R))
            x, W, b, A, B = (torch.randn(s, device=settings.device).to(dtype) * s[-1] ** -0.5 for s in sizes)
            dy = torch.randn(m, n, device=settings.device).to(dtype)
            inputs = x, W, b, A, B = (x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_())
            fns = {
                "fastpeft": ours,
                **peft(*inputs),
                "naive": naive,
                **compiled(naive, settings),
                "frozen linear": (frozen, (x, W, b, None, None)),
            }
            base, branch = 2 * m * n * k, 2 * m * R * (n + k)
            how = {"cotangent": dy, "flops": (base + branch, base + 2 * branch)}
            rows += measure("lora_linear", f"{m}x{k}x{n} r{R}", dtype, fns, inputs, settings, **how)
            if settings.device == "cuda":  # a mask is drawn in the branch's own passes, or is one more tensor
                fns = {"fastpeft": partial(ours, p=DROPOUT), "naive": partial(naive, p=DROPOUT), "frozen linear": fns["frozen linear"]}
                rows += measure("lora_linear dropout", f"{m}x{k}x{n} r{R}", dtype, fns, inputs, settings, **how)
        rows += extended(settings, dtype)
        rows += forms(settings, dtype) if settings.device == "cuda" and has_triton() else []
        m, c = 2048, 768  # q and v adapted, k not: BERT's self-attention
        x = torch.randn(m, c, device=settings.device).to(dtype).requires_grad_()
        W, b = torch.randn(3, c, c, device=settings.device).to(dtype) * c**-0.5, torch.randn(3, c, device=settings.device).to(dtype)
        A, B = (torch.randn(2, *s, device=settings.device).to(dtype).requires_grad_() for s in ((R, c), (c, R)))
        dys = list(torch.randn(3, m, c, device=settings.device).to(dtype))
        fns = {"fastpeft": grouped, "naive": apart, **compiled(apart, settings), "frozen linear": (frozen_three, (x, W, b))}
        how = {"cotangent": dys, "flops": (6 * m * c * c + 8 * m * R * c, 6 * m * c * c + 16 * m * R * c)}
        rows += measure("lora_linears q,k,v", f"{m}x{c} r{R}", dtype, fns, (x, W, b, A, B), settings, **how)
    return rows
