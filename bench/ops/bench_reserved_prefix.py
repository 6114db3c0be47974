"""A prefix in rows before the keys, with one flash attention for both, against the merge with attention to the tokens alone; the baseline
is flash attention without a prefix (0.93 is 1.08 times its time). "rotary" takes queries and keys not yet turned, which the baseline turns,
too."""

import torch

from bench.timing import Row, Settings, flash_alone, measure, under
from fastpeft.ops import attention, attention_inputs

INPUTS, RESERVED = "fastpeft.ops.attention_inputs", "fastpeft.ops.reserved_prefix"
# B, H, H_kv, M, N, d, prefix, causal: LLaMA, with grouped heads, MISS's questions, its cross-attention
SHAPES = [(1, 32, 32, 256, 256, 128, 10, True)]
GPU_SHAPES = [
    (4, 32, 32, 2048, 2048, 128, 10, True),
    (4, 32, 8, 2048, 2048, 128, 10, True),
    (4, 32, 32, 512, 512, 128, 10, True),
    (20, 12, 12, 35, 35, 64, 10, False),
    (4, 12, 12, 20, 901, 64, 10, False),
]
REFUSED, TAKEN = {"QUERIES_PER_KEY": None}, {"QUERIES_PER_KEY": 0.0, "LOWER_RIGHT": True}


def run(settings: Settings) -> list[Row]:
    rows, on_cuda = [], settings.device == "cuda"
    for dtype in [torch.bfloat16] if on_cuda else settings.dtypes:  # flash attention is for 16 bit
        for B, H, G, M, N, d, n, causal in GPU_SHAPES if on_cuda else SHAPES:
            make = {"device": settings.device, "dtype": dtype}
            q, k, v, do = (torch.randn(B, m, h, d, **make) for m, h in ((M, H), (N, G), (N, G), (M, H)))
            do, prefix = do.transpose(1, 2), [torch.randn(G, n, d, **make).requires_grad_() for _ in range(2)]
            angle = torch.rand(1, M, d // 2, device=settings.device).repeat(1, 1, 2)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)

            def given(q, k, v, *p, causal=causal):
                return attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, prefix=p)

            def plain(q, k, v, causal=causal):
                return flash_alone(*(t.transpose(1, 2) for t in (q, k, v)), causal)

            def merged(q, k, v, *p, causal=causal, tables=tables):
                return attention(*attention_inputs(q, k, v, rotary=tables), causal=causal, prefix=p)

            def written(q, k, v, *p, causal=causal, tables=tables):
                return attention(*attention_inputs(q, k, v, rotary=tables, prefix=p), causal=causal)

            def turned(q, k, v, causal=causal, tables=tables):
                return flash_alone(*attention_inputs(q, k, v, rotary=tables), causal)

            inputs = tuple(t.requires_grad_() for t in (q, k, v))
            product = 2 * B * H * M * (N + n) * d // (2 if causal else 1)
            how = {"cotangent": do, "flops": (2 * product, 5 * product)}
            shape = f"B{B} H{H}/{G} {M}x{N} d{d} n{n}" + " causal" * causal
            fns = {
                "fastpeft": under(under(given, RESERVED, **TAKEN), INPUTS, ONE_PASS={settings.device}),
                "reserved by torch.cat": under(under(given, RESERVED, **TAKEN), INPUTS, ONE_PASS=set()),
                "merge": under(given, RESERVED, **REFUSED),
                "plain flash": (plain, inputs),
            }
            rows += measure("prefix", shape, dtype, fns, (*inputs, *prefix), settings, **how)
            if M != N:
                continue
            fns = {
                "fastpeft": under(under(written, RESERVED, **TAKEN), INPUTS, ONE_PASS={settings.device}),
                "parts and merge": under(under(merged, RESERVED, **REFUSED), INPUTS, ONE_PASS=set()),
                "one pass, plain flash": (under(turned, INPUTS, ONE_PASS={settings.device}), inputs),
                "plain flash": (under(turned, INPUTS, ONE_PASS=set()), inputs),
            }
            rows += measure("prefix, rotary", shape, dtype, fns, (*inputs, *prefix), settings, **how)
    return rows
