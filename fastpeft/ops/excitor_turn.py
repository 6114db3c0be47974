"""Rotary embedding of queries and keys with LLaMA-Excitor's extra keys merged into the keys, in one pass.

    Q' = R(Q)       K' = R(K) + g K_x       R: rotary.py's rotation; K_x: excitor_keys.py's

    dQ = R^T dQ'    dK = R^T dK'            the parameters' gradients are excitor_keys.py's, of dK'

Sources and accumulation: theirs. R(K) is not rounded before the sum.
Shapes: q, Q', K' [B, H, M, d]; k [B, H_kv, M, d], H a multiple of H_kv; cos, sin [B or 1, M, d], d even; the rest as in
excitor_keys.py.

| gradient needed for | saved                                       | computed in backward        |
|---------------------|---------------------------------------------|-----------------------------|
| q, k                | cos, sin (tables of the caller, no copy)    | the transposed rotation     |
| any other           | what excitor_keys.py saves for it           | the same as there           |

Moved through memory by the Triton form, in tensors as wide as k: forward 4 (q, k, Q', K') by one launch, where the rotary pass and the
merge take 6 by two; of grouped heads k is H_kv / H of q, and read again from the caches for each head of its group. T is read once more,
for U. Backward 5, as the parts: dK' is read by the transposed rotation and by the parameters' pass (counted by
tests/ops/test_traffic.py). As one they would read the tables anew for every head: see kernels/excitor_keys.py.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import no_view, wants_grad
from fastpeft.ops._recompute import recipe_of
from fastpeft.ops._tiled import triton_launcher
from fastpeft.ops.rotary import rotary, rotary_reference

# the modules: fastpeft.ops has the functions under those names
attention_inputs, excitor = (import_module(f"fastpeft.ops.{name}") for name in ("attention_inputs", "excitor_keys"))


def excitor_turn_reference(q, k, tables, hidden, w_down, w_up, prompt, gate, visual=None) -> tuple[Tensor, Tensor]:
    """The one after the other."""
    q, k = (rotary_reference(t, *(table.unsqueeze(1) for table in tables)) for t in (q, k))
    return q, excitor.excitor_keys_reference(k, hidden, w_down, w_up, prompt, gate, visual)


def _turn_fwd(q, k, cos, sin, u, n, z, prompt, wv_up, gate):
    """(Q', K'), each as [B, M, C]."""
    q, k = (torch.ops.fastpeft.rotary(t, cos.unsqueeze(1), sin.unsqueeze(1), False) for t in (q, k))
    return q.transpose(1, 2).flatten(2).clone(), excitor._fwd(k, u, n, z, prompt, wv_up, gate)


def _turn_fwd_fake(q, k, cos, sin, u, n, z, prompt, wv_up, gate):
    return tuple(k.new_empty(k.shape[0], k.shape[2], prompt.shape[1]) for _ in range(2))


_turn = _library.define(
    "excitor_turn_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor u, Tensor n, Tensor? z, Tensor prompt, Tensor? wv_up, Tensor gate)"
    " -> (Tensor q, Tensor k)",
    fake=_turn_fwd_fake,
    composite=_turn_fwd,
    triton=excitor.with_prompts(triton_launcher("excitor_keys", "excitor_turn_fwd", _turn_fwd), _turn_fwd, 7),
)
TURNS = {device.lower() for device, served in _library.backend_of()["excitor_turn_fwd"].items() if served.startswith("triton")}
WIDEST = 128  # channels of a head, whose tables a program holds: at 256 with an image, and in float32, it spilled
DTYPES = (torch.float16, torch.bfloat16)


@_library.flop_formula(torch.ops.fastpeft.excitor_turn_fwd)
def _turn_flops(q, k, cos, sin, u, n, z, prompt, *args, out_shape=None, **kwargs) -> int:
    return excitor._fwd_flops(k, u, n, z, prompt)


class _Turn(Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, *params):
        ctx.set_materialize_grads(False)
        ctx.shape, trained = k.shape, any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(cos, sin, *(params if trained else [None] * 6))
        turned, merged = map(no_view, _turn(q, k, cos, sin, *params))
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(turned)
        return turned, merged

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        need_q, need_k, _, _, *needs = ctx.needs_input_grad
        cos, sin, *params = ctx.saved_tensors
        B, heads, M, d = ctx.shape
        dq, dk = (g if need and g is not None else None for g, need in zip(grads, (need_q, need_k)))
        dq, dk = dq if dq is None else dq.view(B, M, dq.shape[2] // d, d), dk if dk is None else excitor.summed_over_groups(dk, heads, d)
        of_params = excitor._parameter_grads(grads[1], *params, needs) if any(needs) and grads[1] is not None else [None] * 6
        return *(t if t is None else t.transpose(1, 2) for t in _turned_back(dq, dk, cos, sin)), None, None, *of_params


def _turned_back(dq: Tensor | None, dk: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The transposed rotation of both, in one pass where attention_inputs has one."""
    if dq is not None and dk is not None and attention_inputs.one_pass(dq, dk):
        wanted = attention_inputs.DQ | attention_inputs.DK
        return attention_inputs._backward(dq, dk, *[None] * 4, cos, sin, None, None, 0.0, 0.0, None, None, wanted)[:2]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return tuple(t if t is None else torch.ops.fastpeft.rotary(t, cos, sin, True) for t in (dq, dk))


