"""LaVIN's routed adapter, with or without the RMSNorm before it: one read of x and one write of x' in each direction.

    y = rms_norm(x) (or x)      a = D(A y + a_0)      x' = y + s (w_0 (B_0 a + b_0) + w_1 (B_1 a + b_1))        _mm_adapter_fwd_kernel
    e_i = s dx' B_i    dw_i = <e_i, a> + s <dx', b_i>    da = D'(w_0 e_0 + w_1 e_1)    dy = dx' + da A          _mm_adapter_dx_kernel
    dB_i = s dx'^T (w_i a)      db_i = s sum w_i dx'      T = (rstd da)^T x      dA = T gamma                   _mm_adapter_dw_kernel
    norm: dx = rstd (dy gamma - x_hat mean(dy gamma x_hat)); the mean needs no dy, for <da A, gamma x_hat> = <da, A y> = <da, a - a_0>
          dgamma = sum dx' x_hat + sum_j A_j T_j

Shapes: x [M, C]; A (w_down) [h, C]; B (w_up) [2, C, h / groups]; w [M, 2]; rstd [M]. The first two kernels own rows and pass over C
twice (the second time from L2); the third owns columns and a span of rows, its sums in registers, one partial per span.
h is padded to 16; channels of one group see the other groups' columns of B as zeros. Accumulation and statistics in float32.
"""

import torch
import triton
import triton.language as tl

BLOCK_M, WARPS = 16, 4  # few rows: at 2,048 tokens 128 programs, one for each multiprocessor
BLOCK_C = {2: 128, 4: 64}  # by bytes of an element: float32 at 128 spilled
DW_ROWS, DW_SPANS = 32, 4
DW_COLS = {2: 64, 4: 32}


