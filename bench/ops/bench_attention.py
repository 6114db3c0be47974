"""Attention with a prefix, (IA)^3 or padding, against what is written around SDPA; the baseline is SDPA with nothing added.

A ratio of 0.9 means 1.11 times the time of plain attention.
"""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compare, step_of
from fastpeft.ops import attention

# B, H, M, N, d, prefix, causal: MISS's question self-attention, its cross-attention, a LLaMA layer
SHAPES = [(20, 12, 20, 20, 64, 10, False), (4, 12, 20, 901, 64, 10, False), (1, 32, 512, 512, 128, 5, True)]


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for B, H, M, N, d, n, causal in SHAPES[:1] if settings.quick else SHAPES:
            tensors = (torch.randn(B, m, H, d, device=settings.device).to(dtype).transpose(1, 2) for m in (M, N, N, M))
            q, k, v, do = (t.requires_grad_(i < 3) for i, t in enumerate(tensors))
            prefix = [torch.randn(H, n, d, device=settings.device).to(dtype).requires_grad_() for _ in range(2)]
            factors = [torch.ones(H, d, device=settings.device, dtype=dtype).requires_grad_() for _ in range(2)]
            kept = torch.ones(M, N, dtype=torch.bool, device=settings.device).tril(N - M) if causal else None

            def concatenated(q, k, v, pk, pv, kept=kept, B=B, n=n):
                k, v = (torch.cat([p.expand(B, -1, -1, -1), t], 2) for p, t in ((pk, k), (pv, v)))
                return F.scaled_dot_product_attention(q, k, v, attn_mask=None if kept is None else F.pad(kept, (n, 0), value=True))

            def scaled(q, k, v, lk, lv, causal=causal):
                return F.scaled_dot_product_attention(q, k * lk[:, None], v * lv[:, None], is_causal=causal)

            plain = step_of(lambda *t: F.scaled_dot_product_attention(*t, is_causal=causal), (q, k, v), do)  # noqa: B023

            def ours(q, k, v, *p, causal=causal):
                return attention(q, k, v, causal=causal, prefix=p)

            def rescaled(q, k, v, *p, causal=causal):
                return attention(q, k, v, causal=causal, rescale=p)

            shape = f"B{B} H{H} {M}x{N} d{d}" + (" causal" if causal else "")
            cases = {
                "prefix": {"fastpeft": (ours, prefix), "concatenated": (concatenated, prefix)},
                "ia3": {"fastpeft": (rescaled, factors), "scaled k, v": (scaled, factors)},
            }
            for name, case in cases.items():
                rivals = {rival: step_of(fn, (q, k, v, *extra), do) for rival, (fn, extra) in case.items()} | {"plain sdpa": plain}
                rows += compare(f"attention {name} fwd+bwd", shape, dtype, rivals, settings)
    return rows
