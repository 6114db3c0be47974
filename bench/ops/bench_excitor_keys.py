"""LLaMA-Excitor's layer: merged keys and flash attention, the paper's two score matrices (also compiled), and plain attention.

The baseline is plain causal SDPA. Targets on CPU, both together: 0.91 of it (1.10 times its time), and 3.7 times faster than two score
matrices.
"""

from functools import partial

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, attention_alone, compiled, measure, under
from fastpeft.ops.attention import attention
from fastpeft.ops.excitor_keys import excitor_keys, excitor_keys_reference
from fastpeft.ops.excitor_turn import excitor_turn

SHAPES = [(1, 32, 512, 128), (1, 32, 1024, 128)]  # B, H, M, d: LLaMA-7B
GPU_SHAPES = [(4, 32, 2048, 128), (4, 32, 512, 128)]  # what the merge moves grows with the tokens, attention with their square
R, K, V, D = 16, 30, 257, 768


def ours(q, k, v, hidden, w_down, w_up, prompt, gate, *visual):
    return attention(q, excitor_keys(k, hidden, w_down, w_up, prompt, gate, visual or None), v, causal=True)


def two_score_matrices(q, k, v, hidden, w_down, w_up, prompt, gate, *visual):
    extra = excitor_keys_reference(torch.zeros_like(k), hidden, w_down, w_up, prompt, torch.ones_like(gate), visual or None)
    scores = (q @ k.mT + gate[:, None, None] * (q @ extra.mT)) * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def turning(name, shape, dtype, qk, rest, settings: Settings) -> list[Row]:
    """Rotary embedding and merged keys, in one pass where there is one, against the one after the other."""
    B, H, M, d = shape
    angle = torch.rand(1, M, d // 2, device=settings.device).repeat(1, 1, 2)
    tables, cotangents = (angle.cos(), angle.sin()), [torch.randn_like(t) for t in qk]

    def turned(q, k, hidden, *params):
        return excitor_turn(q, k, tables, hidden, *params[:4], params[4:] or None)

    fns = {"fastpeft": turned, "parts": under(turned, "fastpeft.ops.excitor_turn", TURNS=set())}
    moved = (5 * qk[0].nbytes, 6 * qk[0].nbytes)
    return measure(name, f"B{B} H{H} {M} d{d}", dtype, fns, (*qk, *rest), settings, cotangent=cotangents, bytes_moved=moved)


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for name in ("text",) if settings.quick else ("text", "image"):
            shapes = GPU_SHAPES if settings.device == "cuda" else [(1, 32, 256, 128)] if settings.quick else SHAPES
            for B, H, M, d in shapes:
                C = H * d
                sizes = [(B, M, C), (R, C), (C, R), (K, C), (H,)]
                sizes += [(B, V, D), (R, D), (C, R), (R, D), (C, R)] if name == "image" else []
                qkv = [torch.randn(B, M, H, d, device=settings.device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
                rest = [(torch.randn(s, device=settings.device) * 0.05).to(dtype) for s in sizes]
                rest = [t.requires_grad_(i != 5) for i, t in enumerate(rest)]  # the image's features are frozen
                do = torch.randn(B, M, H, d, device=settings.device).to(dtype).transpose(1, 2)
                naive = {"two score matrices": two_score_matrices, **compiled(two_score_matrices, settings)}
                product, branch = B * H * M * M * d, 2 * B * M * (R * (C + K) + K * C)  # causal: half of each product
                how = {"cotangent": do, "flops": (2 * product + branch, 5 * product + 2 * branch)}
                fns = {"fastpeft": ours, **naive}
                if dtype.itemsize == 2 and settings.device == "cuda":
                    fns["plain flash"] = partial(attention_alone, causal=True, flash=True), qkv
                fns["plain sdpa"] = plain, qkv
                rows += measure(f"excitor {name}", f"B{B} H{H} {M} d{d} r{R} K{K}", dtype, fns, (*qkv, *rest), settings, **how)
                rows += turning(f"excitor {name}, turned", (B, H, M, d), dtype, qkv[:2], rest, settings)
    return rows
