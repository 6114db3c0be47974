"""Queries, keys and values as attention reads them, from what projections leave: norms, rotary embedding, (IA)^3's factors and the rows
of a prefix, all in one pass.

    q' = R(norm_q(q))       k' = [P_k; R(norm_k(k l_k))]       v' = [P_v; v l_v]
    norm(x) = x rstd (c + w)        rstd = (sum(x^2) / d + eps)^-1/2        R: rotary.py's rotation, the same of every head of a token

    backward, for each side:  g = R^T dy         x_hat = x l rstd         dw = sum_rows g x_hat
                              u = rstd (g (c + w) - x_hat mean_d(g (c + w) x_hat))      dl = sum_tokens u x      dx = u l
                              dP = sum over the batch of dy's first n rows

Each is there where it is given: a norm per head (c = 0 as in Qwen3, 1 as in Gemma 3), tables (their channels first, the rest passes
through), l_k and l_v [H_kv, d], a prefix [H_kv, n, d], which is neither normalised, turned nor rescaled. The keys' first n rows being the
prefix's, attention to k' and v' needs no merge: its cost grows by n / N. Causality is aligned at the last query and the last key there.
Sources: rms_norm.py's, rotary.py's, rescale.py's; Li, Liang, "Prefix-Tuning" (2021).
Shapes: q [B, M, H, d]; k, v [B, M, H_kv, d], any strides; cos, sin [B or 1, M, rot], rot <= d and even; q', k', v' [B, heads, n + M, d]
([B, heads, M, d] for queries), laid out by token.
Accumulation: float32 (float64 for float64), one rounding, after all of it.

| gradient needed for                      | saved                                                           |
|------------------------------------------|-----------------------------------------------------------------|
| q, or q_norm, where q is normalised      | q: neither q' nor rstd, which backward's pass over q forms      |
| k, or k_norm, where k is normalised; l_k | k                                                               |
| l_v                                      | v                                                               |
| q, k, v without norms; a prefix          | nothing (tables, factors and norms' weights are the caller's)   |

Moved through memory, in tensors of q's, k's and v's size, of csrc's form: forward 2 (x, y) of each side in one launch, v untouched where
it has neither factor nor prefix; backward 2 (dy, dx), 3 where x is read, in one launch and one for the sums of each parameter
(counted by tests/ops/test_traffic.py). The parts take 2 and 3 for each norm and factor, 2 for each rotation, 4 for rows of a prefix.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_affine, check_floating, wants_grad
from fastpeft.ops._recompute import mark_recomputable, recipe_of, recompute_all, to_save_all
from fastpeft.ops.rescale import rescale
from fastpeft.ops.rms_norm import norm_inputs, rms_norm, rms_norm_reference
from fastpeft.ops.rotary import _rotate, rotary_reference
from fastpeft.ops.rotary import rotary as turned

WIDEST = 512  # channels of a head that csrc's form takes


class _How(NamedTuple):
    """What lies between projections and scores, each None where there is none."""

    cos: Tensor | None = None  # [B or 1, M, rot]
    sin: Tensor | None = None
    q_norm: Tensor | None = None  # [d]
    k_norm: Tensor | None = None
    l_k: Tensor | None = None  # [H_kv, d]
    l_v: Tensor | None = None
    p_k: Tensor | None = None  # [H_kv, n, d]
    p_v: Tensor | None = None


def attention_inputs_reference(q, k, v, how: _How, eps: float = 1e-6, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, by the parts' own."""

    def side(x, norm=None, factor=None, prefix=None, turns=True):
        x = x if factor is None else x * factor
        x = x if norm is None else rms_norm_reference(x, norm + offset, eps)
        x = x if how.cos is None or not turns else rotary_reference(x, how.cos[:, :, None], how.sin[:, :, None])
        x = x.transpose(1, 2)
        return x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1, -1), x], 2)

    return side(q, how.q_norm), side(k, how.k_norm, how.l_k, how.p_k), side(v, None, how.l_v, how.p_v, turns=False)


def _one_side(x, norm, offset, eps, cos, sin, factor, prefix, n):
    """y [B, n + M, heads, d], in x's dtype."""
    acc = accumulator(x.dtype)
    h = x.to(acc)
    if factor is not None:
        h = h * factor
    if norm is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (norm.to(acc) + offset)
    if cos is not None:
        h = _rotate(h, cos[:, :, None], sin[:, :, None], False)
    y = x.new_empty(x.shape[0], n + x.shape[1], *x.shape[2:])
    y[:, n:] = h
    if n:
        y[:, :n] = 0 if prefix is None else prefix.transpose(0, 1)
    return y


