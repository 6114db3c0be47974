"""(IA)^3 around causal attention with rotary embedding, all its gradients: l_k and l_v in the pass that turns queries and keys, or l_v on
the output, against their parts; the baseline is rotary embedding and SDPA with nothing added (0.93 is 1.08 times its time)."""

import torch

from bench.timing import Row, Settings, attention_alone, measure, under
from fastpeft.ops import attention_inputs, rescale

INPUTS = "fastpeft.ops.attention_inputs"
SHAPES = [(1, 256, 32, 8, 128)]  # B, M, H, H_kv, d
GPU_SHAPES = [(4, 2048, 32, 32, 128), (4, 2048, 32, 8, 128), (20, 35, 12, 12, 64)]


def run(settings: Settings) -> list[Row]:
    rows, on_cuda = [], settings.device == "cuda"
    for dtype in [torch.bfloat16] if on_cuda else settings.dtypes:
        for B, M, H, G, d in GPU_SHAPES if on_cuda else SHAPES:
            make = {"device": settings.device, "dtype": dtype}
            q, k, v, do = (torch.randn(B, M, h, d, **make).requires_grad_(i < 3) for i, h in enumerate((H, G, G, H)))
            factors = [torch.ones(G, d, **make).requires_grad_() for _ in range(2)]
            angle = torch.rand(1, M, d // 2, device=settings.device).repeat(1, 1, 2)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)

            def by_token(o):
                return o.transpose(1, 2).flatten(2)

            def inside(q, k, v, l_k, l_v, tables=tables):
                return by_token(attention_alone(*attention_inputs(q, k, v, rotary=tables, ia3=(l_k, l_v)), True))

            def outside(q, k, v, l_k, l_v, tables=tables, groups=H // G):
                c = by_token(attention_alone(*attention_inputs(q, k, v, rotary=tables, ia3=(l_k, None)), True))
                return rescale(c, l_v[:, None].expand(-1, groups, -1).flatten())

            def plain(q, k, v, tables=tables):
                return by_token(attention_alone(*attention_inputs(q, k, v, rotary=tables), True))

            product = B * H * M * M * d
            fns = {
                "fastpeft": under(inside, INPUTS, ONE_PASS={settings.device}),
                "l_v on the output": under(outside, INPUTS, ONE_PASS={settings.device}),
                "parts": under(outside, INPUTS, ONE_PASS=set()),
                "one pass, plain sdpa": (under(plain, INPUTS, ONE_PASS={settings.device}), (q, k, v)),
                "plain sdpa": (under(plain, INPUTS, ONE_PASS=set()), (q, k, v)),
            }
            how = {"cotangent": by_token(do.transpose(1, 2)), "flops": (2 * product, 5 * product)}
            rows += measure("attention ia3, rotary", f"B{B} H{H}/{G} M{M} d{d}", dtype, fns, (q, k, v, *factors), settings, **how)
    return rows
