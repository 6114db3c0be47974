"""LaVIN's routed adapter, with or without the RMSNorm before it: one read of x and one write of x' in each direction.

    y = rms_norm(x) (or x)      a = D(A y + a_0)      x' = y + s (w_0 (B_0 a + b_0) + w_1 (B_1 a + b_1))        _mm_adapter_fwd_kernel
    e_i = s dx' B_i    dw_i = <e_i, a> + s <dx', b_i>    da = D'(w_0 e_0 + w_1 e_1)    dy = dx' + da A          _mm_adapter_dx_kernel
    dB_i = s dx'^T (w_i a)      db_i = s sum w_i dx'      T = (rstd da)^T x      dA = T gamma                   _mm_adapter_dw_kernel
    norm: dx = rstd (dy gamma - x_hat mean(dy gamma x_hat)); the mean needs no dy, for <da A, gamma x_hat> = <da, A y> = <da, a - a_0>
          dgamma = sum dx' x_hat + sum_j A_j T_j

Shapes: x [M, C]; A (w_down) [h, C]; B (w_up) [2, C, h / groups]; w [M / TOKENS, 2]; rstd [M]. The first two kernels own rows and pass over
C twice (the second time from L2). In the first pass the warps split the columns, 64 each, as a batch of products, so that none repeats
another's; both passes keep three tiles of loads under way. The third kernel owns columns and a span of rows, its sums in registers, one
partial per span; the fourth adds these up. Accumulation and statistics in float32.

Both experts are one product: column k stands for (group, expert, j), and SELECT [BLOCK_H, BLOCK_K], of zeros and ones, says which entry
of a it sees. A row of B sees the columns of its own group alone. In dB's product w_0 and w_1 are two more columns, for db.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels.card import ieee, padded, shared_memory, stages
from fastpeft.kernels.lora_branch import kept

PROGRAMS = 128  # a launch's least, where the rows give it: one for each multiprocessor of an H100
BLOCK_M, DW_ROWS, WARPS, STAGES = 16, 32, 4, 4
SUM = {"BLOCK_S": 16, "BLOCK": 256}


@triton.jit
def _expert(k, PER: tl.constexpr):
    """Which of the two experts column k belongs to."""
    return k // PER % 2


@triton.jit
def _entry(k, PER: tl.constexpr):
    """Which entry of a column k multiplies."""
    return k // (2 * PER) * PER + k % PER


@triton.jit
def _routes(route_ptr, offs_m, mask_m, TOKENS, scale):
    w_ptrs = route_ptr + offs_m // TOKENS * 2
    w0 = tl.load(w_ptrs, mask=mask_m, other=0.0).to(tl.float32) * scale
    w1 = tl.load(w_ptrs + 1, mask=mask_m, other=0.0).to(tl.float32) * scale
    return w0[:, None], w1[:, None]


@triton.jit(do_not_specialize=["M", "TOKENS"])
def _mm_adapter_fwd_kernel(
    x_ptr, gamma_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, route_ptr, seed_ptr, out_ptr, a_ptr, rstd_ptr,
    M, C, TOKENS, stride_xm, scale, p, eps,
    NORM: tl.constexpr, DROP: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    H: tl.constexpr = GROUPS * PER
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    offs_m, offs_h, offs_k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    mask_m, mask_h = offs_m < M, offs_h < H
    offs_w = tl.arange(0, WARPS)[:, None] * (BLOCK_C // WARPS) + tl.arange(0, BLOCK_C // WARPS)  # [WARPS, columns]
    a = tl.zeros((WARPS, BLOCK_M, BLOCK_H), tl.float32)
    square = tl.zeros((WARPS, BLOCK_M), tl.float32)
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        offs_c = c + offs_w
        mask_c = offs_c < C
        mask = mask_m[None, :, None] & mask_c[:, None, :]
        x = tl.load(x_ptr + offs_m[None, :, None] * stride_xm + offs_c[:, None, :], mask=mask, other=0.0)  # [WARPS, BLOCK_M, columns]
        down = tl.load(down_ptr + offs_h * C + offs_c[:, :, None], mask=mask_c[:, :, None] & mask_h, other=0.0)
        if NORM:
            square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 2)
            down = down.to(tl.float32) * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, :, None]
        a = tl.dot(x, down.to(dtype), a, input_precision=precision)
    a = tl.sum(a, 0)  # [BLOCK_M, BLOCK_H]
    if NORM:
        rstd = tl.rsqrt(tl.sum(square, 0) / C + eps)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
        a *= rstd[:, None]
    a += tl.load(down_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
    if DROP:
        counters = offs_m[:, None] * (BLOCK_H // 4) + tl.arange(0, BLOCK_H // 4)
        a = tl.where(kept(tl.load(seed_ptr), counters, p, a.shape), a / (1.0 - p), 0.0)
    tl.store(a_ptr + offs_m[:, None] * H + offs_h, a.to(dtype), mask=mask_m[:, None] & mask_h)
    w0, w1 = _routes(route_ptr, offs_m, mask_m, TOKENS, scale)
    select = (offs_h[:, None] == _entry(offs_k, PER)).to(tl.float32)
    mixed = (tl.dot(a, select, input_precision="ieee") * tl.where(_expert(offs_k, PER) == 0, w0, w1)).to(dtype)  # [BLOCK_M, BLOCK_K]
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask, other=0.0)
        ours = mask_c[:, None] & (offs_k // (2 * PER) == (offs_c // (C // GROUPS))[:, None])
        up = tl.load(up_ptr + _expert(offs_k, PER) * (C * PER) + offs_c[:, None] * PER + offs_k % PER, mask=ours, other=0.0).to(dtype)
        y = x.to(tl.float32)
        if NORM:
            y *= rstd[:, None] * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        y += w0 * tl.load(up_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        y += w1 * tl.load(up_bias_ptr + C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        y = tl.dot(mixed, tl.trans(up), y, input_precision=precision)  # [BLOCK_M, BLOCK_C]
        tl.store(out_ptr + offs_m[:, None] * C + offs_c, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M", "TOKENS"])
def _mm_adapter_dx_kernel(
    g_ptr, x_ptr, gamma_ptr, rstd_ptr, a_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, route_ptr, seed_ptr, dx_ptr, da_ptr, dw_ptr,
    M, C, TOKENS, stride_xm, scale, p,
    NEED_DX: tl.constexpr, NORM: tl.constexpr, DROP: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    H: tl.constexpr = GROUPS * PER
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    offs_m, offs_h, offs_k = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    mask_m, mask_h = offs_m < M, offs_h < H
    offs_w = tl.arange(0, WARPS)[:, None] * (BLOCK_C // WARPS) + tl.arange(0, BLOCK_C // WARPS)  # [WARPS, columns]
    e = tl.zeros((WARPS, BLOCK_M, BLOCK_K), tl.float32)
    f0, f1, mean = (tl.zeros((WARPS, BLOCK_M), tl.float32),) * 3
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        offs_c = c + offs_w
        mask_c = offs_c < C
        mask = mask_m[None, :, None] & mask_c[:, None, :]
        g = tl.load(g_ptr + offs_m[None, :, None] * C + offs_c[:, None, :], mask=mask, other=0.0)  # [WARPS, BLOCK_M, columns]
        ours = mask_c[:, :, None] & (offs_k // (2 * PER) == (offs_c // (C // GROUPS))[:, :, None])
        up = tl.load(up_ptr + _expert(offs_k, PER) * (C * PER) + offs_c[:, :, None] * PER + offs_k % PER, mask=ours, other=0.0).to(dtype)
        e = tl.dot(g, up, e, input_precision=precision)
        wide = g.to(tl.float32)
        f0 += tl.sum(wide * tl.load(up_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None, :], 2)
        f1 += tl.sum(wide * tl.load(up_bias_ptr + C + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None, :], 2)
        if NORM:
            x = tl.load(x_ptr + offs_m[None, :, None] * stride_xm + offs_c[:, None, :], mask=mask, other=0.0).to(tl.float32)
            mean += tl.sum(wide * x * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None, :], 2)
    e = tl.sum(e, 0)  # [BLOCK_M, BLOCK_K]
    first = _expert(offs_k, PER) == 0
    mask_a = mask_m[:, None] & (offs_k < 2 * H)
    each = e * tl.load(a_ptr + offs_m[:, None] * H + _entry(offs_k, PER), mask=mask_a, other=0.0).to(tl.float32)
    tl.store(dw_ptr + offs_m * 2, (tl.sum(tl.where(first, each, 0.0), 1) + tl.sum(f0, 0)) * scale, mask=mask_m)
    tl.store(dw_ptr + offs_m * 2 + 1, (tl.sum(tl.where(first, 0.0, each), 1) + tl.sum(f1, 0)) * scale, mask=mask_m)
    w0, w1 = _routes(route_ptr, offs_m, mask_m, TOKENS, scale)
    select = (offs_h == _entry(offs_k, PER)[:, None]).to(tl.float32)
    da = tl.dot(e * tl.where(first, w0, w1), select, input_precision="ieee")  # [BLOCK_M, BLOCK_H]
    if DROP:
        counters = offs_m[:, None] * (BLOCK_H // 4) + tl.arange(0, BLOCK_H // 4)
        da = tl.where(kept(tl.load(seed_ptr), counters, p, da.shape), da / (1.0 - p), 0.0)
    if NORM:
        a = tl.load(a_ptr + offs_m[:, None] * H + offs_h, mask=mask_m[:, None] & mask_h, other=0.0).to(tl.float32)
        if DROP:
            a *= 1.0 - p  # A y + a_0 where kept; elsewhere da is 0
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        offset = tl.load(down_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        shift = rstd * (tl.sum(mean, 0) * rstd + tl.sum(da * (a - offset), 1)) / C
    tl.store(da_ptr + offs_m[:, None] * H + offs_h, da, mask=mask_m[:, None] & mask_h)
    if NEED_DX:
        da = da.to(dtype)
        for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            mask = mask_m[:, None] & mask_c
            down = tl.load(down_ptr + offs_h[:, None] * C + offs_c, mask=mask_h[:, None] & mask_c, other=0.0).to(dtype)
            g = tl.load(g_ptr + offs_m[:, None] * C + offs_c, mask=mask, other=0.0)
            dx = tl.dot(da, down, g.to(tl.float32), input_precision=precision)  # [BLOCK_M, BLOCK_C]
            if NORM:
                x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask, other=0.0).to(tl.float32)
                dx *= tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
                dx = rstd[:, None] * (dx - x * shift[:, None])
            tl.store(dx_ptr + offs_m[:, None] * C + offs_c, dx.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M", "TOKENS", "STEPS"])
def _mm_adapter_dw_kernel(
    g_ptr, x_ptr, rstd_ptr, a_ptr, da_ptr, route_ptr, sums_ptr, gamma_ptr,
    M, C, TOKENS, stride_xm, STEPS, scale,
    NEED_UP: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_GAMMA: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr,
    PER: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_c, pid_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    H: tl.constexpr = GROUPS * PER
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    offs_c, offs_h, offs_k = pid_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    mask_c, mask_h = offs_c < C, offs_h < H
    expert = tl.where(offs_k < 2 * H, _expert(offs_k, PER), offs_k - 2 * H)
    up, down = tl.zeros((BLOCK_K, BLOCK_C), tl.float32), tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    down_bias, dgamma = tl.zeros((BLOCK_H,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for step in range(0, STEPS):
        offs_m = (pid_s * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_c
        if NEED_UP or NEED_GAMMA:
            g = tl.load(g_ptr + offs_m[:, None] * C + offs_c, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
        if NEED_DOWN or NEED_GAMMA:
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c, mask=mask, other=0.0)
        if NORM:
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        if NEED_UP:
            mask_a = mask_m[:, None] & (offs_k < 2 * H)
            a = tl.load(a_ptr + offs_m[:, None] * H + _entry(offs_k, PER), mask=mask_a, other=0.0)  # fetched ahead, as no 1 beside it is
            a = tl.where(offs_k < 2 * H, a.to(tl.float32), 1.0)  # the columns of b_0 and b_1
            w0, w1 = _routes(route_ptr, offs_m, mask_m, TOKENS, 1.0)
            mixed = (a * tl.where(expert == 0, w0, tl.where(expert == 1, w1, 0.0))).to(dtype)  # [BLOCK_M, BLOCK_K]
            up = tl.dot(tl.trans(mixed), g, up, input_precision=precision)
        if NEED_DOWN:
            da = tl.load(da_ptr + offs_m[:, None] * H + offs_h, mask=mask_m[:, None] & mask_h, other=0.0)  # [BLOCK_M, BLOCK_H]
            down_bias += tl.sum(da, 0)
            if NORM:
                da *= rstd[:, None]
            down = tl.dot(tl.trans(da.to(dtype)), x, down, input_precision=precision)
        if NEED_GAMMA:
            dgamma += tl.sum(g.to(tl.float32) * x.to(tl.float32) * rstd[:, None], 0)
    # a span's sums lie one after another: dB [2, C, PER], db [2, C], T [H, C], da_0 [H]
    sums_ptr += pid_s * ((2 * PER + 2 + H) * C + H)
    if NEED_UP:
        ours = offs_k // (2 * PER) == (offs_c // (C // GROUPS))[:, None]
        up_ptrs = sums_ptr + _expert(offs_k, PER) * (C * PER) + offs_c[:, None] * PER + offs_k % PER
        tl.store(up_ptrs, tl.trans(up) * scale, mask=mask_c[:, None] & ours & (offs_k < 2 * H))
        up_ptrs = sums_ptr + (2 * PER + offs_k[:, None] - 2 * H) * C + offs_c
        tl.store(up_ptrs, up * scale, mask=(offs_k >= 2 * H)[:, None] & (offs_k < 2 * H + 2)[:, None] & mask_c)
    sums_ptr += (2 * PER + 2) * C
    if NEED_DOWN:
        tl.store(sums_ptr + offs_h[:, None] * C + offs_c, down, mask=mask_h[:, None] & mask_c)
        if pid_c == 0:
            tl.store(sums_ptr + H * C + offs_h, down_bias, mask=mask_h)
    if NEED_GAMMA:
        tl.store(gamma_ptr + pid_s * C + offs_c, dgamma, mask=mask_c)


@triton.jit(do_not_specialize=["SPANS"])
def _mm_adapter_sum_kernel(
    sums_ptr, gamma_ptr, up_ptr, up_bias_ptr, down_ptr, down_bias_ptr, C, SPANS,
    NEED_UP: tl.constexpr, NEED_DOWN: tl.constexpr, NORM: tl.constexpr, H: tl.constexpr, PER: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = (2 * PER + 2 + H) * C + H
    total = tl.zeros((BLOCK,), tl.float32)
    for span in range(0, SPANS, BLOCK_S):
        offs_s = span + tl.arange(0, BLOCK_S)
        mask = (offs_s < SPANS)[:, None] & (offs < size)
        total += tl.sum(tl.load(sums_ptr + offs_s[:, None].to(tl.int64) * size + offs, mask=mask, other=0.0), 0)  # [BLOCK]
    if NEED_UP:
        tl.store(up_ptr + offs, total.to(up_ptr.dtype.element_ty), mask=offs < 2 * PER * C)
        offs_b = offs - 2 * PER * C
        tl.store(up_bias_ptr + offs_b, total.to(up_bias_ptr.dtype.element_ty), mask=(offs_b >= 0) & (offs_b < 2 * C))
    if NEED_DOWN:
        offs_d = offs - (2 * PER + 2) * C
        mask = (offs_d >= 0) & (offs_d < H * C)
        offs_b = offs_d - H * C
        tl.store(down_bias_ptr + offs_b, total.to(down_bias_ptr.dtype.element_ty), mask=(offs_b >= 0) & (offs_b < H))
        if NORM:
            total *= tl.load(gamma_ptr + offs_d % C, mask=mask, other=0.0).to(tl.float32)
        tl.store(down_ptr + offs_d, total.to(down_ptr.dtype.element_ty), mask=mask)


def _common(w_down, w_up, groups, routing, x):
    H = w_down.shape[0]
    return {"PER": w_up.shape[2], "GROUPS": groups, "BLOCK_H": padded(H), "BLOCK_K": padded(2 * H),
            "TOKENS": x.shape[1] if routing.dim() == 2 else 1, "IEEE": ieee()}  # fmt: skip


def _tiles(H: int, itemsize: int, norm: bool, shared: int) -> dict:
    """At h = 8 12 KB a stage of x and weights together."""
    rows = padded(2 * H)
    columns = max(64, 8192 // (rows * itemsize))
    tile = (BLOCK_M * (1 + norm) + rows + 3) * columns * itemsize  # x, with a norm in backward dx' too, weights, three parameters
    fixed = 4 * (padded(H) + BLOCK_M) * rows  # SELECT, and what meets it
    most = stages(STAGES, tile, fixed, shared)
    return {"BLOCK_M": BLOCK_M, "BLOCK_C": columns, "WARPS": WARPS, "STAGES": most, "num_warps": WARPS}


def _dw_columns(H: int, itemsize: int) -> int:
    return max(32, min(256, 8192 // padded(2 * H + 2)) // itemsize)


def _rows(t):
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _dense(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def norm_mm_adapter_fwd(x, gamma, eps, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    """(out, a, rstd); gamma None: no norm, rstd empty."""
    x2 = _rows(x)
    gamma, w_down, b_down, w_up, b_up, routing = _dense(gamma, w_down, b_down, w_up, b_up, routing)
    M, C = x2.shape
    out, a = x.new_empty(x.shape), x.new_empty(M, w_down.shape[0])
    rstd = x.new_empty(0 if gamma is None else M, dtype=torch.float32)
    if M:
        _mm_adapter_fwd_kernel[(triton.cdiv(M, BLOCK_M),)](
            x_ptr=x2, gamma_ptr=gamma, down_ptr=w_down, down_bias_ptr=b_down, up_ptr=w_up, up_bias_ptr=b_up, route_ptr=routing,
            seed_ptr=seed, out_ptr=out, a_ptr=a, rstd_ptr=rstd, M=M, C=C, stride_xm=x2.stride(0), scale=scale, p=p, eps=eps,
            NORM=gamma is not None, DROP=p > 0.0, **_tiles(a.shape[1], x2.element_size(), gamma is not None, shared_memory(x2)),
            **_common(w_down, w_up, groups, routing, x),
        )  # fmt: skip
    return out, a, rstd


def _weight_grads(g2, x2, rstd, a, da, routing, gamma, grads, scale, common, need_up, need_t, need_gamma):
    """Fills ``grads``, the parameters' gradients, by partial sums over spans of rows; returns dgamma's part of each span, [spans, C]."""
    dw_up, db_up, dw_down, db_down = grads
    (M, C), H, per, norm = g2.shape, da.shape[1], common["PER"], rstd is not None
    width, rows = _dw_columns(H, g2.element_size()), triton.cdiv(M, DW_ROWS)
    columns = triton.cdiv(C, width)
    steps = max(1, triton.cdiv(rows, max(1, 3 * PROGRAMS // columns)))  # three share a multiprocessor: while one waits, others read
    spans, size = triton.cdiv(rows, steps), (2 * per + 2 + H) * C + H
    sums = g2.new_empty(spans, size, dtype=torch.float32)
    dgamma = g2.new_empty(spans if need_gamma else 0, C, dtype=torch.float32)
    flags = {"NEED_UP": need_up, "NEED_DOWN": need_t, "NORM": norm}
    if spans:
        _mm_adapter_dw_kernel[(columns, spans)](
            g_ptr=g2, x_ptr=x2, rstd_ptr=rstd, a_ptr=a, da_ptr=da, route_ptr=routing, sums_ptr=sums, gamma_ptr=dgamma, M=M, C=C,
            stride_xm=x2.stride(0), STEPS=steps, scale=scale, NEED_GAMMA=need_gamma, BLOCK_M=DW_ROWS, BLOCK_C=width,
            num_warps=WARPS, num_stages=STAGES if H <= 32 else 2, **flags, **common | {"BLOCK_K": padded(2 * H + 2)},
        )  # fmt: skip
    _mm_adapter_sum_kernel[(triton.cdiv(size, SUM["BLOCK"]),)](
        sums_ptr=sums, gamma_ptr=gamma, up_ptr=dw_up, up_bias_ptr=db_up, down_ptr=dw_down, down_bias_ptr=db_down, C=C,
        SPANS=spans, H=H, PER=per, num_warps=4, **SUM, **flags | {"NORM": norm and not need_gamma},
    )  # fmt: skip
    return dgamma


def norm_mm_adapter_bwd(g, x, gamma, rstd, a, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed,
                        need_x, need_gamma, need_down, need_up, need_routing):  # fmt: skip
    """(dx, dgamma, dw_down, db_down, dw_up, db_up, drouting); empty where not needed. gamma None: no norm."""
    # without rstd nothing below the adapter is wanted: no norm, or only w_up's, b_up's and routing's gradients
    g2, norm = _rows(g).contiguous(), rstd is not None
    gamma, w_down, b_down, w_up, b_up, routing = _dense(gamma, w_down, b_down, w_up, b_up, routing)
    common = _common(w_down, w_up, groups, routing, g)
    (M, C), H, itemsize = g2.shape, w_down.shape[0], g.element_size()
    x2 = g2 if x is None else _rows(x)
    need_t = need_down or need_gamma
    new = lambda need, like, dtype=None: g.new_empty(like.shape if need and like is not None else 0, dtype=dtype or like.dtype)
    dx, dw_up, db_up = new(need_x, g), new(need_up, w_up), new(need_up, b_up)
    dw_down = new(need_t, w_down, torch.float32 if need_gamma else None)  # T itself, where dgamma is made of it
    db_down = g.new_empty(H if need_t else 0, dtype=w_down.dtype)
    da, dw = g.new_empty(M, H, dtype=torch.float32), g.new_empty(M, 2, dtype=torch.float32)
    if M and (need_x or need_t or need_routing):
        _mm_adapter_dx_kernel[(triton.cdiv(M, BLOCK_M),)](
            g_ptr=g2, x_ptr=x2, gamma_ptr=gamma, rstd_ptr=rstd, a_ptr=a, down_ptr=w_down, down_bias_ptr=b_down, up_ptr=w_up,
            up_bias_ptr=b_up, route_ptr=routing, seed_ptr=seed, dx_ptr=dx, da_ptr=da, dw_ptr=dw, M=M, C=C, stride_xm=x2.stride(0),
            scale=scale, p=p, NEED_DX=need_x, NORM=norm, DROP=p > 0.0, **_tiles(H, itemsize, norm, shared_memory(g2)), **common,
        )  # fmt: skip
    dgamma = g.new_empty(0)
    if need_t or need_up:
        dgamma = _weight_grads(g2, x2, rstd, a, da, routing, gamma, (dw_up, db_up, dw_down, db_down), scale, common,
                               need_up, need_t, need_gamma)  # fmt: skip
    if need_gamma:
        dgamma = (dgamma.sum(0) + (w_down * dw_down).sum(0)).to(gamma.dtype)
        dw_down = (dw_down * gamma).to(w_down.dtype)
    if not need_down:
        dw_down, db_down = (g.new_empty(0, dtype=w_down.dtype) for _ in range(2))
    drouting = g.new_empty(0, dtype=routing.dtype)
    if need_routing:
        dw = dw.view(*g.shape[:-1], 2)
        drouting = (dw if routing.dim() == 3 else dw.sum(1)).to(routing.dtype)
    return dx, dgamma, dw_down, db_down, dw_up, db_up, drouting


def mm_adapter_fwd(x, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed):
    return norm_mm_adapter_fwd(x, None, 0.0, w_down, b_down, w_up, b_up, routing, scale, groups, p, seed)[:2]


def mm_adapter_bwd(g, x, a, w_down, w_up, b_up, routing, scale, groups, p, seed, need_x, need_down, need_up, need_routing):
    needs = (need_x, False, need_down, need_up, need_routing)
    args = (g, x, None, None, a, w_down, None, w_up, b_up, routing, scale, groups, p, seed, *needs)
    dx, _, *rest = norm_mm_adapter_bwd(*args)
    return dx, *rest


def aot_cases(shared: int):
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        names = ("x", "g", "gamma", "down", "down_bias", "up", "up_bias", "route", "out", "a", "dx")
        types = {f"{n}_ptr": f"*{dtype}" for n in names} | {f"{n}_ptr": "*fp32" for n in ("rstd", "da", "dw", "sums")}
        types |= {"seed_ptr": "*i64"} | dict.fromkeys(("M", "C", "TOKENS", "stride_xm", "STEPS", "SPANS"), "i32")
        types |= dict.fromkeys(("scale", "p", "eps"), "fp32")

        def constants(H, norm, drop=False, size=size):
            blocks = {"GROUPS": 2, "PER": H // 2, "H": H, "BLOCK_H": padded(H), "NORM": norm}
            blocks |= dict.fromkeys(("IEEE", "NEED_UP", "NEED_DOWN"), True)
            rows = blocks | _tiles(H, size, norm, shared) | {"BLOCK_K": padded(2 * H), "DROP": drop, "NEED_DX": True}
            columns = {"BLOCK_M": DW_ROWS, "BLOCK_C": _dw_columns(H, size), "BLOCK_K": padded(2 * H + 2), "NEED_GAMMA": False}
            return rows, blocks | columns | {"STAGES": STAGES if H <= 32 else 2}

        cases = []
        for norm in (False, True):
            rows, columns = constants(8, norm)
            cases += [(f"norm={norm}/fwd", _mm_adapter_fwd_kernel, rows), (f"norm={norm}/dx", _mm_adapter_dx_kernel, rows)]
            cases.append((f"norm={norm}/dw", _mm_adapter_dw_kernel, columns))
        cases.append(("sum", _mm_adapter_sum_kernel, columns | SUM))
        rows, columns = constants(64, True, drop=True)
        cases += [("h64/fwd", _mm_adapter_fwd_kernel, rows), ("h64/dx", _mm_adapter_dx_kernel, rows)]
        cases.append(("h64/dw", _mm_adapter_dw_kernel, columns))
        for name, kernel, given in cases:
            signature = {n: types[n] for n in kernel.arg_names if n in types}
            options = {"num_warps": WARPS, "num_stages": given["STAGES"]}
            yield f"mm_adapter/{name}/{dtype}", kernel, signature, {n: given[n] for n in kernel.arg_names if n in given}, options
