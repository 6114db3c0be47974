"""LoRA linear layers around a frozen product: the branch joins it in its epilogue, or lies in its output before cuBLAS adds to it.

    y = x W^T + b + s S B^T                 _lora_gemm_kernel: K grows by the rank; S = D(x) A^T is made in the loop, from its own tiles
    dx = dy W + D'(dS A)                    of x, or given (LOAD_S); or y_0 = b + s S B^T, then y = y_0 + x W^T by cuBLAS: see :func:`form`
    S, y_0; dS, dB, dA, dx_0                lora_branch.py, passes over x and dy

Shapes: x [M, K]; W [N, K]; A [R, K]; B [N, R]; S, dS [R, M]. Accumulation in float32; operands of tl.dot in x's dtype.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastpeft.kernels.card import padded
from fastpeft.kernels.lora_branch import branch_pass, dropped, project_down, reduce_grads

DW, DB, DLA, DLB = 1, 2, 4, 8


@dataclass(frozen=True)
class Gemm:
    """16 bit: three stages of tiles in 100 KB, from sm_80 on; on sm_90 two programs share a multiprocessor: 128 registers."""

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    num_warps: int = 8
    num_stages: int = 3


GEMM = Gemm()


def form(contracted: int, outputs: int, rank: int, itemsize: int) -> str:
    """Selects the GEMM strategy: "loop" (Triton, S beside it), "given" (Triton, S made before), "cublas".

    Modelled for an H100 (3 TB/s; cuBLAS 650 TFLOP/s in bfloat16, Triton's GEMM 0.88 of it), not measured: bench lora_linear prints all
    of them side by side, so that a measurement can take this rule's place.
    - With cuBLAS y is written once more, and read once more behind the product: about 3 bytes, 1 ps, an output. Triton's GEMM loses
      2 (1 / 0.88 - 1) / 650 ps a contracted element and output: as much at 2,400 elements. In float32, without tensor cores, cuBLAS's
      lead is larger, and it wins from some 100 elements on.
    - S in the loop adds 16 columns (the padded rank) to each 128. Made before, it is one read of x and a launch: less, beyond 1,700
      outputs at rank 16, and 425 at rank 64.
    """
    if itemsize != 2 or contracted > 2048 or rank > 64:
        return "cublas"
    return "loop" if outputs * padded(rank) <= 2048 * 16 else "given"


@triton.jit(do_not_specialize=["M", "index"])
def _lora_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, seed_ptr, y_ptr,
    M, N, K, R, stride_xm, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sr,
    scaling, p, index,
    HAS_BIAS: tl.constexpr, LOAD_S: tl.constexpr, DROP_IN: tl.constexpr, DROP_OUT: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    group = 8 * tl.cdiv(N, BLOCK_N)  # eight blocks of rows at a time: their tiles of w and x meet again in L2
    first = pid // group * 8
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    pid_m, pid_n = (first + pid % group % rows).to(tl.int64), (pid % group // rows).to(tl.int64)
    offs_m, offs_n, offs_r = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    dtype = y_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k, mask=mask_m[:, None] & mask_k, other=0.0)
        w = tl.load(w_ptr + offs_n * stride_wn + offs_k[:, None] * stride_wk, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = tl.dot(x, w, acc)
        if not LOAD_S:
            a = tl.load(a_ptr + offs_r * stride_ar + offs_k[:, None] * stride_ak, mask=mask_k[:, None] & mask_r, other=0.0).to(dtype)
            if DROP_IN:
                counters = offs_m[:, None] * tl.cdiv(K, 4) + k // 4 + tl.arange(0, BLOCK_K // 4)
                x = dropped(x, seed_ptr, index, counters, p).to(dtype)
            s = tl.dot(x, a, s)  # [BLOCK_M, BLOCK_R]
    s_ptrs = s_ptr + offs_r * stride_sr + offs_m[:, None]
    if LOAD_S:
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r, other=0.0).to(tl.float32)
    elif pid_n == 0:
        tl.store(s_ptrs, s.to(dtype), mask=mask_m[:, None] & mask_r)
    b = tl.load(b_ptr + offs_n * stride_bn + offs_r[:, None] * stride_br, mask=mask_r[:, None] & mask_n, other=0.0).to(dtype)
    s = (s * scaling).to(dtype)
    if DROP_OUT:
        counters = offs_m[:, None] * tl.cdiv(N, 4) + pid_n * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        acc += dropped(tl.dot(s, b), seed_ptr, index, counters, p)  # [BLOCK_M, BLOCK_N]
    else:  # into the same accumulator: a second one was as many registers again
        acc = tl.dot(s, b, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n
    mask = mask_m[:, None] & mask_n
    if ACCUMULATE:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, acc.to(dtype), mask=mask)


def _rows(t):
    """[..., C] as [M, C] with unit stride along C: a view wherever possible."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _gemm(x, w, y, b, s, a=None, bias=None, scaling=1.0, accumulate=False, p=0.0, seed=None, index=0):
    """y (+)= x w^T + bias + scaling s b^T; w [N, K], b [N, R] and a [R, K] with any strides. s is made here where a is given."""
    (M, K), (N, R) = x.shape, b.shape
    if M == 0 or N == 0:
        return
    _lora_gemm_kernel[(triton.cdiv(N, GEMM.BLOCK_N) * triton.cdiv(M, GEMM.BLOCK_M),)](
        x_ptr=x, w_ptr=w, bias_ptr=bias, a_ptr=a, b_ptr=b, s_ptr=s, seed_ptr=seed, y_ptr=y, M=M, N=N, K=K, R=R,
        stride_xm=x.stride(0), stride_wn=w.stride(0), stride_wk=w.stride(1), stride_ar=0 if a is None else a.stride(0),
        stride_ak=1 if a is None else a.stride(1), stride_bn=b.stride(0), stride_br=b.stride(1), stride_sr=s.stride(0),
        scaling=scaling, p=p, index=index, HAS_BIAS=bias is not None, LOAD_S=a is None, DROP_IN=p > 0.0 and a is not None,
        DROP_OUT=p > 0.0 and a is None, ACCUMULATE=accumulate, BLOCK_M=GEMM.BLOCK_M, BLOCK_N=GEMM.BLOCK_N,
        BLOCK_K=GEMM.BLOCK_K, BLOCK_R=padded(R), num_warps=GEMM.num_warps, num_stages=GEMM.num_stages,
    )  # fmt: skip


def _stacked(As):
    return As[0] if len(As) == 1 else torch.cat(As)


def lora_linears_fwd(x, weights, biases, As, Bs, scalings, p, seed):
    ranks = [0 if A is None else A.shape[0] for A in As]
    x2, branches = _rows(x), [i for i, R in enumerate(ranks) if R]
    s = x2.new_empty(sum(ranks), x2.shape[0])
    parts = s.split(ranks)
    strategy = form(x2.shape[1], sum(weights[i].shape[0] for i in branches), max(ranks), x2.element_size())
    if strategy != "loop" and p == 0.0 and branches:  # branches that see the same x share one pass over it
        project_down(x2, _stacked([As[i] for i in branches]), s)
    ys = []
    for i, (W, b, A, B, scaling, part) in enumerate(zip(weights, biases, As, Bs, scalings, parts)):
        if not ranks[i]:
            ys.append(torch.nn.functional.linear(x2, W, b).view(*x.shape[:-1], W.shape[0]))
            continue
        y, b = x2.new_empty(x2.shape[0], W.shape[0]), None if b is None else b.contiguous()
        if strategy != "loop" and p > 0.0:
            project_down(x2, A, part, 1.0, p, seed, i)
        if strategy == "cublas":
            branch_pass(None, part, B.t(), up=y, bias=b, scaling=scaling)
            y.addmm_(x2, W.t())
        elif strategy == "loop":
            _gemm(x2, W, y, B, part, a=A, bias=b, scaling=scaling, p=p, seed=seed, index=i)
        else:
            _gemm(x2, W, y, B, part, bias=b, scaling=scaling)
        ys.append(y.view(*x.shape[:-1], W.shape[0]))
    return [*ys, s]


def _branch_grads(flat, Bs, S, dS, scalings, needs):
    """Fills dS and returns the parts of dB, both by branch; in 16 bit one pass over dy serves both."""
    dbs = {}
    for i, dy in flat.items():
        need_db, ds = bool(needs[i] & DLB), dS.get(i)
        if ds is not None and (dy.element_size() != 2 or not need_db):  # float32 in one pass with dB spilled a thousand registers
            project_down(dy, Bs[i].t(), ds, scalings[i])
            ds = None
        if need_db:
            dbs[i] = branch_pass(dy, S[i], Bs[i].t(), outer=True, down=ds, scaling=scalings[i])
    return dbs


def _lora_A_grads(x2, dx, stack, dS, As, needs, p, seed):
    """The parts of dA by branch; where dx is given it becomes D'(dS A), which cuBLAS adds to.

    Without dropout the branches' rows of dS and A lie together: one pass over x, or over dx, serves them all."""
    das, groups = {}, [list(dS)] if p == 0.0 else [[i] for i in dS]
    for done, group in enumerate(groups if dS else ()):
        t, A = (stack, _stacked([As[i] for i in group])) if p == 0.0 else (dS[group[0]], As[group[0]])
        need_da = any(needs[i] & DLA for i in group)
        if need_da or dx is not None:
            options = {"up": dx, "accumulate": dx is not None and done > 0, "p": p, "seed": seed, "index": group[0]}
            da = branch_pass(x2 if need_da else None, t, A, outer=need_da, **options)
            das |= dict(zip(group, da.split([As[i].shape[0] for i in group], 1))) if need_da else {}
    return das


def _add_products(dx, flat, weights, As, dS, strategy, begun, p, seed):
    """dx (+)= dy W of each projection, by Triton together with its branch. ``begun``: dx already holds a part of the sum."""
    for i, dy in flat.items():
        if strategy == "cublas" or As[i] is None or not As[i].shape[0]:
            dx.addmm_(dy, weights[i], beta=int(begun))
        else:
            _gemm(dy, weights[i].t(), dx, As[i].t(), dS[i], accumulate=begun, p=p, seed=seed, index=i)
        begun = True


def _parameter_grads(flat, x2, As, Bs, das, dbs, needs):
    """The needed ones of each projection, in the order dW, db, dA, dB; ``das`` and ``dbs`` are parts still to be summed."""
    out = []
    for i, dy in flat.items():
        out += [dy.t() @ x2] if needs[i] & DW else []
        out += [dy.sum(0)] if needs[i] & DB else []
        if As[i] is not None and As[i].shape[0]:
            out += [d for d in reduce_grads(das.get(i) if needs[i] & DLA else None, As[i], dbs.get(i), Bs[i]) if d is not None]
    return out


def lora_linears_bwd(dys, x, weights, As, Bs, s, scalings, p, seed, need_dx, needs):
    flat = {i: _rows(dy) for i, dy in enumerate(dys) if dy is not None}
    ranks, x2 = [0 if A is None else A.shape[0] for A in As], None if x is None else _rows(x)
    S = () if s is None else s.split(ranks)
    first, branches = next(iter(flat.values())), [i for i in flat if ranks[i] and (need_dx or needs[i] & DLA)]
    M, K = first.shape[0], weights[0].shape[1]
    stack = first.new_empty(sum(ranks[i] for i in branches), M, dtype=torch.float32)
    dS = dict(zip(branches, stack.split([ranks[i] for i in branches])))
    dbs = _branch_grads(flat, Bs, S, dS, scalings, needs)

    dx = first.new_empty(M, K) if need_dx else None
    strategy = form(max(dy.shape[1] for dy in flat.values()), K, max(ranks), first.element_size())
    das = _lora_A_grads(x2, dx if strategy == "cublas" else None, stack, dS, As, needs, p, seed)
    if need_dx:
        _add_products(dx, flat, weights, As, dS, strategy, strategy == "cublas" and bool(branches), p, seed)

    out = [dx.view(*next(dy for dy in dys if dy is not None).shape[:-1], K)] if need_dx else []
    return out + _parameter_grads(flat, x2, As, Bs, das, dbs, needs)


def aot_cases(shared: int):
    """Strides of 1 are constants, as Triton's launcher makes them: with unknown ones no load is wide."""
    types = {f"{n}_ptr": "*bf16" for n in ("x", "w", "bias", "a", "b", "s", "y")} | {"seed_ptr": "*i64", "scaling": "fp32", "p": "fp32"}
    types |= dict.fromkeys(("M", "N", "K", "R", "index", *(f"stride_{n}" for n in ("xm", "wn", "wk", "ar", "bn", "br", "sr"))), "i32")
    constants = dict.fromkeys(("DROP_IN", "DROP_OUT", "ACCUMULATE", "HAS_BIAS"), False) | {"stride_ak": 1, "BLOCK_R": 16}
    fwd, dx = dict.fromkeys(("stride_wk", "stride_br"), 1), dict.fromkeys(("stride_wn", "stride_bn"), 1)
    constants |= {n: getattr(GEMM, n) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    options = {"num_warps": GEMM.num_warps, "num_stages": GEMM.num_stages}
    for name, special, others in (
        ("loop", fwd | {"HAS_BIAS": True, "LOAD_S": False}, {}),
        ("given", fwd | {"HAS_BIAS": True, "LOAD_S": True}, {}),
        ("given/r64", fwd | {"HAS_BIAS": True, "LOAD_S": True, "BLOCK_R": 64}, {}),
        ("loop/drop", fwd | {"HAS_BIAS": True, "LOAD_S": False, "DROP_IN": True}, {}),
        ("dx", dx | {"LOAD_S": True}, {"s_ptr": "*fp32"}),
        ("dx/drop", dx | {"LOAD_S": True, "DROP_OUT": True}, {"s_ptr": "*fp32"}),
    ):
        signature = {n: t for n, t in (types | others).items() if n not in special}
        yield f"lora_gemm/{name}/bf16", _lora_gemm_kernel, signature, constants | special, options
