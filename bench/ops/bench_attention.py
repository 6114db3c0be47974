"""Attention with a prefix (padded or not) or (IA)^3, against what is written around SDPA, eager and through torch.compile.

The baseline is SDPA with nothing added, on the kernel that it takes by itself (cuDNN's on sm_90, in 16 bit without padding); "plain flash"
is its flash kernel. A ratio of 0.9 means 1.11 times its time.
"""

import functools

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, attention_alone, compiled, measure
from fastpeft.ops import attention

# B, H, M, N, d, prefix, causal, padded: MISS's question self-attention, also with padding, its cross-attention, a LLaMA layer
SHAPES = [
    (20, 12, 20, 20, 64, 10, False, False),
    (20, 12, 35, 35, 64, 10, False, True),
    (4, 12, 20, 901, 64, 10, False, False),
    (1, 32, 512, 512, 128, 5, True, False),
]
GPU_SHAPES = [(4, 32, 2048, 2048, 128, 10, True, False), *SHAPES]


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        shapes = GPU_SHAPES if settings.device == "cuda" else SHAPES
        for B, H, M, N, d, n, causal, padded in shapes[:2] if settings.quick else shapes:
            tensors = (torch.randn(B, m, H, d, device=settings.device).to(dtype).transpose(1, 2) for m in (M, N, N, M))
            q, k, v, do = (t.requires_grad_(i < 3) for i, t in enumerate(tensors))
            prefix = [torch.randn(H, n, d, device=settings.device).to(dtype).requires_grad_() for _ in range(2)]
            factors = [torch.ones(H, d, device=settings.device, dtype=dtype).requires_grad_() for _ in range(2)]
            padding = torch.arange(N, device=settings.device) < torch.linspace(N // 2, N, B, device=settings.device)[:, None]
            padding = padding if padded else None
            kept = torch.ones(M, N, dtype=torch.bool, device=settings.device).tril(N - M) if causal else None
            kept = padding[:, None, None] if padded else kept

            def concatenated(q, k, v, pk, pv, kept=kept, B=B, n=n):
                k, v = (torch.cat([p.expand(B, -1, -1, -1), t], 2) for p, t in ((pk, k), (pv, v)))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=None if kept is None else F.pad(kept, (n, 0), value=True))

            def plain(q, k, v, kept=kept, causal=causal, padded=padded):
                if not padded:
                    return attention_alone(q, k, v, causal)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)

            def scaled(q, k, v, lk, lv, plain=plain):
                return plain(q, k * lk[:, None], v * lv[:, None])

            def ours(q, k, v, *p, causal=causal, padding=padding):
                return attention(q, k, v, causal=causal, key_padding_mask=padding, prefix=p)

            def rescaled(q, k, v, *p, causal=causal, padding=padding):
                return attention(q, k, v, causal=causal, key_padding_mask=padding, rescale=p)

            shape = f"B{B} H{H} {M}x{N} d{d}" + " causal" * causal + " padded" * padded
            cases = {"prefix": (ours, concatenated, prefix, n), "ia3": (rescaled, scaled, factors, 0)}
            for name, (mine, naive, extra, more) in cases.items():
                fns = {"fastpeft": mine, "naive": naive, **compiled(naive, settings)}
                if dtype.itemsize == 2 and not padded:
                    fns["plain flash"] = functools.partial(attention_alone, causal=causal, flash=True), (q, k, v)
                fns["plain sdpa"] = plain, (q, k, v)
                product = 2 * B * H * M * (N + more) * d // (2 if causal else 1)
                how = {"cotangent": do, "flops": (2 * product, 5 * product)}
                rows += measure(f"attention {name}", shape, dtype, fns, (q, k, v, *extra), settings, **how)
    return rows
