"""LoRA linear layers: the extended-K GEMM of forward and dx, and dA, dB from one read of x and dy.

    y = x W^T + b + s (D(x) A^T) B^T        _lora_gemm_kernel: S = D(x) A^T accumulates beside x W^T from the same tiles of x,
                                            and enters in the epilogue: K grows by the rank, x is read once
    dx = dy W + D'(dS A)                    the same kernel on (dy, W^T), with dS given (LOAD_S)
    dS = s dy B, dB = s dy^T S, dA = dS^T D(x)        _lora_grads_kernel: a program owns rows; dy passes once for dS and dB,
                                            x once for dA; partial sums per program, reduced after: deterministic

Shapes: x [M, K]; W [N, K]; A [R, K]; B [N, R]; S, dS [R, M]. Accumulation in float32; operands of tl.dot in x's dtype.
The rank is padded to 16, the least a tensor core takes. Dropout: Philox on (seed + branch, row * K + column), the same in both passes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

DW, DB, DLA, DLB = 1, 2, 4, 8


@dataclass(frozen=True)
class Gemm:
    """16 bit: acc and S within 180 registers, three stages of tiles in 100 KB, from sm_80 on. float32 goes without tensor cores."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    num_warps: int = 8
    num_stages: int = 3


GEMM = {2: Gemm(), 4: Gemm(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4)}  # by bytes of an element
GRADS_ROWS, GRADS_COLS, GRADS_PROGRAMS = 64, 64, 128


@triton.jit
def _lora_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, seed_ptr, y_ptr,
    M, N, K, R, stride_xm, stride_wn, stride_wk, stride_ar, stride_bn, stride_br, stride_sr,
    scaling, p, index,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, LOAD_S: tl.constexpr, DROP_IN: tl.constexpr, DROP_OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    group = 8 * tl.cdiv(N, BLOCK_N)  # eight blocks of rows at a time: their tiles of w and x meet again in L2
    first = pid // group * 8
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    pid_m, pid_n = (first + pid % group % rows).to(tl.int64), (pid % group // rows).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    offs_m, offs_n, offs_r = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    dtype = y_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k, mask=mask_m[:, None] & mask_k, other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptr + offs_n * stride_wn + offs_k[:, None] * stride_wk, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=precision)
        if HAS_LORA and not LOAD_S:
            a = tl.load(a_ptr + offs_r * stride_ar + offs_k[:, None], mask=mask_k[:, None] & mask_r, other=0.0).to(dtype)
            if DROP_IN:
                u = tl.rand(tl.load(seed_ptr) + index, offs_m[:, None] * K + offs_k)
                x = tl.where(u >= p, x.to(tl.float32) / (1.0 - p), 0.0).to(dtype)
            s = tl.dot(x, a, s, input_precision=precision)  # [BLOCK_M, BLOCK_R]
    if HAS_LORA:
        s_ptrs = s_ptr + offs_r * stride_sr + offs_m[:, None]
        if LOAD_S:
            s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r, other=0.0).to(tl.float32)
        elif pid_n == 0:
            tl.store(s_ptrs, s.to(dtype), mask=mask_m[:, None] & mask_r)
        b = tl.load(b_ptr + offs_n * stride_bn + offs_r[:, None] * stride_br, mask=mask_r[:, None] & mask_n, other=0.0).to(dtype)
        branch = tl.dot(s.to(dtype), b, input_precision=precision) * scaling  # [BLOCK_M, BLOCK_N]
        if DROP_OUT:
            u = tl.rand(tl.load(seed_ptr) + index, offs_m[:, None] * N + offs_n)
            branch = tl.where(u >= p, branch / (1.0 - p), 0.0)
        acc += branch
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n
    mask = mask_m[:, None] & mask_n
    if ACCUMULATE:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, acc.to(dtype), mask=mask)