@triton.jit
def _expert(w_ptr, e, offs_c, offs_h, C, H, GROUPS: tl.constexpr, mask_c, mask_h, dtype: tl.constexpr):
    """B_e's rows offs_c, zero outside a row's group: [BLOCK_C, BLOCK_H]."""
    per = H // GROUPS
    mask = mask_c[:, None] & mask_h & (offs_h // per == (offs_c // (C // GROUPS))[:, None])
    return tl.load(w_ptr + (e * C + offs_c[:, None]) * per + offs_h % per, mask=mask, other=0.0).to(dtype)


@triton.jit
def _mm_adapter_fwd_kernel(
    x_ptr, gamma_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, route_ptr, seed_ptr, out_ptr, a_ptr, rstd_ptr,
    M, C, H, stride_xm, scale, p, eps,
    NORM: tl.constexpr, DROP: tl.constexpr, GROUPS: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    offs_m, offs_h = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_m, mask_h = offs_m < M, offs_h < H
    a = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask_m[:, None] & mask_c, other=0.0)  # [BLOCK_M, BLOCK_C]
        down = tl.load(down_ptr + offs_h * C + offs_c[:, None], mask=mask_c[:, None] & mask_h, other=0.0).to(tl.float32)
        if NORM:
            square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            down *= tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        a = tl.dot(x, down.to(dtype), a, input_precision=precision)
    if NORM:
        rstd = tl.rsqrt(square / C + eps)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
        a *= rstd[:, None]
    a += tl.load(down_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    if DROP:
        u = tl.rand(tl.load(seed_ptr), offs_m[:, None] * H + offs_h)
        a = tl.where(u >= p, a / (1.0 - p), 0.0)
    tl.store(a_ptr + offs_m[:, None] * H + offs_h, a.to(dtype), mask=mask_m[:, None] & mask_h)
    w0 = tl.load(route_ptr + offs_m * 2, mask=mask_m, other=0.0).to(tl.float32)[:, None] * scale
    w1 = tl.load(route_ptr + offs_m * 2 + 1, mask=mask_m, other=0.0).to(tl.float32)[:, None] * scale
    a0, a1 = (a * w0).to(dtype), (a * w1).to(dtype)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c
        acc = tl.dot(a0, tl.trans(_expert(up_ptr, 0, offs_c, offs_h, C, H, GROUPS, mask_c, mask_h, dtype)), input_precision=precision)
        acc = tl.dot(a1, tl.trans(_expert(up_ptr, 1, offs_c, offs_h, C, H, GROUPS, mask_c, mask_h, dtype)), acc, input_precision=precision)
        acc += w0 * tl.load(up_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        acc += w1 * tl.load(up_bias_ptr + C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        y = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            y *= rstd[:, None] * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs_m[:, None] * C + offs_c, (y + acc).to(dtype), mask=mask)


@triton.jit
def _mm_adapter_dx_kernel(
    g_ptr, x_ptr, gamma_ptr, rstd_ptr, a_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, route_ptr, seed_ptr, dx_ptr, da_ptr, dw_ptr,
    M, C, H, stride_xm, scale, p,
    NEED_DX: tl.constexpr, NORM: tl.constexpr, DROP: tl.constexpr, GROUPS: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    offs_m, offs_h = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_m, mask_h = offs_m < M, offs_h < H
    e0, e1 = tl.zeros((BLOCK_M, BLOCK_H), tl.float32), tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    f0, f1, mean = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        g = tl.load(g_ptr + offs_m[:, None] * C + offs_c, mask=mask_m[:, None] & mask_c, other=0.0)  # [BLOCK_M, BLOCK_C]
        e0 = tl.dot(g, _expert(up_ptr, 0, offs_c, offs_h, C, H, GROUPS, mask_c, mask_h, dtype), e0, input_precision=precision)
        e1 = tl.dot(g, _expert(up_ptr, 1, offs_c, offs_h, C, H, GROUPS, mask_c, mask_h, dtype), e1, input_precision=precision)
        wide = g.to(tl.float32)
        f0 += tl.sum(wide * tl.load(up_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32), 1)
        f1 += tl.sum(wide * tl.load(up_bias_ptr + C + offs_c, mask=mask_c, other=0.0).to(tl.float32), 1)
        if NORM:
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask_m[:, None] & mask_c, other=0.0).to(tl.float32)
            mean += tl.sum(wide * x * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32), 1)
    a = tl.load(a_ptr + offs_m[:, None] * H + offs_h, mask=mask_m[:, None] & mask_h, other=0.0).to(tl.float32)
    tl.store(dw_ptr + offs_m * 2, (tl.sum(e0 * a, 1) + f0) * scale, mask=mask_m)
    tl.store(dw_ptr + offs_m * 2 + 1, (tl.sum(e1 * a, 1) + f1) * scale, mask=mask_m)
    w0 = tl.load(route_ptr + offs_m * 2, mask=mask_m, other=0.0).to(tl.float32)[:, None] * scale
    w1 = tl.load(route_ptr + offs_m * 2 + 1, mask=mask_m, other=0.0).to(tl.float32)[:, None] * scale
    da = w0 * e0 + w1 * e1
    if DROP:
        u = tl.rand(tl.load(seed_ptr), offs_m[:, None] * H + offs_h)
        da = tl.where(u >= p, da / (1.0 - p), 0.0)
        a *= 1.0 - p  # A y + a_0 where kept; elsewhere da is 0
    if NORM:
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        offset = tl.load(down_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        mean = (mean * rstd + tl.sum(da * (a - offset), 1)) / C
        tl.store(da_ptr + offs_m[:, None] * 2 * H + H + offs_h, da * rstd[:, None], mask=mask_m[:, None] & mask_h)
    tl.store(da_ptr + offs_m[:, None] * 2 * H + offs_h, da, mask=mask_m[:, None] & mask_h)
    if NEED_DX:
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            mask = mask_m[:, None] & mask_c
            down = tl.load(down_ptr + offs_h[:, None] * C + offs_c, mask=mask_h[:, None] & mask_c, other=0.0).to(dtype)
            dx = tl.dot(da.to(dtype), down, input_precision=precision)  # [BLOCK_M, BLOCK_C]
            dx += tl.load(g_ptr + offs_m[:, None] * C + offs_c, mask=mask, other=0.0).to(tl.float32)
            if NORM:
                x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask, other=0.0).to(tl.float32)
                dx *= tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
                dx = rstd[:, None] * (dx - x * (rstd * mean)[:, None])
            tl.store(dx_ptr + offs_m[:, None] * C + offs_c, dx.to(dtype), mask=mask)


@triton.jit
def _mm_adapter_dw_kernel(
    g_ptr, x_ptr, rstd_ptr, a_ptr, da_ptr, route_ptr, up_ptr, up_bias_ptr, down_ptr, gamma_ptr,
    M, C, H, stride_xm, stride_am, STEPS, scale,
    NEED_UP: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_GAMMA: tl.constexpr, GROUPS: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    pid_c, pid_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    offs_c, offs_h = pid_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    mask_c, mask_h = offs_c < C, offs_h < H
    up0, up1 = tl.zeros((BLOCK_C, BLOCK_H), tl.float32), tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    down = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    b0, b1, dgamma = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for step in range(0, STEPS):
        offs_m = (pid_s * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask, mask_a = mask_m[:, None] & mask_c, mask_m[:, None] & mask_h
        if NEED_UP or NEED_GAMMA:
            g = tl.load(g_ptr + offs_m[:, None] * C + offs_c, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
            wide = g.to(tl.float32)
        if NEED_DOWN or NEED_GAMMA:
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask, other=0.0)
        if NEED_UP:
            w0 = tl.load(route_ptr + offs_m * 2, mask=mask_m, other=0.0).to(tl.float32)[:, None] * scale
            w1 = tl.load(route_ptr + offs_m * 2 + 1, mask=mask_m, other=0.0).to(tl.float32)[:, None] * scale
            a = tl.load(a_ptr + offs_m[:, None] * H + offs_h, mask=mask_a, other=0.0).to(tl.float32)
            up0 = tl.dot(tl.trans(g), (a * w0).to(dtype), up0, input_precision=precision)  # [BLOCK_C, BLOCK_H]
            up1 = tl.dot(tl.trans(g), (a * w1).to(dtype), up1, input_precision=precision)
            b0 += tl.sum(wide * w0, 0)
            b1 += tl.sum(wide * w1, 0)
        if NEED_DOWN:
            da = tl.load(da_ptr + offs_m[:, None] * stride_am + offs_h, mask=mask_a, other=0.0).to(dtype)
            down = tl.dot(tl.trans(da), x, down, input_precision=precision)  # [BLOCK_H, BLOCK_C]
        if NEED_GAMMA:
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
            dgamma += tl.sum(wide * x.to(tl.float32) * rstd[:, None], 0)
    if NEED_UP:
        per = H // GROUPS
        mask = mask_c[:, None] & mask_h & (offs_h // per == (offs_c // (C // GROUPS))[:, None])
        up_ptrs = up_ptr + (pid_s * 2 * C + offs_c[:, None]) * per + offs_h % per
        tl.store(up_ptrs, up0, mask=mask)
        tl.store(up_ptrs + C * per, up1, mask=mask)
        tl.store(up_bias_ptr + pid_s * 2 * C + offs_c, b0, mask=mask_c)
        tl.store(up_bias_ptr + pid_s * 2 * C + C + offs_c, b1, mask=mask_c)
    if NEED_DOWN:
        tl.store(down_ptr + (pid_s * H + offs_h[:, None]) * C + offs_c, down, mask=mask_h[:, None] & mask_c)
    if NEED_GAMMA:
        tl.store(gamma_ptr + pid_s * C + offs_c, dgamma, mask=mask_c)


def _common(w_down, groups):
    H = w_down.shape[0]
    return {"H": H, "GROUPS": groups, "BLOCK_H": max(16, triton.next_power_of_2(H)), "IEEE": not torch.backends.cuda.matmul.allow_tf32}


def _rows(t):
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _per_token(routing, x):
    w = routing if routing.dim() == 3 else routing[:, None].expand(-1, x.shape[1], -1)
    return w.reshape(-1, 2).contiguous()


def norm_mm_adapter_fwd(x, gamma, eps, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    """(out, a, rstd); gamma None: no norm, rstd empty."""
    x2 = _rows(x)
    gamma, b_down = (None if t is None else t.contiguous() for t in (gamma, b_down))
    M, C = x2.shape
    out, a = x.new_empty(x.shape), x.new_empty(M, w_down.shape[0])
    rstd = x.new_empty(0 if gamma is None else M, dtype=torch.float32)
    if M:
        _mm_adapter_fwd_kernel[(triton.cdiv(M, BLOCK_M),)](
            x_ptr=x2, gamma_ptr=gamma, down_ptr=w_down.contiguous(), down_bias_ptr=b_down, up_ptr=w_up.contiguous(),
            up_bias_ptr=b_up.contiguous(), route_ptr=_per_token(routing, x), seed_ptr=seed, out_ptr=out, a_ptr=a, rstd_ptr=rstd,
            M=M, C=C, stride_xm=x2.stride(0), scale=scale, p=p, eps=eps, NORM=gamma is not None, DROP=p > 0.0, BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C[x2.element_size()], num_warps=WARPS, num_stages=3, **_common(w_down, groups),
        )  # fmt: skip
    return out, a, rstd


def norm_mm_adapter_bwd(g, x, gamma, rstd, a, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed,
                        need_x, need_gamma, need_down, need_up, need_routing):  # fmt: skip
    """(dx, dgamma, dw_down, db_down, dw_up, db_up, drouting); empty where not needed. gamma None: no norm."""
    # without rstd nothing below the adapter is wanted: no norm, or only w_up's, b_up's and routing's gradients
    g2, norm, route, common = _rows(g).contiguous(), rstd is not None, _per_token(routing, g), _common(w_down, groups)
    gamma, b_down = (None if t is None else t.contiguous() for t in (gamma, b_down))
    (M, C), H, per = g2.shape, w_down.shape[0], w_up.shape[2]
    x2 = g2 if x is None else _rows(x)
    empty = lambda like: g.new_empty(0, dtype=like.dtype)
    dx = g.new_empty(g.shape) if need_x else empty(g)
    da, dw = g.new_empty(M, 2, H, dtype=torch.float32), g.new_empty(M, 2, dtype=torch.float32)  # da, and rstd da
    spans = max(1, min(DW_SPANS, triton.cdiv(M, DW_ROWS)))
    partial = lambda need, *shape: g.new_empty(spans if need else 0, *shape, dtype=torch.float32)
    need_t = need_down or need_gamma
    up, up_bias, down, dgamma = (
        partial(n, *s) for n, s in ((need_up, (2, C, per)), (need_up, (2, C)), (need_t, (H, C)), (need_gamma, (C,)))
    )
    if M and (need_x or need_t or need_routing):
        _mm_adapter_dx_kernel[(triton.cdiv(M, BLOCK_M),)](
            g_ptr=g2, x_ptr=x2, gamma_ptr=gamma, rstd_ptr=rstd, a_ptr=a, down_ptr=w_down.contiguous(), down_bias_ptr=b_down,
            up_ptr=w_up.contiguous(), up_bias_ptr=b_up.contiguous(), route_ptr=route, seed_ptr=seed, dx_ptr=dx, da_ptr=da, dw_ptr=dw,
            M=M, C=C, stride_xm=x2.stride(0), scale=scale, p=p, NEED_DX=need_x, NORM=norm, DROP=p > 0.0, BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C[x2.element_size()], num_warps=WARPS, num_stages=3, **common,
        )  # fmt: skip
    if need_t or need_up:
        cols = DW_COLS[g.element_size()]
        _mm_adapter_dw_kernel[(triton.cdiv(C, cols), spans)](
            g_ptr=g2, x_ptr=x2, rstd_ptr=rstd, a_ptr=a, da_ptr=da[:, 1] if norm else da, route_ptr=route, up_ptr=up, up_bias_ptr=up_bias,
            down_ptr=down, gamma_ptr=dgamma, M=M, C=C, stride_xm=x2.stride(0), stride_am=2 * H,
            STEPS=triton.cdiv(triton.cdiv(M, DW_ROWS), spans), scale=scale, NEED_UP=need_up, NEED_DOWN=need_t, NEED_GAMMA=need_gamma,
            BLOCK_M=DW_ROWS, BLOCK_C=cols, num_warps=WARPS, num_stages=2, **common,
        )  # fmt: skip
    t = down.sum(0)
    dgamma = (dgamma.sum(0) + (w_down * t).sum(0)).to(gamma.dtype) if need_gamma else empty(g if gamma is None else gamma)
    dw_down = (t * gamma if norm else t).to(w_down.dtype) if need_down else empty(w_down)
    db_down = da[:, 0].sum(0).to(w_down.dtype) if need_down else empty(w_down)
    dw_up, db_up = (up.sum(0).to(w_up.dtype), up_bias.sum(0).to(b_up.dtype)) if need_up else (empty(w_up), empty(b_up))
    dw = dw.view(*g.shape[:-1], 2)
    drouting = (dw if routing.dim() == 3 else dw.sum(1)).to(routing.dtype) if need_routing else empty(routing)
    return dx, dgamma, dw_down, db_down, dw_up, db_up, drouting


def mm_adapter_fwd(x, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    return norm_mm_adapter_fwd(x, None, 0.0, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed)[:2]


def mm_adapter_bwd(g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_down, need_up, need_routing):
    needs = (need_x, False, need_down, need_up, need_routing)
    args = (g, x, None, None, a, w_down, None, w_up, b_up, routing, scale, groups, p, seed, *needs)
    dx, _, *rest = norm_mm_adapter_bwd(*args)
    return dx, *rest


def aot_cases():
    scalars = ("M", "C", "H", "stride_xm", "stride_am", "STEPS")
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        names = ("x", "g", "gamma", "down", "down_bias", "up", "up_bias", "route", "out", "a", "dx")
        types = {f"{n}_ptr": f"*{dtype}" for n in names} | {"seed_ptr": "*i64"} | {f"{n}_ptr": "*fp32" for n in ("rstd", "da", "dw")}
        types |= dict.fromkeys(scalars, "i32") | dict.fromkeys(("scale", "p", "eps"), "fp32")
        blocks = {"GROUPS": 2, "IEEE": True, "BLOCK_H": 16}
        rows = blocks | {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C[size], "DROP": False, "NEED_DX": True}
        columns = blocks | {"BLOCK_M": DW_ROWS, "BLOCK_C": DW_COLS[size], "NEED_UP": True, "NEED_DOWN": True}
        cases = [(f"norm={norm}/{name}", kernel, rows | {"NORM": norm}, types, 3) for norm in (False, True)
                 for name, kernel in (("fwd", _mm_adapter_fwd_kernel), ("dx", _mm_adapter_dx_kernel))]  # fmt: skip
        sums = types | {f"{n}_ptr": "*fp32" for n in ("up", "up_bias", "down", "gamma")}
        cases.append(("dw", _mm_adapter_dw_kernel, columns | {"NEED_GAMMA": False}, sums, 2))
        for name, kernel, constants, types_of, stages in cases:
            signature = {n: types_of[n] for n in kernel.arg_names if n in types_of}
            constants = {n: constants[n] for n in kernel.arg_names if n in constants}
            yield f"mm_adapter/{name}/{dtype}", kernel, signature, constants, {"num_warps": WARPS, "num_stages": stages}
