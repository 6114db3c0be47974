"""A prefix in rows before the keys, with one attention of PyTorch's for both, against the merge with attention to the tokens alone. The
baseline is SDPA without a prefix (0.93 is 1.08 times its time), on the kernel that it takes by itself; "plain flash" is its flash kernel.
"rotary" takes queries and keys not yet turned, which the baseline turns, too, one after the other."""

import functools

import torch

from bench.timing import Row, Settings, attention_alone, measure, under
from fastpeft.ops import attention, attention_inputs
from fastpeft.ops.attention_inputs import without_rows

INPUTS, WHOLE = "fastpeft.ops.attention_inputs", "fastpeft.ops.attention"
# B, H, H_kv, M, N, d, prefix, causal, padded: LLaMA, also where a prefix needs no tile more, with grouped heads; MISS's questions, its
# cross-attention
SHAPES = [(1, 32, 32, 256, 256, 128, 10, True, False)]
GPU_SHAPES = [
    (4, 32, 32, 2048, 2048, 128, 10, True, False),
    (4, 32, 32, 2000, 2000, 128, 10, True, False),
    (4, 32, 8, 2048, 2048, 128, 10, True, False),
    (4, 32, 32, 512, 512, 128, 10, True, False),
    (20, 12, 12, 35, 35, 64, 10, False, False),
    (20, 12, 12, 35, 35, 64, 10, False, True),
    (4, 12, 12, 20, 901, 64, 10, False, False),
]
REFUSED = {"reserved_pays": lambda *a: False}


def run(settings: Settings) -> list[Row]:
    rows, on_cuda = [], settings.device == "cuda"
    device, parts = {"ONE_PASS": {settings.device}}, {"ONE_PASS": set()}
    for dtype in [torch.bfloat16] if on_cuda else settings.dtypes:
        for B, H, G, M, N, d, n, causal, padded in GPU_SHAPES if on_cuda else SHAPES:
            make = {"device": settings.device, "dtype": dtype}
            q, k, v, do = (torch.randn(B, m, h, d, **make) for m, h in ((M, H), (N, G), (N, G), (M, H)))
            do, prefix = do.transpose(1, 2), [torch.randn(G, n, d, **make).requires_grad_() for _ in range(2)]
            angle = torch.rand(1, M, d // 2, device=settings.device).repeat(1, 1, 2)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)
            padding = torch.arange(N, device=settings.device) < torch.linspace(N // 2, N, B, device=settings.device)[:, None]
            padding = padding if padded else None

            def given(q, k, v, *p, causal=causal, padding=padding):
                return attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, key_padding_mask=padding, prefix=p)

            def plain(q, k, v, causal=causal, padding=padding, flash=False):
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                if padding is not None:
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, padding[:, None, None])
                return attention_alone(q, k, v, causal, flash)

            def merged(q, k, v, *p, tables=tables):
                return attention(*attention_inputs(q, k, v, rotary=tables), causal=True, prefix=p)

            def square(q, k, v, *p, tables=tables, n=n):
                return without_rows(attention_alone(*attention_inputs(q, k, v, rotary=tables, prefix=p, rows_for_queries=True), True), n)

            def turned(q, k, v, tables=tables):
                return attention_alone(*attention_inputs(q, k, v, rotary=tables), True)

            inputs = tuple(t.requires_grad_() for t in (q, k, v))
            product = 2 * B * H * M * (N + n) * d // (2 if causal else 1)
            how = {"cotangent": do, "flops": (2 * product, 5 * product)}
            shape = f"B{B} H{H}/{G} {M}x{N} d{d} n{n}" + " causal" * causal + " padded" * padded
            fns = {
                "fastpeft": given,
                "merge": under(given, WHOLE, **REFUSED),
                **({} if padded else {"plain flash": (functools.partial(plain, flash=True), inputs)}),
                "plain sdpa": (plain, inputs),
            }
            rows += measure("prefix", shape, dtype, fns, (*inputs, *prefix), settings, **how)
            if not causal:
                continue
            fns = {
                "fastpeft": under(square, INPUTS, **device),
                "one pass and merge": under(under(merged, WHOLE, **REFUSED), INPUTS, **device),
                "one pass, plain sdpa": (under(turned, INPUTS, **device), inputs),
                "plain sdpa": (under(turned, INPUTS, **parts), inputs),
            }
            rows += measure("prefix, rotary", shape, dtype, fns, (*inputs, *prefix), settings, **how)
    return rows
