"""LLaMA-Excitor's extra keys, merged into the layer's own: K' = K + g K_x, after which any ordinary attention serves.

    S_extra g + S = Q (K + g K_x)^T / sqrt(d)                   the second score matrix never exists

    U = T W_down^T            N = W_up^T P^T / sqrt(C)          W_up(U) never exists: (U W_up^T) P^T = U (W_up^T P^T)
    A = softmax(U N)          K_x = A P                         K' = K + g K_x, added in the accumulator before the one rounding
    image I:  N = [W_up^T P^T, (W_up^T W_ku) (I W_kd^T)^T] / sqrt(C)      A = [A_P, A_I]      L = [A_P, A_I Z]      Z = I W_vd^T
              K_x = L R,  R = [P; W_vu^T]                                 (text: L = A, R = P)

    dK = dK'      dL = dK' (g R)^T      Y = L^T dK'      dR = g Y      dg_h = <Y_h, R_h>             one pass over dK'
    dA_I = dL_I Z^T      dZ = A_I^T dL_I      dS = A (dA - rowsum(A dA))      dU = dS N^T      dN = U^T dS

Source: Zou et al., "LLaMA-Excitor" (2024), equations 3-9. Where it is silent: S_extra is scaled like S, S_excitor over the full C,
the gate is one number per head without tanh, and K_x gets no rotary embedding (K is merged after its own). With grouped heads (H_kv < H,
not in the paper) each query head has a gate, so keys of its own: K is read where it lies, its group's for every head, and dK adds them up.
Shapes: k [B, H_kv, M, d], H a multiple of H_kv; K' [B, H, M, d]; T (hidden) [B, M, C], C = H d; w_down [r, C]; w_up [C, r];
P (prompt) [K, C]; g (gate) [H]; I [B, V, D]; wk_down, wv_down [r, D]; wk_up, wv_up [C, r]; U [B, M, r]; N [B or 1, r, K + V]; Z [B, V, r].
Accumulation: float32 (float64 for float64), softmax included. Parameters may be float32 masters over a bfloat16 trunk.

Moved through memory by the Triton form, in tensors as wide as k: forward 3 (T and k read, K' written; the merge is one launch), backward 2
in 16 bit (dK' read by one launch, T by dw_down's product). Without an image three launches more make what is narrow of it.
excitor_turn.py takes the rotary embedding along. Counted by tests/ops/test_traffic.py.

| gradient needed for     | saved                                                           | computed in backward        |
|-------------------------|-----------------------------------------------------------------|-----------------------------|
| k alone                 | nothing                                                         | nothing: dK is dK' itself   |
| any other               | U, N (and Z): r elements a token, none as wide as C; no K_x, no A | A, then the one pass       |
| w_down                  | also T, which the projections beside it keep anyway             | dU^T T                      |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, no_view, wants_grad
from fastpeft.ops._gemm import matmul, widened, work_dtype
from fastpeft.ops._tiled import triton_launcher
from fastpeft.ops.lora_linear import linear


def excitor_keys_reference(k, hidden, w_down, w_up, prompt, gate, visual=None) -> Tensor:
    """The paper's equations 6-9, K_x computed; adding its scores to S is the same as adding it to K."""
    B, H, M, d = k.shape
    linear = torch.nn.functional.linear
    keys = values = prompt.expand(B, -1, -1)
    if visual is not None:
        image, wk_down, wk_up, wv_down, wv_up = visual
        keys = torch.cat([keys, linear(linear(image, wk_down), wk_up)], 1)
        values = torch.cat([values, linear(linear(image, wv_down), wv_up)], 1)
    scores = linear(linear(hidden, w_down), w_up) @ keys.mT / prompt.shape[1] ** 0.5
    extra = (scores.softmax(-1) @ values).view(B, M, gate.shape[0], d).transpose(1, 2)
    return k.repeat_interleave(extra.shape[1] // H, 1) + gate[:, None, None] * extra


def _attend(u: Tensor, n: Tensor, z: Tensor | None, prompts: int) -> tuple[Tensor, Tensor]:
    """A [B, M, K + V] and L [B, M, K + r], in the accumulator's dtype."""
    acc = accumulator(u.dtype)
    a = torch.matmul(u.to(acc), n.to(acc)).softmax(-1)
    if z is None:
        return a, a
    return a, torch.cat([a[..., :prompts], a[..., prompts:] @ z.to(acc)], -1)


def _rows(prompt: Tensor, wv_up: Tensor | None) -> Tensor:
    return prompt if wv_up is None else torch.cat([prompt, wv_up.t()])  # R [K (+ r), C]


def _gated(rows: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    return (rows.unflatten(1, (gate.shape[0], -1)) * gate[:, None]).flatten(1).to(dtype)  # g R


def _fwd(k, u, n, z, prompt, wv_up, gate):
    """K' as [B, M, C]: the layout projections leave keys in, so that reading and writing it is contiguous."""
    _, L = _attend(u, n, z, prompt.shape[0])
    work = work_dtype(k)
    rows = _gated(_rows(prompt, wv_up), gate, work)
    B, heads, M, d = k.shape
    by_token, L, H = k.transpose(1, 2).unsqueeze(3), L.to(work).flatten(0, 1), gate.shape[0]  # [B, M, H_kv, 1, d]
    if heads == H:
        out = torch.addmm(by_token.reshape(-1, rows.shape[1]).to(work), L, rows)
    else:  # a group's key once for each of its heads: the one copy, and the sum's place
        out = k.new_empty(B, M, heads, H // heads, d, dtype=work).copy_(by_token).view(-1, rows.shape[1]).addmm_(L, rows)
    return out.to(k.dtype).view(B, M, rows.shape[1])


def _fwd_fake(k, u, n, z, prompt, wv_up, gate):
    return k.new_empty(k.shape[0], k.shape[2], prompt.shape[1])


def _bwd(g, L, rows, need_dl, need_y):
    """dL [tokens, KR] = dK' (g R)^T and Y [KR, C] = L^T dK' from dK' [B, M, C] and g R; empty where not needed."""
    acc, work = accumulator(g.dtype), work_dtype(g)
    g2 = g.reshape(-1, rows.shape[1]).to(work)
    dl, y = (g.new_empty(0, dtype=acc) for _ in range(2))
    if need_dl:
        dl = (g2 @ rows.t().to(work)).to(acc)
    if need_y:
        y = (L.to(work).t() @ g2).to(acc)
    return dl, y


def _bwd_fake(g, L, rows, need_dl, need_y):
    acc = accumulator(g.dtype)
    return g.new_empty(L.shape if need_dl else 0, dtype=acc), g.new_empty(rows.shape if need_y else 0, dtype=acc)


def _text_bwd(g, u, n, prompt, gate, need_dl, need_y):
    """(dU, dN, dP, dg) where there is no image; the first two empty without ``need_dl``, the others without ``need_y``."""
    acc = accumulator(g.dtype)
    a, L = _attend(u, n, None, prompt.shape[0])
    dL, y = _merge_bwd(g, L.flatten(0, 1), _gated(prompt, gate, g.dtype), need_dl, need_y)
    du, dn, dprompt, dgate = (t.new_empty(0) for t in (u, n, prompt, gate))
    if need_y:
        dprompt, dgate = _table_grads(y, prompt, gate)
        dprompt = dprompt.to(prompt.dtype)
    if need_dl:
        ds = _softmax_grad(a, dL.view_as(L))
        du = (ds @ n.to(acc).mT).to(u.dtype)
        dn = (u.to(acc).flatten(0, 1).t() @ ds.flatten(0, 1))[None].to(n.dtype)  # one N for the batch: one GEMM over all tokens
    return du, dn, dprompt, dgate


def _text_bwd_fake(g, u, n, prompt, gate, need_dl, need_y):
    return tuple(t.new_empty(t.shape if need else 0) for t, need in ((u, need_dl), (n, need_dl), (prompt, need_y), (gate, need_y)))


def _table_grads(y: Tensor, rows: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dR = g Y, in the accumulator's dtype, and dg."""
    y = y.unflatten(1, (gate.shape[0], -1))
    dgate = (y * rows.to(y.dtype).unflatten(1, y.shape[1:])).sum((0, 2)).to(gate.dtype)
    return (y * gate.to(y.dtype)[:, None]).flatten(1), dgate


def _softmax_grad(a: Tensor, da: Tensor) -> Tensor:
    return a * (da - (a * da).sum(-1, keepdim=True))


def with_prompts(launch, composite, at: int):
    """Triton's launcher, but ATen for no prompts (argument ``at``) at all: the kernels' maximum of no scores is minus infinity."""
    return lambda *args: (launch if args[at].shape[0] else composite)(*args)


_merge = _library.define(
    "excitor_merge_fwd(Tensor k, Tensor u, Tensor n, Tensor? z, Tensor prompt, Tensor? wv_up, Tensor gate) -> Tensor",
    fake=_fwd_fake,
    composite=_fwd,
    triton=with_prompts(triton_launcher("excitor_keys", "excitor_merge_fwd", _fwd), _fwd, 4),
)
_merge_bwd = _library.define(
    "excitor_merge_bwd(Tensor dk, Tensor L, Tensor rows, bool need_dl, bool need_y) -> (Tensor dl, Tensor y)",
    fake=_bwd_fake,
    composite=_bwd,
    triton=triton_launcher("excitor_keys", "excitor_merge_bwd", _bwd),
)
def _on_triton(*args):
    """Of more than 128 prompts a program would not hold the scores of its rows in registers."""
    return (_text_launch if 0 < args[3].shape[0] <= 128 else _text_bwd)(*args)


_text_launch = triton_launcher("excitor_keys", "excitor_text_bwd", _text_bwd)
_text_grads = _library.define(
    "excitor_text_bwd(Tensor dk, Tensor u, Tensor n, Tensor prompt, Tensor gate, bool need_dl, bool need_y)"
    " -> (Tensor du, Tensor dn, Tensor dprompt, Tensor dgate)",
    fake=_text_bwd_fake,
    composite=_text_bwd,
    triton=_on_triton,
)


@_library.flop_formula(torch.ops.fastpeft.excitor_merge_fwd)
def _fwd_flops(k, u, n, z, prompt, wv_up, gate, *args, out_shape=None, **kwargs) -> int:
    (B, M, r), keys, (K, C) = u, n[2], prompt
    return 2 * B * M * (r * keys + K * C + (0 if z is None else r * (keys - K) + r * C))


@_library.flop_formula(torch.ops.fastpeft.excitor_merge_bwd)
def _bwd_flops(g, L, rows, need_dl, need_y, *args, out_shape=None, **kwargs) -> int:
    return 2 * L[0] * rows[0] * rows[1] * (need_dl + need_y)


@_library.flop_formula(torch.ops.fastpeft.excitor_text_bwd)
def _text_bwd_flops(g, u, n, prompt, gate, need_dl, need_y, *args, out_shape=None, **kwargs) -> int:
    (B, M, r), (K, C) = u, prompt
    return 2 * B * M * (K * C * (need_dl + need_y) + r * K * (1 + 2 * need_dl))


def _parameter_grads(g, u, n, z, prompt, wv_up, gate, needs) -> tuple[Tensor | None, ...]:
    """(du, dn, dz, dprompt, dwv_up, dgate), None where not needed, of dK' [B, M, C]."""
    need_u, need_n, need_z, need_p, need_v, need_gate = needs
    need_y, need_dl = need_p or need_v or need_gate, need_u or need_n or need_z
    if z is None:
        grads = _text_grads(g, u, n, prompt, gate, need_dl, need_y)
        du, dn, dprompt, dgate = (t if need else None for t, need in zip(grads, (need_u, need_n, need_p, need_gate)))
        return du, dn, None, dprompt, None, dgate
    K, acc = prompt.shape[0], accumulator(g.dtype)
    du = dn = dz = dprompt = dwv = dgate = None
    a, L = _attend(u, n, z, K)
    rows = _rows(prompt, wv_up)
    dL, y = _merge_bwd(g, L.flatten(0, 1), _gated(rows, gate, g.dtype), need_dl, need_y)
    if need_y:
        dr, dgate = _table_grads(y, rows, gate)
        dgate = dgate if need_gate else None
        dprompt = dr[:K].to(prompt.dtype) if need_p else None
        dwv = dr[K:].t().to(wv_up.dtype) if need_v else None
    if need_dl:
        dL = dL.view_as(L)
        dz = (a[..., K:].mT @ dL[..., K:]).to(z.dtype) if need_z else None
        ds = _softmax_grad(a, torch.cat([dL[..., :K], dL[..., K:] @ z.to(acc).mT], -1))
        du = (ds @ n.to(acc).mT).to(u.dtype) if need_u else None
        dn = (u.to(acc).mT @ ds).to(n.dtype) if need_n else None
    return du, dn, dz, dprompt, dwv, dgate


def summed_over_groups(g: Tensor, heads: int, d: int) -> Tensor:
    """[B, M, heads, d], the gradient of keys that several heads each read, of g [B, M, C]."""
    each = g.view(*g.shape[:2], heads, g.shape[2] // (heads * d), d)
    return each.squeeze(3) if each.shape[3] == 1 else each.sum(3)


class _Merge(Function):
    @staticmethod
    def forward(ctx, k, *params):
        ctx.shape = k.shape
        if any(ctx.needs_input_grad[1:]):
            ctx.save_for_backward(*params)
        return no_view(_merge(k, *params))

    @staticmethod
    @first_order
    def backward(ctx, g):
        need_k, *needs = ctx.needs_input_grad
        _, heads, _, d = ctx.shape
        dk = summed_over_groups(g, heads, d).transpose(1, 2) if need_k else None
        return dk, *(_parameter_grads(g, *ctx.saved_tensors, needs) if any(needs) else [None] * 6)


def _check(k, hidden, w_down, w_up, prompt, gate, visual) -> None:
    names = ("image", "wk_down", "wk_up", "wv_down", "wv_up")
    check_floating("excitor_keys", k=k, hidden=hidden, w_down=w_down, w_up=w_up, prompt=prompt, gate=gate)
    if k.dim() != 4 or hidden.dim() != 3:
        raise ValueError(f"excitor_keys: k {tuple(k.shape)}, hidden {tuple(hidden.shape)}; pass k [B, H, M, d] and hidden [B, M, C]")
    B, heads, M, d = k.shape
    H = gate.shape[0] if gate.dim() == 1 and heads and gate.shape[0] % heads == 0 else heads
    C, r = H * d, w_down.shape[0]
    wanted = {"hidden": (hidden, (B, M, C)), "w_down": (w_down, (r, C)), "w_up": (w_up, (C, r)), "gate": (gate, (H,))}
    wanted["prompt"] = (prompt, (prompt.shape[0], C))
    if visual is not None:
        if len(visual) != 5:
            raise ValueError(f"excitor_keys: visual has {len(visual)} entries; pass ({', '.join(names)})")
        check_floating("excitor_keys", **dict(zip(names, visual)))
        V, D = visual[0].shape[-2:]
        shapes = ((B, V, D), (r, D), (C, r), (r, D), (C, r))
        wanted |= {name: (t, shape) for name, t, shape in zip(names, visual, shapes)}
    for name, (t, shape) in wanted.items():
        if tuple(t.shape) != shape:
            raise ValueError(f"excitor_keys: {name} has shape {tuple(t.shape)}; k {tuple(k.shape)} and r = {r} ask for {shape}")
    if hidden.dtype != k.dtype:
        raise TypeError(f"excitor_keys: hidden is {hidden.dtype} and k is {k.dtype}; cast one to the other's")


@under_autocast("lower")
def excitor_keys(
    k: Tensor,
    hidden: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    prompt: Tensor,
    gate: Tensor,
    visual: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The merged keys ``k + gate K_x`` [B, H, M, d] (stored [B, M, H, d]), for k after its rotary embedding, [B, H, M, d] or of a divisor
    of H heads.

    ``hidden`` [B, M, C] is the attention's input, C = H d; ``w_down`` [r, C], ``w_up`` [C, r], ``prompt`` [K, C], ``gate`` [H].
    ``visual`` = (image [B, V, D], wk_down [r, D], wk_up [C, r], wv_down [r, D], wv_up [C, r]) adds the image's keys and values.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check(k, hidden, w_down, w_up, prompt, gate, visual)
    return merge_keys(k, *_narrow(hidden, w_down, w_up, prompt, gate, visual))


def _narrow(hidden, w_down, w_up, prompt, gate, visual) -> tuple:
    """(u, w_up, prompt, gate, visual) as :func:`merge_keys` takes them."""
    u = linear(hidden, w_down.to(hidden.dtype))
    if visual is None:
        return u, w_up, prompt, gate, None
    image, wk_down, wk_up, wv_down, wv_up = visual
    zk, zv = (linear(image.to(w.dtype), w) for w in (wk_down, wv_down))
    return u, w_up, prompt, gate, (zk, wk_up, zv, wv_up)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale a b``, scaled inside: autograd keeps no scaled copy of a."""
    if widened(a):
        return matmul(a, b) * scale
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def merge_keys(
    k: Tensor,
    u: Tensor,
    w_up: Tensor,
    prompt: Tensor,
    gate: Tensor,
    visual: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`excitor_keys` for what is already r wide: ``u`` [B, M, r] = T W_down^T, and of images (zk [B, V, r], wk_up, zv [B, V, r],
    wv_up), so that rows can be gathered and spread where they are narrow. ``scale`` of S_excitor: C^-1/2."""
    params = _params(u, w_up, prompt, gate, visual, scale)
    merged = _Merge.apply(k, *params) if wants_grad(k, *params) else _merge(k, *params)
    return merged.unflatten(-1, (gate.shape[0], k.shape[3])).transpose(1, 2)


def _params(u, w_up, prompt, gate, visual, scale) -> tuple[Tensor | None, ...]:
    """(u, n, z, prompt, wv_up, gate), as the operators take them."""
    # N is tiny; float16 alone is widened for it: C^-1/2 times a gradient leaves its range
    wide = torch.float32 if w_up.dtype == torch.float16 else w_up.dtype
    up, scale = w_up.to(wide).t(), prompt.shape[1] ** -0.5 if scale is None else scale
    n = _scaled_product(up, prompt.t().to(wide), scale)[None]  # [1, r, K]
    z = wv_up = None
    if visual is not None:
        zk, wk_up, z, wv_up = visual
        of_image = matmul(_scaled_product(up, wk_up.to(wide), scale), zk.mT.to(wide))
        n = torch.cat([n.expand(u.shape[0], -1, -1), of_image], -1)
    return u, n, z, prompt, wv_up, gate