def turns(x: Tensor, d: int, cos: Tensor) -> bool:
    """Whether there is one pass for heads of d channels in x's dtype, on its device, and such tables."""
    whole = 0 < d == cos.shape[-1] <= WIDEST
    return whole and x.dtype in DTYPES and x.device.type in TURNS


def turn_and_merge(
    q: Tensor,
    k: Tensor,
    tables: tuple[Tensor, Tensor],
    u: Tensor,
    w_up: Tensor,
    prompt: Tensor,
    gate: Tensor,
    visual: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(rotary(q), rotary(k) + g K_x), both [B, H, M, d], in one pass where :func:`turns` says so and backward keeps q. ``tables`` =
    (cos, sin), each [B or 1, M, rot], in k's dtype or float32; the rest as :func:`fastpeft.ops.excitor_keys.merge_keys` takes it."""
    cos, sin = tables
    if not turns(q, q.shape[-1], cos) or recipe_of(q) is not None:  # what forms q again forms rotary(q) again, with its own bits
        one_pass = attention_inputs.one_pass(q, k)
        q, k = attention_inputs.both_turned(q, k, *tables) if one_pass else (rotary(t, cos.unsqueeze(1), sin.unsqueeze(1)) for t in (q, k))
        return q, excitor.merge_keys(k, u, w_up, prompt, gate, visual, scale)
    return _together(q, k, cos, sin, excitor._params(u, w_up, prompt, gate, visual, scale))


def _together(q, k, cos, sin, params) -> tuple[Tensor, Tensor]:
    made = _Turn.apply(q, k, cos, sin, *params) if wants_grad(q, k, *params) else _turn(q, k, cos, sin, *params)
    return tuple(t.unflatten(-1, q.shape[1::2]).transpose(1, 2) for t in made)


@under_autocast("lower")
def excitor_turn(
    q: Tensor,
    k: Tensor,
    tables: tuple[Tensor, Tensor],
    hidden: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    prompt: Tensor,
    gate: Tensor,
    visual: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries [B, H, M, d] and keys, of H heads or of a divisor of it, as attention reads them, H heads each: both turned by ``tables`` =
    (cos, sin), each [B or 1, M, rot], then the keys merged as :func:`fastpeft.ops.excitor_keys` merges them, which says what the rest is.

    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    excitor._check(k, hidden, w_down, w_up, prompt, gate, visual)
    if q.shape != (k.shape[0], gate.shape[0], *k.shape[2:]) or q.dtype != k.dtype:
        told = f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} must match"
        raise ValueError(f"excitor_turn: {told}, with a query for each of {gate.shape[0]} gates")
    attention_inputs._check_tables(q.transpose(1, 2), *tables)
    return turn_and_merge(q, k, tables, *excitor._narrow(hidden, w_down, w_up, prompt, gate, visual))
