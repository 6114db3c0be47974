"""LaVIN's mixture-of-modality adapter: one shared projection down, two grouped ones up, mixed by routing weights.

    a = D(A x + a_0)                                 D: dropout
    x' = x + s (w_0 (B_0 a + b_0) + w_1 (B_1 a + b_1))
       = x + s [w_0 a, w_1 a, w_0, w_1] E^T          E = [B_0, B_1, b_0, b_1]: one product, one read of x, one write of x'

    [e_0, e_1, f_0, f_1] = s dx' E                   one product over dx' for da, dw and, transposed, for all of dE
    da = D'(w_0 e_0 + w_1 e_1)          dw_i = <e_i, a> + f_i          dE = s dx'^T [w_0 a, w_1 a, w_0, w_1]
    dx = dx' + da A                     dA = da^T x                    da_0 = sum da

Source: Luo et al., "Cheap and Quick: LaVIN" (2023), equations 2-3; its adapters are RepAdapters (Luo et al., 2023): no activation,
expansion in groups, the projection down shared. Dropout falls on a, as in the official code.
Shapes: x, x' [B, M, C]; w_down (A) [h, C]; b_down (a_0) [h]; w_up (B) [2, C, h / groups]: the rows of group j see a's j-th slice;
b_up [2, C]; routing (w) [B, 2] per sample or [B, M, 2] per token.
Accumulation: the GEMM's (float32, float64 for float64). Parameters may be float32 masters over a bfloat16 trunk.

| gradient needed for          | saved                                              | computed in backward          |
|------------------------------|----------------------------------------------------|-------------------------------|
| x                            | routing, and a, which dw's pass over dx' reads     | e, da, dx                     |
| w_up, b_up, routing          | a: h elements a token, after dropout               | e or dE                       |
| w_down                       | also x, which the norm before it keeps anyway      | da^T x                        |
| any, with dropout            | a seed of 8 bytes; the mask is redrawn             |                               |

Moved through memory by the Triton forms, in tensors of x's size: forward 2 (x, x') in one launch; backward 3 (dx', x, dx) for dx, 2
(dx', x) for all parameters and a sum of parts, three launches (counted by tests/ops/test_traffic.py).

A program owns 16 rows and reads all weights for them, (2 h / groups + h + 2) C numbers and gamma's C, from L2: at h = 8 with a norm that
gives 2 + 19 / 16 tensors of x in forward, where memory gives 1 as long as L2 keeps x until the second pass over it (three programs a
multiprocessor hold 52 MB of x on an H200 at C = 4096, bfloat16; its L2 holds 50). A persistent grid would not change this: those weights
are 156 KB, Triton keeps no tensor in shared memory from one tile of rows to the next, and the 256 KB of registers hold x as well. Programs
of 32 rows by eight warps read half as many weights, but take 128 to 188 registers, and 69 MB of x are in flight; they were compiled, and
left. Weights held in shared memory, 2 tensors from L2 in all, would need another kind of kernel.

norm_mm_adapter.py takes the RMSNorm before it along.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import accumulator, check_floating, no_view, wants_grad
from fastpeft.ops._gemm import work_dtype
from fastpeft.ops._tiled import triton_launcher
from fastpeft.ops.dropout import draw, new_seed


def mm_adapter_reference(x, w_down, b_down, w_up, b_up, routing, scale=1.0, groups=2) -> Tensor:
    """The paper's two adapters, each computed in full, then mixed."""
    a = torch.nn.functional.linear(x, w_down, b_down).unflatten(-1, (groups, -1))
    out = x
    for i in range(2):
        expand = w_up[i].unflatten(0, (groups, -1))  # [groups, C / groups, h / groups]
        branch = torch.einsum("bmgj,gcj->bmgc", a, expand).flatten(2) + b_up[i]
        weight = routing[..., i, None] if routing.dim() == 3 else routing[:, None, i, None]
        out = out + scale * weight * branch
    return out


def _mask(a: Tensor, p: float, seed: Tensor) -> Tensor:
    """1 / (1 - p) where kept, drawn from the seed."""
    return draw(a, p, seed).mul_(1.0 / (1.0 - p))


def _per_token(routing: Tensor, x: Tensor) -> Tensor:
    w = routing if routing.dim() == 3 else routing[:, None].expand(-1, x.shape[1], -1)
    return w.reshape(-1, 2).to(x.dtype)


def _mixed(a: Tensor, w: Tensor, groups: int) -> Tensor:
    """[w_0 a_j, w_1 a_j, w_0, w_1] for each group j: [groups, tokens, 2 h / groups + 2]."""
    parts = a.unflatten(1, (groups, 1, -1)) * w[:, None, :, None]  # [tokens, groups, 2, h / groups]
    return torch.cat([parts.flatten(2), w[:, None].expand(-1, groups, -1)], 2).transpose(0, 1).contiguous()


