"""What lies between projections and scores in one pass, against its parts one after another (the baseline): norms of queries and keys with
rotary embedding (Qwen3, Gemma 3), rotary embedding alone (LLaMA), and with (IA)^3's factors. Queries and keys are parts of one projection's
output. GB/s are of what one pass moves."""

import torch

from bench.timing import Row, Settings, measure, under
from fastpeft.ops import attention_inputs

MODULE = "fastpeft.ops.attention_inputs"
SHAPES = [(1, 512, 32, 8, 128)]  # B, M, H, H_kv, d
GPU_SHAPES = [(4, 2048, 32, 32, 128), (4, 2048, 32, 8, 128), (20, 35, 12, 12, 64)]


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for B, M, H, G, d in GPU_SHAPES if settings.device == "cuda" else SHAPES:
            make = {"device": settings.device, "dtype": dtype}
            joint, cotangents = torch.randn(B, M, (H + 2 * G) * d, **make), [torch.randn(B, h, M, d, **make) for h in (H, G)]
            # laid out by token, as attention's gradients are
            cotangents = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in cotangents]
            q, k, v = (
                t.unflatten(-1, (-1, d)).detach().requires_grad_(i < 2) for i, t in enumerate(joint.split([H * d, G * d, G * d], -1))
            )
            angle = torch.rand(1, M, d // 2, device=settings.device).repeat(1, 1, 2)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)
            weights, factor = torch.ones(2, d, **make), torch.ones(G, d, **make)
            size, shape = q.nbytes + k.nbytes, f"{B}x{M} H{H}/{G} d{d}"

            def rotary(q, k, v=v, tables=tables):
                return attention_inputs(q, k, v, rotary=tables)[:2]

            def norms(q, k, *weights, v=v, tables=tables):
                return attention_inputs(q, k, v, rotary=tables, q_norm=weights[0], k_norm=weights[1])[:2]

            def factors(q, k, l, v=v, tables=tables):
                return attention_inputs(q, k, v, rotary=tables, ia3=(l, None))[:2]

            cases = {
                "norms, frozen": (norms, [w.detach() for w in weights], (2 * size, 3 * size)),
                "norms": (norms, [w.detach().requires_grad_() for w in weights], (2 * size, 3 * size)),
                "rotary": (rotary, [], (2 * size, 2 * size)),
                "ia3": (factors, [factor.requires_grad_()], (2 * size, 2 * size + k.nbytes)),
            }
            for name, (function, extra, moved) in cases.items():
                fns = {"fastpeft": under(function, MODULE, ONE_PASS={settings.device}), "parts": under(function, MODULE, ONE_PASS=set())}
                inputs = (q, k, *extra)
                rows += measure(f"attention_inputs {name}", shape, dtype, fns, inputs, settings, cotangent=cotangents, bytes_moved=moved)
    return rows