@triton.jit
def _lora_grads_kernel(
    dy_ptr, x_ptr, b_ptr, s_ptr, ds_ptr, seed_ptr, da_ptr, db_ptr,
    M, N, K, R, stride_dm, stride_xm, stride_bn, stride_sr, stride_dsr, scaling, p, index, STEPS,
    NEED_DS: tl.constexpr, NEED_DA: tl.constexpr, NEED_DB: tl.constexpr, DROP: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    dtype = dy_ptr.dtype.element_ty
    for step in range(0, STEPS):
        offs_m = (pid * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        ds = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if NEED_DB:
            s = tl.load(s_ptr + offs_r * stride_sr + offs_m[:, None], mask=mask_m[:, None] & mask_r, other=0.0)
        for n in range(0, N, BLOCK_C):
            offs_n = n + tl.arange(0, BLOCK_C)
            mask_n = offs_n < N
            dy = tl.load(dy_ptr + offs_m[:, None] * stride_dm + offs_n, mask=mask_m[:, None] & mask_n, other=0.0)
            if NEED_DS:
                b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r, mask=mask_n[:, None] & mask_r, other=0.0).to(dtype)
                ds = tl.dot(dy, b, ds, input_precision=precision)  # [BLOCK_M, BLOCK_R]
            if NEED_DB:
                part = db_ptr + (pid * N + offs_n[:, None]) * BLOCK_R + offs_r
                db = tl.dot(tl.trans(dy), s, input_precision=precision) * scaling  # [BLOCK_C, BLOCK_R]
                if step > 0:
                    db += tl.load(part, mask=mask_n[:, None], other=0.0)
                tl.store(part, db, mask=mask_n[:, None])
        if NEED_DS:
            ds *= scaling
            tl.store(ds_ptr + offs_r * stride_dsr + offs_m[:, None], ds.to(dtype), mask=mask_m[:, None] & mask_r)
        if NEED_DA:
            dst = tl.trans(ds.to(dtype))  # [BLOCK_R, BLOCK_M]
            for k in range(0, K, BLOCK_C):
                offs_k = k + tl.arange(0, BLOCK_C)
                mask_k = offs_k < K
                x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k, mask=mask_m[:, None] & mask_k, other=0.0)
                if DROP:
                    u = tl.rand(tl.load(seed_ptr) + index, offs_m[:, None] * K + offs_k)
                    x = tl.where(u >= p, x.to(tl.float32) / (1.0 - p), 0.0).to(dtype)
                part = da_ptr + (pid * BLOCK_R + offs_r[:, None]) * K + offs_k
                da = tl.dot(dst, x, input_precision=precision)  # [BLOCK_R, BLOCK_C]
                if step > 0:
                    da += tl.load(part, mask=mask_k, other=0.0)
                tl.store(part, da, mask=mask_k)
        tl.debug_barrier()  # the next step's threads read what this one's stored


def _block_r(R: int) -> int:
    return max(16, triton.next_power_of_2(R))


def _ieee() -> bool:
    return not torch.backends.cuda.matmul.allow_tf32  # the user's choice for float32 matmuls holds here too


