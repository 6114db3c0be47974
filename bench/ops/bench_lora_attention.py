"""A causal self-attention layer with rotary embedding and LoRA on q, v and o (forward, dx and the adapters) over PyTorch's own parts."""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, measure
from fastpeft.ops import lora_attention

SHAPES = [(20, 35, 768, 12), (4, 512, 1024, 16), (1, 512, 4096, 32)]  # B, M, C, heads
R, SCALING = 8, 2.0


def adapted(x, W, A=None, B=None):
    return F.linear(x, W) if A is None else F.linear(x, W) + F.linear(F.linear(x, A), B) * SCALING


def turned(t, cos, sin):
    a, b = t.chunk(2, -1)
    return t * cos + torch.cat((-b, a), -1) * sin


def run(settings: Settings) -> list[Row]:
    rows = []
    for B, M, C, H in SHAPES[:1] if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            make = {"device": settings.device, "dtype": dtype}
            weights = [torch.randn(C, C, **make) * C**-0.5 for _ in range(4)]
            cos, sin = (torch.randn(1, M, C // H, **make) for _ in range(2))
            x = torch.randn(B, M, C, **make, requires_grad=True)
            adapters = [torch.randn(*shape, **make, requires_grad=True) for _ in range(3) for shape in ((R, C), (C, R))]

            def naive(x, *adapters, weights=weights, H=H, cos=cos, sin=sin):
                Aq, Bq, Av, Bv, Ao, Bo = adapters
                q, k, v = adapted(x, weights[0], Aq, Bq), adapted(x, weights[1]), adapted(x, weights[2], Av, Bv)
                q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
                c = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True)
                return adapted(c.transpose(1, 2).flatten(2), weights[3], Ao, Bo)

            def ours(x, *adapters, weights=weights, H=H, cos=cos, sin=sin, recompute=False):
                Aq, Bq, Av, Bv, Ao, Bo = adapters
                q, k, v, o = weights
                branches = (q, None, Aq, Bq, SCALING), (k,), (v, None, Av, Bv, SCALING), (o, None, Ao, Bo, SCALING)
                return lora_attention(x, *branches, H, rotary=(cos, sin), causal=True, recompute=recompute)

            def recomputed(*args, ours=ours):
                return ours(*args, recompute=True)

            fns = {"fastpeft": ours, "fastpeft, q, k, v formed again": recomputed, "naive": naive}
            dy = torch.randn(B, M, C, **make)
            rows += measure("lora_attention", f"{B}x{M}x{C} H{H} r{R}", dtype, fns, (x, *adapters), settings, cotangent=dy)
    return rows