def _experts(w_up: Tensor, b_up: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """E of each group: [groups, C / groups, 2 h / groups + 2]."""
    e = torch.cat([w_up[0], w_up[1], b_up.t()], 1).to(dtype)
    return e.view(groups, -1, e.shape[1])


def _fwd(x, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    C, work = x.shape[-1], work_dtype(x)
    x2 = x.reshape(-1, C).to(work)
    a = torch.nn.functional.linear(x2, w_down.to(work), b_down.to(work))
    if p > 0.0:
        a.mul_(_mask(a, p, seed))
    mixed, experts = _mixed(a, _per_token(routing, x).to(work), groups), _experts(w_up, b_up, groups, work)
    out = x2.new_empty(x2.shape)
    for j, (xs, os) in enumerate(zip(x2.chunk(groups, 1), out.chunk(groups, 1))):
        torch.addmm(xs, mixed[j], experts[j].t(), alpha=scale, out=os)
    return out.to(x.dtype).view(x.shape), a.to(x.dtype)


def _fwd_fake(x, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    return x.new_empty(x.shape), x.new_empty(x.shape[0] * x.shape[1], w_down.shape[0])


def _bwd(
    g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_down, need_up, need_routing, rstd=None, gamma=None
):  # fmt: skip
    """(dx, dw_down, db_down, dw_up, db_up, drouting); empty where not needed. need_down and need_up stand for weight and bias.

    With rstd and gamma, x is the input of the norm before: A's gradient takes them as scales of da's rows and its own columns.
    """
    acc, work = accumulator(g.dtype), work_dtype(g)
    C = g.shape[-1]
    g2, w, a = g.reshape(-1, C).to(work), _per_token(routing, g).to(work), a.to(work)
    gs = g2.chunk(groups, 1)
    dx, dw_down, db_down, dw_up, db_up, drouting = (g.new_empty(0, dtype=t.dtype) for t in (g, w_down, w_down, w_up, b_up, routing))
    if need_up:
        mixed = _mixed(a, w, groups)
        de = torch.cat([mixed[j].t() @ gs[j] for j in range(groups)], 1).mul_(scale)  # [2 h / groups + 2, C]
        dw_up = w_up.new_empty(w_up.shape).copy_(de[:-2].unflatten(0, (2, -1)).mT)
        db_up = de[-2:].to(b_up.dtype, copy=True)
    if need_x or need_down or need_routing:
        experts = _experts(w_up, b_up, groups, work)
        e = torch.stack([gs[j] @ experts[j] for j in range(groups)], 1).mul_(scale)  # [tokens, groups, 2 h / groups + 2]
        e, f = e[..., :-2].unflatten(2, (2, -1)), e[..., -2:].sum(1)
        if need_routing:
            dw = (e * a.unflatten(1, (groups, 1, -1))).to(acc).sum((1, 3)) + f
            dw = dw.view(*g.shape[:-1], 2)
            drouting = (dw if routing.dim() == 3 else dw.sum(1)).to(routing.dtype)
        if need_x or need_down:
            da = (e * w[:, None, :, None]).sum(2).flatten(1)
            if p > 0.0:
                da *= _mask(da, p, seed)
            if need_x:
                dx = torch.addmm(g2, da, w_down.to(work)).to(g.dtype).view(g.shape)
            if need_down:
                left = da if rstd is None else (da * rstd[:, None]).to(da.dtype)
                dw_down = (left.t() @ x.reshape(-1, C).to(work)).to(w_down.dtype)
                dw_down = dw_down if gamma is None else dw_down.mul_(gamma)
                db_down = da.sum(0, dtype=acc).to(w_down.dtype)
    return dx, dw_down, db_down, dw_up, db_up, drouting


def _bwd_fake(g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_down, need_up, need_routing):
    like = ((g, g.shape, need_x), (w_down, w_down.shape, need_down), (w_down, w_down.shape[:1], need_down))
    like += ((w_up, w_up.shape, need_up), (b_up, b_up.shape, need_up), (routing, routing.shape, need_routing))
    return tuple(t.new_empty(shape if need else 0) for t, shape, need in like)


def define_adapter(name: str, forward: tuple, backward: tuple, *, normed: bool):
    """The two operators of an adapter, with or without the norm before it; ``forward`` and ``backward`` are (composite, fake)."""
    scalars = "Tensor w_up, Tensor b_up, Tensor routing, float scale, int groups, float dropout_p, Tensor? seed"
    norm_in, norm_out = ("Tensor gamma, float eps, ", ", Tensor rstd") if normed else ("", "")
    kept, b_down, need_gamma, dgamma = (
        ("Tensor gamma, Tensor? rstd, ", "Tensor b_down, ", "bool need_gamma, ", "Tensor dgamma, ") if normed else ("",) * 4
    )
    schemas = (
        f"{name}_fwd(Tensor x, {norm_in}Tensor w_down, Tensor b_down, {scalars}) -> (Tensor out, Tensor a{norm_out})",
        f"{name}_bwd(Tensor dout, Tensor? x, {kept}Tensor a, Tensor w_down, {b_down}{scalars}, bool need_x, {need_gamma}bool need_down,"
        f" bool need_up, bool need_routing) -> (Tensor dx, {dgamma}Tensor dw_down, Tensor db_down, Tensor dw_up, Tensor db_up,"
        " Tensor drouting)",
    )
    return tuple(
        _library.define(
            schema, fake=fake, composite=composite, triton=triton_launcher("mm_adapter", f"{name}_{way}", composite, draws=True)
        )
        for way, schema, (composite, fake) in zip(("fwd", "bwd"), schemas, (forward, backward))
    )


_forward, _backward = define_adapter("mm_adapter", (_fwd, _fwd_fake), (_bwd, _bwd_fake), normed=False)


def _flops(x, w_down, w_up) -> tuple[int, int]:
    """FLOPs of A x, and of one product with E (biases included: they are columns of it)."""
    tokens, C = x[0] * x[1], x[2]
    return 2 * tokens * C * w_down[0], 2 * tokens * C * (2 * w_up[2] + 2)


@_library.flop_formula(torch.ops.fastpeft.mm_adapter_fwd)
def _fwd_flops(x, w_down, b_down, w_up, *args, out_shape=None, **kwargs) -> int:
    return sum(_flops(x, w_down, w_up))


@_library.flop_formula(torch.ops.fastpeft.mm_adapter_bwd)
def _bwd_flops(
    g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_down, need_up, need_routing, *args, **kwargs
) -> int:
    down, up = _flops(g, w_down, w_up)
    return down * (need_x + need_down) + up * (need_up + (need_x or need_down or need_routing))


class _MMAdapter(Function):
    @staticmethod
    def forward(ctx, scale, groups, p, seed, x, w_down, b_down, w_up, b_up, routing):
        out, a = _forward(x, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed)
        need_x, *down, need_w_up, need_b_up, need_routing = ctx.needs_input_grad[4:]
        ctx.args = (scale, groups, p)
        ctx.needs = (need_x, any(down), need_w_up or need_b_up, need_routing)
        ctx.save_for_backward(x if any(down) else None, a, w_down, w_up, b_up, routing, seed)
        return no_view(out)

    @staticmethod
    @first_order
    def backward(ctx, g):
        *tensors, seed = ctx.saved_tensors
        grads = _backward(g, *tensors, *ctx.args, seed, *ctx.needs)
        return None, None, None, None, *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[4:]))


def _check(x, w_down, b_down, w_up, b_up, routing, groups, dropout_p) -> None:
    params = {"w_down": w_down, "b_down": b_down, "w_up": w_up, "b_up": b_up}
    check_floating("mm_adapter", x=x, routing=routing, **params)
    if x.dim() != 3:
        raise ValueError(f"mm_adapter: x has shape {tuple(x.shape)}; pass [B, M, C]")
    B, M, C = x.shape
    h = w_down.shape[0]
    if h < 1 or groups < 1 or h % groups or C % groups:
        raise ValueError(f"mm_adapter: {groups} groups do not divide h = {h} and C = {C}; pass h of 1 or more, and groups that divide both")
    shapes = {"w_down": (h, C), "b_down": (h,), "w_up": (2, C, h // groups), "b_up": (2, C)}
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(
                f"mm_adapter: {name} has shape {tuple(params[name].shape)}; x {tuple(x.shape)}, groups={groups} ask for {shape}"
            )
    if routing.shape != (B, 2) and routing.shape != (B, M, 2):  # not `in`: torch.compile compares symbolic sizes one by one only
        raise ValueError(f"mm_adapter: routing has shape {tuple(routing.shape)}; pass [{B}, 2] per sample or [{B}, {M}, 2] per token")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"mm_adapter: dropout_p is {dropout_p}; it must lie in [0, 1)")


@under_autocast("promote")
def mm_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    routing: Tensor,
    scale: float = 1.0,
    groups: int = 2,
    dropout_p: float = 0.0,
) -> Tensor:
    """``x + scale (w_0 B_0 + w_1 B_1)(A x + a_0)``, biases included; x [B, M, C] -> [B, M, C].

    ``w_down`` [h, C], ``b_down`` [h], ``w_up`` [2, C, h / groups], ``b_up`` [2, C]; ``routing`` [B, 2] or [B, M, 2] are the mixing
    weights, after their softmax. Dropout falls on the h-dimensional bottleneck.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    _check(x, w_down, b_down, w_up, b_up, routing, groups, dropout_p)
    seed = new_seed() if dropout_p > 0.0 else None
    tensors, p = (x, w_down, b_down, w_up, b_up, routing), float(dropout_p)
    if wants_grad(*tensors):
        return _MMAdapter.apply(float(scale), groups, p, seed, *tensors)
    return _forward(*tensors, float(scale), groups, p, seed)[0]
