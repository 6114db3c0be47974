"""The skinny half of a LoRA layer: everything of it but the product with W, at the rate memory gives.

    S = D(x) A^T, and y_0 = b + s S B^T         _lora_rows_kernel: a program owns rows, over all their columns
    dS = s dy B                                 the same over dy, where dB is not wanted or not to be had in one pass
    dS = s dy B, dB^T = s S^T dy                _lora_pass_kernel over dy: DOWN and OUTER
    dA = dS^T D(x), dx_0 = D'(dS A)             over x: OUTER and UP
    y_0 = b + s S B^T                           over nothing: UP alone
    dA, dB from their parts                     _lora_sum_kernel: one launch, in the parameters' dtypes

A program of the pass owns a block of columns and a span of rows: what is summed over rows stays in registers, one partial per span; what
is summed over columns leaves in one partial per block of columns. Both are few (at 8192 x 4096 and r = 8 a ninth of dy's bytes
together; a program per 64 rows wrote a quarter of dy's for dB alone, and as much for dA), and summed in a fixed order.

Shapes: x [M, C]; T (S, dS) [R, M]; F (A, B^T) [R, C]. Accumulation in float32; operands of tl.dot in x's dtype. The rank is padded to
16, the least a tensor core takes. Dropout: Philox on (seed + branch, row * columns + column), the same in both passes.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels.card import ieee, padded, shared_memory, stages

SUM = {"BLOCK_S": 32, "BLOCK": 64}
SHARES = 4  # of the columns, one for each warp
MOST_SPANS = 65535  # programs along any axis of a grid but the first
LEAST_STEPS = 4  # of a span: what it leaves behind is then small beside what it reads
PROGRAMS = 128  # one for each multiprocessor of an H100, each with 48 to 64 KB of loads under way: 3 TB/s at 700 ns ask for 16


@triton.jit
def kept(seed, counters, p, shape: tl.constexpr):
    """Which elements of a tile of this shape dropout keeps. One call of Philox gives four neighbouring columns their numbers: ``counters``
    has a quarter of the tile's columns, each row's own numbers. In 32 bits: of 64 each of its forty products is several instructions.
    Compared as integers: p 2^32 against all 32 bits."""
    low, high = counters.to(tl.uint32), (counters.to(tl.int64) >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, low * 0, low * 0)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), shape)
    return bits.to(tl.uint32, bitcast=True) >= tl.cast(p * 4294967296.0, tl.uint32)


@triton.jit
def dropped(x, seed_ptr, index, counters, p):
    keep = kept(tl.load(seed_ptr) + index, counters, p, x.shape)
    return tl.where(keep, x.to(tl.float32) * (1.0 / (1.0 - p)), 0.0)


@triton.jit(do_not_specialize=["M", "index"])
def _lora_rows_kernel(
    x_ptr, a_ptr, b_ptr, bias_ptr, seed_ptr, s_ptr, up_ptr,
    M, K, N, stride_xm, stride_ar, stride_ak, stride_bn, stride_br, stride_sr, scaling, up_scaling, p, index, R: tl.constexpr,
    UP: tl.constexpr, DROP: tl.constexpr, HAS_BIAS: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """S = scaling D(x) A^T, and from it UP = bias + up_scaling S B^T."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = x_ptr.dtype.element_ty
    offs_m, offs_r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    # a batch of products, each over a share of the columns: as one of 16 x 16 outputs, four warps would repeat two warps' work
    offs_w = tl.arange(0, SHARES)[:, None] * (BLOCK_K // SHARES) + tl.arange(0, BLOCK_K // SHARES)  # [SHARES, columns]
    quarter = tl.arange(0, SHARES)[:, None] * (BLOCK_K // SHARES // 4) + tl.arange(0, BLOCK_K // SHARES // 4)
    s = tl.zeros((SHARES, BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + offs_w
        mask_k = offs_k < K
        mask = mask_m[None, :, None] & mask_k[:, None, :]
        x = tl.load(x_ptr + offs_m[None, :, None] * stride_xm + offs_k[:, None, :], mask=mask, other=0.0)  # [SHARES, BLOCK_M, columns]
        a_ptrs = a_ptr + offs_r * stride_ar + offs_k[:, :, None] * stride_ak
        a = tl.load(a_ptrs, mask=mask_k[:, :, None] & mask_r, other=0.0).to(dtype)
        if DROP:
            counters = offs_m[None, :, None] * tl.cdiv(K, 4) + k // 4 + quarter[:, None, :]
            x = dropped(x, seed_ptr, index, counters, p).to(dtype)
        s = tl.dot(x, a, s, input_precision=precision)
    rows = (tl.sum(s, 0) * scaling).to(s_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R]
    tl.store(s_ptr + offs_r.to(tl.int64) * stride_sr + offs_m[:, None], rows, mask=mask_m[:, None] & mask_r)
    if UP:
        rows = tl.broadcast_to(rows.to(dtype)[None, :, :], (SHARES, BLOCK_M, BLOCK_R))
        for n in range(0, N, BLOCK_K):
            offs_n = n + offs_w
            mask_n = offs_n < N
            b_ptrs = b_ptr + offs_r[None, :, None] * stride_br + offs_n[:, None, :] * stride_bn
            b = tl.load(b_ptrs, mask=mask_r[None, :, None] & mask_n[:, None, :], other=0.0).to(dtype)
            up = tl.dot(rows, b, input_precision=precision) * up_scaling  # [SHARES, BLOCK_M, columns]
            if HAS_BIAS:
                up += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None, :]
            up_ptrs = up_ptr + offs_m[None, :, None] * N + offs_n[:, None, :]
            tl.store(up_ptrs, up.to(dtype), mask=mask_m[None, :, None] & mask_n[:, None, :])


@triton.jit(do_not_specialize=["M", "STEPS", "index"])
def _lora_pass_kernel(
    x_ptr, t_ptr, f_ptr, bias_ptr, seed_ptr, outer_ptr, down_ptr, up_ptr,
    M, C, STEPS, stride_xm, stride_tr, stride_fr, stride_fc, scaling, p, index, R: tl.constexpr,
    OUTER: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, DROP: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    IEEE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUTER: scaling T^T D(x). DOWN: scaling x F^T. UP: bias + scaling D(T F). T [M, R] (its rows at stride_tr), F [R, C]."""
    pid_c, pid_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = x_ptr.dtype.element_ty
    if EVEN:  # T's mask is then alike for 16 rows: loads of 16 bytes, fetched ahead; numbers of 2 bytes alone are not
        M = M // 16 * 16
    # every warp has a share of the columns to itself: DOWN as one product of 16 outputs a row was made by each of eight warps again
    offs_w = tl.arange(0, SHARES)[:, None] * (BLOCK_C // SHARES) + tl.arange(0, BLOCK_C // SHARES)  # [SHARES, columns]
    quarter = tl.arange(0, SHARES)[:, None] * (BLOCK_C // SHARES // 4) + tl.arange(0, BLOCK_C // SHARES // 4)
    offs_c, offs_r = pid_c * BLOCK_C + offs_w, tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    if DOWN:
        f_ptrs = f_ptr + offs_r * stride_fr + offs_c[:, :, None] * stride_fc
        f_down = tl.load(f_ptrs, mask=mask_c[:, :, None] & mask_r, other=0.0).to(dtype)  # [SHARES, columns, BLOCK_R]
    if UP:
        f_ptrs = f_ptr + offs_r[None, :, None] * stride_fr + offs_c[:, None, :] * stride_fc
        f_up = tl.load(f_ptrs, mask=mask_r[None, :, None] & mask_c[:, None, :], other=0.0).to(dtype)  # [SHARES, BLOCK_R, columns]
    outer = tl.zeros((SHARES, BLOCK_R, BLOCK_C // SHARES), tl.float32)
    offs_t = offs_r.to(tl.int64) * stride_tr  # 128 ranks of 17 million rows are more than 32 bits hold
    for step in tl.range(0, STEPS, num_stages=STAGES):
        offs_m = (pid_s * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[None, :, None] & mask_c[:, None, :]
        counters = offs_m[None, :, None] * tl.cdiv(C, 4) + pid_c * (BLOCK_C // 4) + quarter[:, None, :]
        if OUTER or DOWN:
            x_ptrs = x_ptr + offs_m[None, :, None] * stride_xm + offs_c[:, None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0)  # [SHARES, BLOCK_M, columns]
        if OUTER:
            t = tl.load(t_ptr + offs_t[:, None] + offs_m, mask=mask_r[:, None] & mask_m, other=0.0).to(dtype)
        if DOWN:
            part = tl.sum(tl.dot(x, f_down, input_precision=precision), 0) * scaling  # [BLOCK_M, BLOCK_R]
            tl.store(down_ptr + (pid_c * R + offs_r) * M + offs_m[:, None], part, mask=mask_m[:, None] & mask_r)
        if UP:
            # read apart from t: one load in two layouts is not fetched ahead
            rows = tl.load(t_ptr + offs_t + offs_m[:, None], mask=mask_m[:, None] & mask_r, other=0.0).to(dtype)
            rows = tl.broadcast_to(rows[None, :, :], (SHARES, BLOCK_M, BLOCK_R))
            up = tl.dot(rows, f_up, input_precision=precision) * scaling  # [SHARES, BLOCK_M, columns]
            if DROP:
                up = dropped(up, seed_ptr, index, counters, p)
            if HAS_BIAS:
                up += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None, :]
            up_ptrs = up_ptr + offs_m[None, :, None] * C + offs_c[:, None, :]
            if ACCUMULATE:
                up += tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(up_ptrs, up.to(dtype), mask=mask)
        if OUTER:
            if DROP:
                x = dropped(x, seed_ptr, index, counters, p).to(dtype)
            t = tl.broadcast_to(t[None, :, :], (SHARES, BLOCK_R, BLOCK_M))
            outer = tl.dot(t, x, outer, input_precision=precision)  # [SHARES, BLOCK_R, columns]
    if OUTER:
        outer_ptrs = outer_ptr + (pid_s * R + offs_r[None, :, None]) * C + offs_c[:, None, :]
        tl.store(outer_ptrs, outer * scaling, mask=mask_r[None, :, None] & mask_c[:, None, :])


@triton.jit
def _sum(parts_ptr, out_ptr, offs, SPANS, stride_s, R, C, stride_r, stride_c, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for span in range(0, SPANS, BLOCK_S):
        offs_s = span + tl.arange(0, BLOCK_S)
        mask = (offs_s < SPANS)[:, None] & (offs < R * C)
        total += tl.sum(tl.load(parts_ptr + offs_s[:, None].to(tl.int64) * stride_s + offs, mask=mask, other=0.0), 0)  # [BLOCK]
    out_ptrs = out_ptr + (offs // C) * stride_r + (offs % C) * stride_c
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=offs < R * C)


@triton.jit(do_not_specialize=["SPANS_A", "SPANS_B"])
def _lora_sum_kernel(
    da_ptr, db_ptr, a_ptr, b_ptr, SPANS_A, SPANS_B, stride_as, stride_bs, R, K, N,
    FIRST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dA [R, K] and dB [N, R] from their partial sums [spans, R, columns]."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) + FIRST == 0:
        _sum(da_ptr, a_ptr, offs, SPANS_A, stride_as, R, K, K, 1, BLOCK_S, BLOCK)
    else:
        _sum(db_ptr, b_ptr, offs, SPANS_B, stride_bs, R, N, 1, R, BLOCK_S, BLOCK)


def _down_blocks(M: int, R: int, itemsize: int, shared: int) -> dict:
    """As many rows a program as leave PROGRAMS programs, so that two share a multiprocessor at 8192 rows; tiles of x and A up to 24 KB
    together, three of four stages under way. tl.dot takes no share of fewer than 16 columns."""
    rows = 32 if M >= 32 * PROGRAMS and R <= 64 else 16
    both = (rows + padded(R)) * itemsize
    columns = max(16 * SHARES, 1 << ((24576 // both).bit_length() - 1))
    tile = {"BLOCK_M": rows, "BLOCK_K": columns, "R": R, "BLOCK_R": padded(R), "SHARES": SHARES}
    return tile | {"num_warps": SHARES, "num_stages": stages(4, columns * both, SHARES * rows * padded(R) * 4, shared)}


def project_down(x, A, s, scaling=1.0, *, B=None, up=None, bias=None, up_scaling=1.0, p=0.0, seed=None, index=0):
    """s [R, M] = scaling A D(x)^T, with dropout ``p``; where ``up`` [M, N] is given, up = bias + up_scaling s^T B^T, B [N, R], in the same
    launch."""
    (M, K), blocks = x.shape, _down_blocks(x.shape[0], A.shape[0], x.element_size(), shared_memory(x))
    if M:
        _lora_rows_kernel[(triton.cdiv(M, blocks["BLOCK_M"]),)](
            x_ptr=x, a_ptr=A, b_ptr=B, bias_ptr=bias, seed_ptr=seed, s_ptr=s, up_ptr=up, M=M, K=K, N=0 if up is None else up.shape[1],
            stride_xm=x.stride(0), stride_ar=A.stride(0), stride_ak=A.stride(1), stride_bn=0 if B is None else B.stride(0),
            stride_br=1 if B is None else B.stride(1), stride_sr=s.stride(0), scaling=scaling, up_scaling=up_scaling, p=p, index=index,
            UP=up is not None, DROP=p > 0.0, HAS_BIAS=bias is not None, IEEE=ieee(), **blocks,
        )  # fmt: skip


def _pass_blocks(R: int, x_size: int, t_size: int, shared: int, *, outer=False, down=False, up=False, drop=False) -> dict:
    """Tiles of 16 KB, or of 8 KB and less where what is added to dx takes registers too; four stages. Three or more programs share an
    H100's multiprocessor: with one of eight warps each wait was one for all, and dy's pass took 59 us where a copy of dy took 37."""
    columns = (64 if R > 64 else 128 if R > 32 or (outer and up and x_size > 2) else 256) * 2 // x_size
    rows = 16 if up or x_size > 2 or R > 32 else 32
    tile = (outer or down) * rows * columns * x_size + (outer + up) * padded(R) * rows * t_size  # of x, and of T in each of its layouts
    fixed = (down or up) * padded(R) * columns * x_size + up * rows * columns * x_size
    fixed += SHARES * rows * padded(R) * (down * 4 + up * x_size)  # what shares add up to, or all of them read
    blocks = {"BLOCK_M": rows, "BLOCK_C": columns, "R": R, "BLOCK_R": padded(R), "SHARES": SHARES, "num_warps": SHARES}
    return blocks | {"STAGES": stages(4, tile, fixed, shared)}


def fits_one_pass(x, R: int) -> bool:
    """Whether DOWN and OUTER share a pass: together they spilled a thousand registers in float32, and forty at more than 64 ranks."""
    return x.element_size() == 2 and R <= 64


def branch_pass(x, t, f, *, outer=False, down=None, up=None, bias=None, scaling=1.0, accumulate=False, p=0.0, seed=None, index=0):
    """One pass over x [M, C], or over up alone. ``down`` [R, M] and ``up`` [M, C] are filled; if ``outer``, T^T x comes back in parts
    [spans, R, C]."""
    x = up if x is None else x
    M, C = x.shape
    R = (f if t is None else t).shape[0]
    t_size, flags = 4 if t is None else t.element_size(), {"outer": outer, "down": down is not None, "up": up is not None, "drop": p > 0.0}
    blocks = _pass_blocks(R, x.element_size(), t_size, shared_memory(x), **flags)
    columns, row_blocks = triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(M, blocks["BLOCK_M"])
    steps = LEAST_STEPS  # what only writes holds no sums, and needs no longer spans
    if outer or down is not None:
        steps = max(steps, triton.cdiv(row_blocks, max(1, 3 * PROGRAMS // columns)))
    steps = max(steps, triton.cdiv(row_blocks, MOST_SPANS))
    spans = triton.cdiv(row_blocks, steps)
    sums = x.new_empty(spans if outer else 0, R, C, dtype=torch.float32)
    parts = down if columns == 1 or down is None else x.new_empty(columns, R, M, dtype=torch.float32)
    if spans and columns:
        _lora_pass_kernel[(columns, spans)](
            x_ptr=x, t_ptr=t, f_ptr=f, bias_ptr=bias, seed_ptr=seed, outer_ptr=sums, down_ptr=parts, up_ptr=up, M=M, C=C, STEPS=steps,
            stride_xm=x.stride(0), stride_tr=0 if t is None else t.stride(0), stride_fr=0 if f is None else f.stride(0),
            stride_fc=1 if f is None else f.stride(1), scaling=scaling, p=p, index=index, OUTER=outer, DOWN=down is not None,
            UP=up is not None, DROP=p > 0.0, HAS_BIAS=bias is not None, ACCUMULATE=accumulate, IEEE=ieee(), EVEN=M % 16 == 0, **blocks,
        )  # fmt: skip
    if parts is not down:
        torch.sum(parts, 0, out=down)
    return sums if outer else None


def reduce_grads(da, A, db, B):
    """The gradients of A [R, K] and B [N, R], in their dtypes, from parts as :func:`along` leaves them; None for None."""
    dA, dB = (None if t is None else torch.empty_like(like, memory_format=torch.contiguous_format) for t, like in ((da, A), (db, B)))
    chosen = [t for t in (da, db) if t is not None]
    size = max((t.shape[1] * t.shape[2] for t in chosen), default=0)
    if size:
        first = int(da is None)
        (da, db), (a, b) = ((pair[first] if t is None else t for t in pair) for pair in ((da, db), (dA, dB)))  # both are compiled
        _lora_sum_kernel[(triton.cdiv(size, SUM["BLOCK"]), len(chosen))](
            da_ptr=da, db_ptr=db, a_ptr=a, b_ptr=b, SPANS_A=da.shape[0], SPANS_B=db.shape[0], stride_as=da.stride(0),
            stride_bs=db.stride(0), R=A.shape[0], K=A.shape[1], N=B.shape[0], FIRST=first, num_warps=4, **SUM,
        )  # fmt: skip
    return dA, dB


def aot_cases(shared: int):
    """Strides of 1 are constants, as Triton's launcher makes them: with unknown ones no load is wide."""
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        types = {f"{n}_ptr": f"*{dtype}" for n in ("x", "a", "b", "bias", "s", "t", "f", "up")} | {"seed_ptr": "*i64"}
        types |= dict.fromkeys(("outer_ptr", "down_ptr", "da_ptr", "db_ptr"), "*fp32")
        types |= dict.fromkeys(("scaling", "up_scaling", "p"), "fp32")
        strides = (f"stride_{n}" for n in ("xm", "ar", "ak", "bn", "br", "sr", "tr", "fr", "fc"))
        types |= dict.fromkeys(("M", "K", "N", "C", "STEPS", "index", *strides), "i32")
        flags = ("DROP", "ACCUMULATE", "HAS_BIAS", "OUTER", "DOWN", "UP")
        off = dict.fromkeys(flags, False) | {"IEEE": True, "EVEN": True}
        S, y = {"stride_ak": 1}, {"stride_ak": 1, "stride_br": 1, "UP": True, "HAS_BIAS": True}
        cases = []
        for name, rows, R, special in (
            ("S/2048", 2048, 8, S), ("S", 8192, 8, S), ("S/r128", 8192, 128, S), ("dS", 8192, 8, {"stride_ar": 1}),
            ("S and y", 8192, 8, y), ("S and y/drop", 8192, 8, y | {"DROP": True}),
        ):  # fmt: skip
            cases.append((name, _lora_rows_kernel, _down_blocks(rows, R, size, shared) | special, {}))

        def along_case(name, R, t_size, special, dtype=dtype, size=size, **flags):
            blocks = _pass_blocks(R, size, t_size, shared, **flags)
            blocks |= {flag.upper(): on for flag, on in flags.items()} | special
            return name, _lora_pass_kernel, blocks, {"t_ptr": "*fp32"} if t_size == 4 else {}

        if size == 2:  # both in one pass in 16 bit alone
            cases += [along_case(f"dy/r{R}", R, size, {"stride_fr": 1}, outer=True, down=True) for R in (8, 64)]
        cases += [along_case(f"x and dx/r{R}", R, 4, {"stride_fc": 1}, outer=True, up=True) for R in (8, 128)]
        cases.append(along_case("x and dx/drop", 8, 4, {"stride_fc": 1}, outer=True, up=True, drop=True))
        cases.append(along_case("x", 8, 4, {"stride_fc": 1}, outer=True))
        cases.append(along_case("y", 8, size, {"stride_fr": 1, "HAS_BIAS": True}, up=True))
        parts = {"a_ptr": "*fp32", "b_ptr": "*fp32"} | dict.fromkeys(("SPANS_A", "SPANS_B", "R"), "i32")
        parts |= dict.fromkeys(("stride_as", "stride_bs"), "i32")
        cases += [("sum", _lora_sum_kernel, SUM | {"FIRST": 0, "num_warps": 4}, parts)] * (size == 4)
        for name, kernel, constants, special in cases:
            constants = off | constants
            signature = {n: (types | special)[n] for n in kernel.arg_names if n not in constants}
            options = {n: constants[n] for n in ("num_warps", "num_stages") if n in constants}
            yield f"lora_branch/{name}/{dtype}", kernel, signature, {n: constants[n] for n in kernel.arg_names if n in constants}, options
