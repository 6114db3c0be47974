"""Cross-attention that never forms the image's keys and values, against the ordinary form (the naive one, also compiled) and SDPA.

Few questions about many image tokens, as in MISS: LoRA on key and value, states frozen or trained. Shapes by MISS: 901 tokens of 768.
"""

import torch
import torch.nn.functional as F

from bench.timing import Row, Settings, compiled, measure
from fastpeft.ops.absorbed_attention import absorbed_attention, absorbed_attention_reference
from fastpeft.ops.lora_linear import Projection

SHAPES = [(4, 12, 20, 901, 64)]  # U, H, M, N, d
R = 4


def _projections(wk, bk, ak, lk, wv, bv, av, lv):
    return Projection(wk, bk, ak, lk, 2.0), Projection(wv, bv, av, lv, 2.0)


def ours(q, states, *params):
    return absorbed_attention(q, states, *_projections(*params), q.shape[-1] ** -0.5)


def naive(q, states, *params):
    return absorbed_attention_reference(q, states, *_projections(*params), q.shape[-1] ** -0.5)


def sdpa(q, states, *params):
    (_, H, d), U, out = q.shape, states.shape[0], []
    for p in _projections(*params):
        y = F.linear(states, p.weight, p.bias) + F.linear(F.linear(states, p.lora_A), p.lora_B) * p.scaling
        out.append(y.view(U, -1, H, d).transpose(1, 2))
    return F.scaled_dot_product_attention(q.view(U, -1, H, d).transpose(1, 2), *out).transpose(1, 2).flatten(0, 1)


def run(settings: Settings) -> list[Row]:
    rows = []
    for dtype in settings.dtypes:
        for U, H, M, N, d in [(1, *SHAPES[0][1:])] if settings.quick else SHAPES:
            C = H * d
            sizes = [(U * M, H, d), (U, N, C), *[(C, C), (C,), (R, C), (C, R)] * 2]
            tensors = [(torch.randn(s, device=settings.device) * (s[-1] ** -0.5 if i > 1 else 1)).to(dtype) for i, s in enumerate(sizes)]
            do = torch.randn(U * M, H, d, device=settings.device).to(dtype)
            for name, trained in {"frozen states": (0, 4, 5, 8, 9), "trained states": (0, 1, 4, 5, 8, 9)}.items():
                inputs = [t.detach().requires_grad_(i in trained) for i, t in enumerate(tensors)]
                fns = {"fastpeft": ours, "naive": naive, **compiled(naive, settings), "sdpa": sdpa}
                lift, mix = 4 * U * M * C * C, 2 * U * M * H * N * C  # q through the key, out of the value; one product with the states
                how = {"cotangent": do, "flops": (lift + 2 * mix, lift + (5 if 1 in trained else 3) * mix)}
                rows += measure(f"absorbed_attention, {name}", f"{U}x{H}x{M}x{N}x{d} r{R}", dtype, fns, inputs, settings, **how)
    return rows