def _fwd(q, k, v, cos, sin, q_norm, k_norm, offset, eps, l_k, l_v, p_k, p_v, n_q, n):
    return (
        k.new_empty(0) if q is None else _one_side(q, q_norm, offset, eps, cos, sin, None, None, n_q),
        _one_side(k, k_norm, offset, eps, cos, sin, l_k, p_k, n),
        k.new_empty(0) if v is None else _one_side(v, None, 0.0, eps, None, None, l_v, p_v, n),
    )


def _fwd_fake(q, k, v, cos, sin, q_norm, k_norm, offset, eps, l_k, l_v, p_k, p_v, n_q, n):
    shapes = ((t.shape[0], rows + t.shape[1], *t.shape[2:]) if t is not None else 0 for t, rows in ((q, n_q), (k, n), (v, n)))
    return tuple(map(k.new_empty, shapes))


DQ, DK, DV, DQ_NORM, DK_NORM, DL_K, DL_V = (1 << i for i in range(7))  # what backward may be asked for


def _one_side_bwd(dy, x, norm, offset, eps, cos, sin, factor, needs):
    """(dx, dnorm, dfactor), each empty where not needed."""
    need_dx, need_dnorm, need_dfactor = needs
    acc = accumulator(dy.dtype)
    dx, dnorm, dfactor = (dy.new_empty(0) for _ in range(3))
    if not any(needs):
        return dx, dnorm, dfactor
    g = dy.to(acc)
    if cos is not None:
        g = _rotate(g, cos[:, :, None], sin[:, :, None], True)
    if norm is not None:
        h = x.to(acc) if factor is None else x.to(acc) * factor
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        x_hat, weight = h * rstd, norm.to(acc) + offset
        if need_dnorm:
            dnorm = (g * x_hat).flatten(0, 2).sum(0).to(norm.dtype)
        g = g * weight
        g = (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd
    if need_dfactor:
        dfactor = (g * x.to(acc)).flatten(0, 1).sum(0).to(factor.dtype)
    if need_dx:
        dx = dy.new_empty(dy.shape).copy_(g if factor is None else g * factor)
    return dx, dnorm, dfactor


def _bwd(dq, dk, dv, q, k, v, cos, sin, q_norm, k_norm, offset, eps, l_k, l_v, wanted):
    dq_norm = dl_v = none = dk.new_empty(0)
    if dq is not None:
        dq, dq_norm, _ = _one_side_bwd(dq, q, q_norm, offset, eps, cos, sin, None, (wanted & DQ, wanted & DQ_NORM, 0))
    if dv is not None:
        dv, _, dl_v = _one_side_bwd(dv, v, None, 0.0, eps, None, None, l_v, (wanted & DV, 0, wanted & DL_V))
    dk, dk_norm, dl_k = _one_side_bwd(dk, k, k_norm, offset, eps, cos, sin, l_k, (wanted & DK, wanted & DK_NORM, wanted & DL_K))
    dq, dv = (none if t is None else t for t in (dq, dv))
    return tuple(none.clone() if t is none else t for t in (dq, dk, dv, dq_norm, dk_norm, dl_k, dl_v))


def _bwd_fake(dq, dk, dv, q, k, v, cos, sin, q_norm, k_norm, offset, eps, l_k, l_v, wanted):
    sources = (dq, dk, dv, q_norm, k_norm, l_k, l_v)
    return tuple(dk.new_empty(0) if t is None or not wanted & (1 << i) else t.new_empty(t.shape) for i, t in enumerate(sources))


_forward = _library.define(
    "attention_inputs_fwd(Tensor? q, Tensor k, Tensor? v, Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, float offset,"
    " float eps, Tensor? l_k, Tensor? l_v, Tensor? p_k, Tensor? p_v, int n_q, int n) -> (Tensor q, Tensor k, Tensor v)",
    fake=_fwd_fake,
    composite=_fwd,
)
_backward = _library.define(
    "attention_inputs_bwd(Tensor? dq, Tensor dk, Tensor? dv, Tensor? q, Tensor? k, Tensor? v, Tensor? cos, Tensor? sin, Tensor? q_norm,"
    " Tensor? k_norm, float offset, float eps, Tensor? l_k, Tensor? l_v, int wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_norm, Tensor dk_norm, Tensor dl_k, Tensor dl_v)",
    fake=_bwd_fake,
    composite=_bwd,
)


# Devices on which one pass replaces the parts. Measured on an H200 (torch 2.11, bfloat16, ms of a captured graph, forward and backward,
# one pass and parts): 4 x 2048 tokens, 32 heads of 128 for queries and keys each, frozen norms and rotary 0.36 and 0.70, trained norms 0.41
# and 0.71, l_k and rotary 0.32 and 0.51, rotary alone 0.215 and 0.224; 8 heads of keys 0.22 and 0.45, 0.26 and 0.46, 0.19 and 0.23, 0.141
# and 0.146; 20 x 35 tokens, 12 heads of 64 0.013 and 0.040, 0.018 and 0.055, 0.025 and 0.035, 0.017 and 0.021. On a CPU the parts stay:
# csrc has them, and not this; nor does ATen's form replace them where csrc's is missing.
def _devices(served: str) -> set[str]:
    return {"cuda"} if served == "native" or _library.FORCED == "composite" else set()


ONE_PASS = _devices(_library.backend_of()["attention_inputs_fwd"]["CUDA"])


class _Form(NamedTuple):
    """What of a call is no tensor."""

    eps: float = 0.0
    offset: float = 0.0
    queries: bool = False  # n rows of zeros before the queries, too


def _made(q, k, v, how: _How, form: _Form) -> tuple[Tensor, ...]:
    """(q', k', v'), each [B, n + M, heads, d], without those of q and v that are None."""
    n = 0 if how.p_k is None else how.p_k.shape[1]
    prefix = (None if p is None else p.to(k.dtype) for p in (how.p_k, how.p_v))
    norms = (how.q_norm, how.k_norm, form.offset, form.eps)
    made = _forward(q, k, v, how.cos, how.sin, *norms, how.l_k, how.l_v, *prefix, n if form.queries else 0, n)
    return tuple(y for y, x in zip(made, (q, k, v)) if x is not None)


class _AttentionInputs(Function):
    @staticmethod
    def forward(ctx, form, q, k, v, *how):
        ctx.form, ctx.given, how = form, [x is not None for x in (q, k, v)], _How(*how)
        need_q, need_k, need_v, _, _, need_q_norm, need_k_norm, need_l_k, need_l_v, need_p_k, need_p_v = ctx.needs_input_grad[1:]
        keeps_q = how.q_norm is not None and any((need_q, need_q_norm))
        keeps_k = need_l_k or (how.k_norm is not None and any((need_k, need_k_norm)))
        ctx.recipe, kept = to_save_all(q if keeps_q else None, k if keeps_k else None, v if need_l_v else None)
        ctx.save_for_backward(*how[:6], *kept)
        ctx.n, ctx.dtypes = 0 if how.p_k is None else how.p_k.shape[1], [getattr(p, "dtype", None) for p in how[6:]]
        made = _made(q, k, v, how, form)
        trained = (any((need_q, need_q_norm)), any((need_k, need_k_norm, need_l_k, need_p_k)), any((need_v, need_l_v, need_p_v)))
        of = itertools.compress(trained, ctx.given)
        ctx.mark_non_differentiable(*(y for y, need in zip(made, of) if not need))
        return made

    @staticmethod
    @first_order
    def backward(ctx, *dys):
        came = iter(dys)
        dq, dk, dv = (next(came) if given else None for given in ctx.given)
        cos, sin, q_norm, k_norm, l_k, l_v, *kept = ctx.saved_tensors
        need_p_k, need_p_v = ctx.needs_input_grad[10:]
        prefix = (_summed(dk, ctx.n, ctx.dtypes[0], need_p_k), _summed(dv, ctx.n, ctx.dtypes[1], need_p_v))
        dq, dk, dv = (t if t is None else t[:, n:] for t, n in ((dq, ctx.n * ctx.form.queries), (dk, ctx.n), (dv, ctx.n)))
        grads = [dq, dk, dv, *[None] * 4]  # those of a side on which nothing is done
        done = [any(t is not None for t in side) for side in ((cos, q_norm), (cos, k_norm, l_k), (l_v,))]
        needs = [*ctx.needs_input_grad[1:4], *ctx.needs_input_grad[6:10]]
        wanted = sum(need << i for i, need in enumerate(needs) if i > 2 or done[i])
        if wanted:
            came = (dq if done[0] else None, dk, dv if done[2] else None, *recompute_all(ctx.recipe, kept))
            made = _backward(*came, cos, sin, q_norm, k_norm, ctx.form.offset, ctx.form.eps, l_k, l_v, wanted)
            grads = [made[i] if wanted & (1 << i) else grad for i, grad in enumerate(grads)]
        grads = [grad if need else None for grad, need in zip(grads, needs)]
        return None, *grads[:3], None, None, *grads[3:], *prefix


def _summed(dy: Tensor | None, n: int, dtype: torch.dtype | None, need: bool) -> Tensor | None:
    """A prefix's gradient [H_kv, n, d], of the first rows of dy [B, n + M, H_kv, d]."""
    return dy[:, :n].sum(0, dtype=accumulator(dy.dtype)).to(dtype).transpose(0, 1) if need else None


def _one_pass(q, k, v, how: _How, form: _Form) -> tuple[Tensor, ...]:
    return _AttentionInputs.apply(form, q, k, v, *how) if wants_grad(q, k, v, *how) else _made(q, k, v, how, form)


def behind(q: Tensor | None, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, ...]:
    """[0; q], where there is one, [P_k; k] and [P_v; v], [B, heads, n + M, d], of q, k, v [B, heads, M, d] and P_k, P_v [H_kv, n, d]: one
    copy of all."""
    tensors = (t if t is None else t.transpose(1, 2) for t in (q, k, v))
    return tuple(t.transpose(1, 2) for t in _one_pass(*tensors, _How(p_k=p_k, p_v=p_v), _Form(queries=True)))


def both_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, heads, M, d] turned by tables [B or 1, M, rot], in one pass. Where each was normalised before, by heads and with one eps,
    so are they here, from what was before the norms: backward is one pass too, and what the norms made and kept is let go."""
    norms = [normalised_from(t) for t in (q, k)]
    if all(norms) and norms[0][2] == norms[1][2]:
        (q, q_norm, eps), (k, k_norm, _) = norms
    else:
        q, k, q_norm, k_norm, eps = q.transpose(1, 2), k.transpose(1, 2), None, None, 0.0
    q, k = _one_pass(q, k, None, _How(cos, sin, q_norm, k_norm), _Form(eps))
    return q.transpose(1, 2), k.transpose(1, 2)


def normalised_from(x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(h [B, M, heads, d], weight, eps) where x [B, heads, M, d] is what rms_norm made of h, or that seen by heads, and nobody waits for
    its own gradient; None elsewhere."""
    y = x if x._base is None else x._base
    if (came := norm_inputs(y)) is None or came[0].dim() != 4 or came[1] is None or y._backward_hooks or y.retains_grad:
        return None
    if y is x:
        return came[0].transpose(1, 2), *came[1:]
    seen = y.transpose(1, 2)
    return came if (x.shape, x.stride(), x.storage_offset()) == (seen.shape, seen.stride(), seen.storage_offset()) else None