def _rows(t):
    """[..., C] as [M, C] with unit stride along C: a view wherever possible."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _gemm(x, w, y, bias=None, a=None, b=None, s=None, scaling=1.0, load_s=False, accumulate=False, p=0.0, seed=None, index=0):
    """y (+)= x w^T + bias + scaling s b^T; w [N, K] and b [N, R] with any strides."""
    (M, K), N = x.shape, w.shape[0]
    if M == 0 or N == 0:
        return
    config, R = GEMM[x.element_size()], 1 if b is None else b.shape[1]
    drop = p > 0.0 and b is not None
    _lora_gemm_kernel[(triton.cdiv(N, config.BLOCK_N) * triton.cdiv(M, config.BLOCK_M),)](
        x_ptr=x, w_ptr=w, bias_ptr=bias, a_ptr=a, b_ptr=b, s_ptr=s, seed_ptr=seed, y_ptr=y, M=M, N=N, K=K, R=R,
        stride_xm=x.stride(0), stride_wn=w.stride(0), stride_wk=w.stride(1), stride_ar=0 if a is None else a.stride(0),
        stride_bn=0 if b is None else b.stride(0), stride_br=0 if b is None else b.stride(1),
        stride_sr=0 if s is None else s.stride(0), scaling=scaling, p=p, index=index,
        HAS_BIAS=bias is not None, HAS_LORA=b is not None, LOAD_S=load_s, DROP_IN=drop and not load_s, DROP_OUT=drop and load_s,
        ACCUMULATE=accumulate, IEEE=_ieee(), BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K,
        BLOCK_R=_block_r(R), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def lora_linears_fwd(x, weights, biases, As, Bs, scalings, p, seed):
    ranks = [0 if A is None else A.shape[0] for A in As]
    x2 = _rows(x)
    s = x2.new_empty(sum(ranks), x2.shape[0])
    ys = []
    for i, (W, b, A, B, scaling, part) in enumerate(zip(weights, biases, As, Bs, scalings, s.split(ranks))):
        y = x.new_empty(*x.shape[:-1], W.shape[0])
        A, b = (None if t is None else t.contiguous() for t in (A, b))
        _gemm(x2, W, y, bias=b, a=A, b=B, s=part if A is not None else None, scaling=scaling, p=p, seed=seed, index=i)
        ys.append(y)
    return [*ys, s]


def _branch_grads(dy, x, B, s, scaling, need_ds, need_da, need_db, p, seed, index):
    """(dS [R, M] or None, dA [R, K] or None, dB [N, R] or None), the last two in float32."""
    (M, N), R = dy.shape, B.shape[1]
    K, BLOCK_R = 1 if x is None else x.shape[1], _block_r(B.shape[1])
    steps = max(1, triton.cdiv(triton.cdiv(M, GRADS_ROWS), GRADS_PROGRAMS))
    programs = triton.cdiv(M, GRADS_ROWS * steps)
    ds = dy.new_empty(R, M) if need_ds else None
    da = dy.new_empty(programs, BLOCK_R, K, dtype=torch.float32) if need_da else None
    db = dy.new_empty(programs, N, BLOCK_R, dtype=torch.float32) if need_db else None
    if programs:
        _lora_grads_kernel[(programs,)](
            dy_ptr=dy, x_ptr=x, b_ptr=B, s_ptr=s, ds_ptr=ds, seed_ptr=seed, da_ptr=da, db_ptr=db, M=M, N=N, K=K, R=R,
            stride_dm=dy.stride(0), stride_xm=0 if x is None else x.stride(0), stride_bn=B.stride(0),
            stride_sr=0 if s is None else s.stride(0), stride_dsr=M, scaling=scaling, p=p, index=index, STEPS=steps,
            NEED_DS=need_ds, NEED_DA=need_da, NEED_DB=need_db, DROP=p > 0.0, IEEE=_ieee(),
            BLOCK_M=GRADS_ROWS, BLOCK_C=GRADS_COLS, BLOCK_R=BLOCK_R, num_warps=4, num_stages=2,
        )  # fmt: skip
    return ds, None if da is None else da.sum(0)[:R], None if db is None else db.sum(0)[:, :R]


def lora_linears_bwd(dys, x, weights, As, Bs, s, scalings, p, seed, need_dx, needs):
    x2 = None if x is None else _rows(x)
    start, dx, grads = 0, None, []
    for i, (dy, W, A, B, scaling, need) in enumerate(zip(dys, weights, As, Bs, scalings, needs)):
        R = 0 if A is None else A.shape[0]
        part = None if s is None else s[start : start + R]
        start += R
        if dy is None:
            continue
        flat = _rows(dy)
        ds = da = db = None
        need_ds = bool(R) and (need_dx or bool(need & DLA))
        if need_ds or need & DLB:
            flags = (need_ds, bool(need & DLA), bool(need & DLB))
            ds, da, db = _branch_grads(flat, x2 if need & DLA else None, B.contiguous(), part, scaling, *flags, p, seed, i)
        if need_dx:
            out, first = (dx, False) if dx is not None else (dy.new_empty(*dy.shape[:-1], W.shape[1]), True)
            _gemm(flat, W.t(), out, b=None if A is None else A.t(), s=ds, load_s=True, accumulate=not first, p=p, seed=seed, index=i)
            dx = out
        if need & DW:
            grads.append(flat.t() @ x2)
        if need & DB:
            grads.append(flat.sum(0))
        if need & DLA:
            grads.append(da.to(A.dtype))
        if need & DLB:
            grads.append(torch.empty_like(B, memory_format=torch.contiguous_format).copy_(db))
    return [dx, *grads] if need_dx else grads


def aot_cases():
    strides = ("M", "N", "K", "R", "stride_xm", "stride_wn", "stride_wk", "stride_ar", "stride_bn", "stride_br", "stride_sr", "index")
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        config = GEMM[size]
        pointers = {f"{n}_ptr": f"*{dtype}" for n in ("x", "w", "bias", "a", "b", "s", "y")} | {"seed_ptr": "*i64"}
        signature = pointers | dict.fromkeys(strides, "i32") | {"scaling": "fp32", "p": "fp32"}
        blocks = {n: getattr(config, n) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K")} | {"BLOCK_R": 16, "IEEE": True}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        flags = dict.fromkeys(("HAS_BIAS", "HAS_LORA", "LOAD_S", "DROP_IN", "DROP_OUT", "ACCUMULATE"), False) | {"HAS_LORA": True}
        yield f"lora_gemm/fwd/{dtype}", _lora_gemm_kernel, signature, blocks | flags | {"HAS_BIAS": True}, options
        yield f"lora_gemm/dx/{dtype}", _lora_gemm_kernel, signature, blocks | flags | {"LOAD_S": True}, options
        names = ("M", "N", "K", "R", "stride_dm", "stride_xm", "stride_bn", "stride_sr", "stride_dsr", "index", "STEPS")
        pointers = {f"{n}_ptr": f"*{dtype}" for n in ("dy", "x", "b", "s", "ds")} | {"da_ptr": "*fp32", "db_ptr": "*fp32"}
        signature = pointers | {"seed_ptr": "*i64", "scaling": "fp32", "p": "fp32"} | dict.fromkeys(names, "i32")
        blocks = {"BLOCK_M": GRADS_ROWS, "BLOCK_C": GRADS_COLS, "BLOCK_R": 16, "IEEE": True, "DROP": False}
        needs = dict.fromkeys(("NEED_DS", "NEED_DA", "NEED_DB"), True)
        yield f"lora_grads/{dtype}", _lora_grads_kernel, signature, blocks | needs, {"num_warps": 4, "num_stages": 2}