class _WithoutRows(Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x[:, n:].detach()

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return _forward(None, dy, *[None] * 5, 0.0, 0.0, *[None] * 4, 0, ctx.n)[1], None


def without_rows(o: Tensor, n: int) -> Tensor:
    """o [B, H, n + M, d] but for its first n rows; in backward they are written with the others, in one pass."""
    return _WithoutRows.apply(o.transpose(1, 2), n).transpose(1, 2) if wants_grad(o) else o[:, :, n:]


def factors(k: Tensor, v: Tensor, l_k: Tensor, l_v: Tensor) -> tuple[Tensor, Tensor]:
    """(k l_k, v l_v) for k, v [B, H_kv, N, d] and l_k, l_v [H_kv, d], in one pass."""
    how = _How(l_k=l_k.to(k.dtype), l_v=l_v.to(k.dtype))
    k, v = _one_pass(None, k.transpose(1, 2), v.transpose(1, 2), how, _Form())
    return k.transpose(1, 2), v.transpose(1, 2)


def _by_heads(t: Tensor) -> Tensor:
    """[B, M, heads, d] -> [B, heads, M, d]. What backward can form again, it can form again and exchange."""
    y = t.transpose(1, 2)
    return y if recipe_of(t) is None else mark_recomputable(y, _exchanged, t)


def _exchanged(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _in_parts(q, k, v, how: _How, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the operators that it is made of, each saving what its table says."""
    k, v = (t if l is None else _scaled(t, l) for t, l in ((k, how.l_k), (v, how.l_v)))
    weights = (w if w is None or not form.offset else w.to(accumulator(q.dtype)) + form.offset for w in (how.q_norm, how.k_norm))
    q, k = (t if w is None else rms_norm(t, w, form.eps) for t, w in zip((q, k), weights))
    if how.cos is not None:
        q, k = (turned(t, how.cos.unsqueeze(2), how.sin.unsqueeze(2)) for t in (q, k))
    q, k, v = map(_by_heads, (q, k, v))
    if how.p_k is not None:
        k, v = _before(how.p_k, k), _before(how.p_v, v)
        q = torch.nn.functional.pad(q.transpose(1, 2), (0, 0, 0, 0, how.p_k.shape[1], 0)).transpose(1, 2) if form.queries else q
    return q, k, v


def _scaled(t: Tensor, l: Tensor) -> Tensor:
    """t l; where a token's heads are neighbours as one row, which csrc takes faster."""
    together = t.stride(3) == 1 and t.stride(2) == t.shape[3]
    return rescale(t.flatten(2), l.flatten()).view(t.shape) if together else rescale(t, l)


def _before(p: Tensor, t: Tensor) -> Tensor:
    """[p; t], laid out by token."""
    return torch.cat([p.to(t.dtype).transpose(0, 1).expand(t.shape[0], -1, -1, -1), t.transpose(1, 2)], 1).transpose(1, 2)


def _together(q, k, v, how: _How, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
    """In one pass."""
    changed = how.l_v is not None or how.p_v is not None
    made = _one_pass(q, k, v if changed else None, how, form)
    return tuple(map(_by_heads, made if changed else (*made, v)))


def _check(q, k, v, how: _How) -> None:
    check_floating("attention_inputs", q=q, k=k, v=v, **how._asdict())
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention_inputs: {shapes} do not fit; pass q [B, M, H, d] and k, v [B, M, H_kv, d]")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention_inputs: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    check_affine("attention_inputs", q, q_norm=how.q_norm, k_norm=how.k_norm)
    wide = (q.dtype, accumulator(q.dtype))
    for name, l in (("l_k", how.l_k), ("l_v", how.l_v)):
        if l is not None and (l.shape != k.shape[2:] or l.dtype not in wide):
            raise ValueError(f"attention_inputs: {name} is {tuple(l.shape)} {l.dtype}; pass [H_kv, d] = {list(k.shape[2:])} in {q.dtype}")
    if how.cos is not None:
        _check_tables(q, how.cos, how.sin)
    if how.p_k is not None and any(p.dim() != 3 or p.shape[::2] != k.shape[2:] or p.shape != how.p_k.shape for p in (how.p_k, how.p_v)):
        shapes = [tuple(p.shape) for p in (how.p_k, how.p_v)]
        raise ValueError(f"attention_inputs: prefix shapes {shapes}; pass (P_k, P_v), each [H_kv, n, d]")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    told, wide = f"attention_inputs: cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype}", accumulator(q.dtype)
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dtype not in (q.dtype, wide):
        raise ValueError(f"{told} must match, in {q.dtype} or {wide}")
    if cos.dim() != 3 or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[1] or cos.shape[2] % 2 or cos.shape[2] > q.shape[3]:
        raise ValueError(f"{told} do not fit q {tuple(q.shape)}; pass [B or 1, M, rot], rot even and at most d")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("attention_inputs: cos and sin are constants; detach() them")


def one_pass(q: Tensor, k: Tensor) -> bool:
    """Whether heads [B, ., ., d] go through csrc's one pass, by the rule beside ONE_PASS."""
    return q.device.type in ONE_PASS and q.shape[3] % 2 == 0 and q.shape[3] <= WIDEST and 0 < q.numel() < 1 << 31 and k.numel() > 0


@under_autocast("promote")
def attention_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    ia3: tuple[Tensor | None, Tensor | None] | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    rows_for_queries: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q', k', v') as :func:`attention` takes them, each [B, heads, ., d], of q [B, M, H, d] and k, v [B, M, H_kv, d].

    ``rotary`` = (cos, sin), each [B or 1, M, rot]. ``q_norm``, ``k_norm`` [d]: weights of an RMSNorm of each head, to which ``norm_offset``
    is added (1 in Gemma). ``ia3`` = (l_k, l_v), each [H_kv, d] or None: factors on k and v before all else. ``prefix`` = (P_k, P_v), each
    [H_kv, n, d]: keys and values put before those of the tokens, as they are; attention then takes none: causality aligned at the last
    key leaves the prefix to every query. ``rows_for_queries``: n rows of zeros stand before the queries, too, so that causal attention
    has as many queries as keys, which every kernel takes; the first n rows of its output are nobody's (:func:`without_rows`).
    Without a factor or a prefix v' is v.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    how = _How(*(rotary or (None, None)), q_norm, k_norm, *(ia3 or (None, None)), *(prefix or (None, None)))
    _check(q, k, v, how)
    return (_together if one_pass(q, k) else _in_parts)(q, k, v, how, _Form(norm_eps, norm_offset, rows_for_queries))
