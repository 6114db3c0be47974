"""Excitor's key merge: softmax, reconstruction, gate and sum in one read of K and one write of K'; backward in one read of dK'.

    K' = K + g (A_P P + E W_vu^T),  [A_P, A_I] = softmax(U N),  E = A_I Z         _excitor_merge_fwd_kernel
    Q' = rot(Q), K' = rot(K) + g (...), each read once: the rotary pass itself    _excitor_turn_fwd_kernel
    dL = dK' (g R)^T,  Y = L^T dK'                                                lora_branch.py's pass: those of a LoRA of KR ranks
    text: L^T, or dU = dS N^T and dN = U^T dS, dS = A (dA - rowsum(A dA))         _excitor_scores_kernel
          dP = g Y, dg_h = <Y_h, P_h>                                             _excitor_table_kernel

Shapes: k [B, H / GROUPS, M, d], any strides; u [B, M, r]; n [B or 1, r, K + V]; z [B, V, r]; prompt [K, C]; wv_up [C, r]; gate [H];
L [B M, KR], R [KR, C], KR = K + r or K. A program owns BLOCK_M rows and STEPS blocks of columns: it makes A for itself, from r numbers a
row, once for all columns where the rows alone give programs enough. With a program for each block of columns the merge took some 150 us
of an H200 at 8192 x 4096, where k's bytes ask for 37: 8,192 programs each waited for their scores. Softmax and accumulation in float32.

Where queries and keys are still to be turned, a program goes from head to head instead, with its rows' tables, which all heads share, in
registers beside their scores: both halves of a head of q and of k are read, turned, and k's summed, so that of q and k each is read and
written once in all, where the rotary pass and the merge read and write k twice. Read anew for every head, float32 tables would be four
times k's bytes: for that reason backward's pass, whose programs own columns, does not turn dK' back.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastpeft.kernels.card import ieee, padded
from fastpeft.kernels.lora_branch import branch_pass, fits_one_pass, project_down


@dataclass(frozen=True)
class Merge:
    """Tiles of keys, and how many are on their way. float32 with an image spilled at 32 x 128 on sm_80."""

    BLOCK_M: int = 32
    BLOCK_C: int = 128
    num_warps: int = 4
    STAGES: int = 3


# by (image, bytes of an element)
CONFIGS = {(False, 2): Merge(), (False, 4): Merge(BLOCK_C=64), (True, 2): Merge(), (True, 4): Merge(BLOCK_C=32, num_warps=8)}

SCORE_ROWS, MOST_ROWS = 64, 128  # of a program that makes scores; of R in one of our passes, beyond which ATen's products serve
PROGRAMS = 256  # of a launch, where the rows give as many; else rows' scores are made again for a part of the columns


@triton.jit
def _scores(u, n_ptr, offs_r, offs_k, mask_r, K, BLOCK_K: tl.constexpr):
    """u N of the prompt's keys, float32, and N [BLOCK_R, BLOCK_K]; minus infinity where there is no key."""
    mask_k = offs_k < K
    n = tl.load(n_ptr + offs_r[:, None] * K + offs_k, mask=mask_r[:, None] & mask_k, other=0.0).to(tl.float32)
    return tl.where(mask_k, tl.dot(u, n, input_precision="ieee"), float("-inf")), n


@triton.jit
def _attended(
    u_ptr, n_ptr, z_ptr, row, pid_b, mask_m, K, V, R, stride_nb, dtype: tl.constexpr,
    IMAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A_P [BLOCK_M, BLOCK_K] and, of an image, E [BLOCK_M, BLOCK_R]: softmax(U N) of a program's rows."""
    offs_r, offs_k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask_r, mask_k = offs_r < R, offs_k < K
    e = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    u = tl.load(u_ptr + row[:, None] * R + offs_r, mask=mask_m[:, None] & mask_r, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    n_row = n_ptr + pid_b * stride_nb + offs_r[:, None] * (K + V)
    n = tl.load(n_row + offs_k, mask=mask_r[:, None] & mask_k, other=0.0).to(tl.float32)
    score = tl.where(mask_k, tl.dot(u, n, input_precision="ieee"), float("-inf"))  # [BLOCK_M, BLOCK_K]
    top = tl.max(score, 1)
    prob = tl.exp(score - top[:, None])
    total = tl.sum(prob, 1)
    if IMAGE:  # online softmax over the image's keys: 512 scores a row at once spilled 14,000 registers
        for v in range(0, V, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            n = tl.load(n_row + K + offs_v, mask=mask_r[:, None] & mask_v, other=0.0).to(tl.float32)
            score = tl.where(mask_v, tl.dot(u, n, input_precision="ieee"), float("-inf"))  # [BLOCK_M, BLOCK_V]
            highest = tl.maximum(top, tl.max(score, 1))
            shrink = tl.exp(top - highest)
            part = tl.exp(score - highest[:, None])
            z_ptrs = z_ptr + (pid_b * V + offs_v[:, None]) * R + offs_r
            z = tl.load(z_ptrs, mask=mask_v[:, None] & mask_r, other=0.0).to(tl.float32)
            e = tl.dot(part, z, e * shrink[:, None], input_precision="ieee")  # [BLOCK_M, BLOCK_R]
            prob *= shrink[:, None]
            total = total * shrink + tl.sum(part, 1)
            top = highest
        e /= total[:, None]
    return (prob / total[:, None]).to(dtype), e.to(dtype)


@triton.jit
def _extra(
    prob, e, prompt_ptr, up_ptr, offs_c, mask_c, C, K, R,
    IMAGE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """K_x of some columns, float32."""
    dtype: tl.constexpr = prob.dtype
    offs_k, offs_r = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_R)[:, None]
    p = tl.load(prompt_ptr + offs_k * C + offs_c, mask=(offs_k < K) & mask_c, other=0.0).to(dtype)
    extra = tl.dot(prob, p, input_precision=precision)  # [BLOCK_M, columns]
    if IMAGE:
        w = tl.load(up_ptr + offs_c * R + offs_r, mask=(offs_r < R) & mask_c, other=0.0).to(dtype)
        extra = tl.dot(e, w, extra, input_precision=precision)
    return extra


@triton.jit(do_not_specialize=["M", "STEPS"])
def _excitor_merge_fwd_kernel(
    k_ptr, u_ptr, n_ptr, z_ptr, prompt_ptr, up_ptr, gate_ptr, out_ptr,
    M, C, D, K, V, R, STEPS, stride_kb, stride_kh, stride_km, stride_kd, stride_nb,
    GROUPS: tl.constexpr, IMAGE: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid_c, pid, row_blocks = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64), tl.cdiv(M, BLOCK_M)
    pid_m, pid_b = pid % row_blocks, pid // row_blocks
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = out_ptr.dtype.element_ty
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, row = offs_m < M, pid_b * M + offs_m
    k_ptr += pid_b * stride_kb
    prob, e = _attended(u_ptr, n_ptr, z_ptr, row, pid_b, mask_m, K, V, R, stride_nb, dtype, IMAGE, BLOCK_M, BLOCK_K, BLOCK_V, BLOCK_R)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        offs_c = (pid_c * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c
        k_ptrs = k_ptr + offs_m[:, None] * stride_km + (offs_c // D // GROUPS) * stride_kh + (offs_c % D) * stride_kd
        k = tl.load(k_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
        extra = _extra(prob, e, prompt_ptr, up_ptr, offs_c, mask_c, C, K, R, IMAGE, BLOCK_K, BLOCK_R, precision)
        gate = tl.load(gate_ptr + offs_c // D, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(out_ptr + row[:, None] * C + offs_c, (k.to(tl.float32) + gate * extra).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M", "STEPS"])
def _excitor_turn_fwd_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, u_ptr, n_ptr, z_ptr, prompt_ptr, up_ptr, gate_ptr, turned_ptr, out_ptr,
    M, C, HALF, K, V, R, STEPS, stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_km, stride_kd,
    stride_tb, stride_tm, stride_nb,
    GROUPS: tl.constexpr, IMAGE: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """HALF: half of a head's channels, BLOCK_D at most; a program's STEPS heads."""
    pid_h, pid, row_blocks = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64), tl.cdiv(M, BLOCK_M)
    pid_m, pid_b = pid % row_blocks, pid // row_blocks
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = out_ptr.dtype.element_ty
    offs_m, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d, row = offs_m < M, offs_d < HALF, pid_b * M + offs_m
    mask = mask_m[:, None] & mask_d
    prob, e = _attended(u_ptr, n_ptr, z_ptr, row, pid_b, mask_m, K, V, R, stride_nb, dtype, IMAGE, BLOCK_M, BLOCK_K, BLOCK_V, BLOCK_R)
    table = pid_b * stride_tb + offs_m[:, None] * stride_tm + offs_d
    c1 = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    c2 = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    q_ptrs = q_ptr + pid_b * stride_qb + offs_m[:, None] * stride_qm + offs_d * stride_qd
    k_ptrs = k_ptr + pid_b * stride_kb + offs_m[:, None] * stride_km + offs_d * stride_kd
    for head in tl.range(pid_h * STEPS, tl.minimum((pid_h + 1) * STEPS, C // (2 * HALF)), num_stages=STAGES):
        columns = head * (2 * HALF) + offs_d
        out = row[:, None] * C + columns
        q1 = tl.load(q_ptrs + head * stride_qh, mask=mask, other=0.0).to(tl.float32)
        q2 = tl.load(q_ptrs + head * stride_qh + HALF * stride_qd, mask=mask, other=0.0).to(tl.float32)
        tl.store(turned_ptr + out, (q1 * c1 - q2 * s1).to(dtype), mask=mask)
        tl.store(turned_ptr + out + HALF, (q2 * c2 + q1 * s2).to(dtype), mask=mask)
        k1 = tl.load(k_ptrs + head // GROUPS * stride_kh, mask=mask, other=0.0).to(tl.float32)
        k2 = tl.load(k_ptrs + head // GROUPS * stride_kh + HALF * stride_kd, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + head).to(tl.float32)
        extra = _extra(prob, e, prompt_ptr, up_ptr, columns, mask_d, C, K, R, IMAGE, BLOCK_K, BLOCK_R, precision)
        tl.store(out_ptr + out, (k1 * c1 - k2 * s1 + gate * extra).to(dtype), mask=mask)
        extra = _extra(prob, e, prompt_ptr, up_ptr, columns + HALF, mask_d, C, K, R, IMAGE, BLOCK_K, BLOCK_R, precision)
        tl.store(out_ptr + out + HALF, (k2 * c2 + k1 * s2 + gate * extra).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _excitor_scores_kernel(
    u_ptr, n_ptr, l_ptr, dl_ptr, du_ptr, dn_ptr, M, K, R,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """L^T [K, M] from U and N; or from dL^T [K, M] dU [M, R] and the part of dN [R, K] of a program's rows."""
    pid = tl.program_id(0).to(tl.int64)
    offs_m, offs_r, offs_k = pid * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask_m, mask_r, mask_k = offs_m < M, offs_r < R, offs_k < K
    u = tl.load(u_ptr + offs_m[:, None] * R + offs_r, mask=mask_m[:, None] & mask_r, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    score, n = _scores(u, n_ptr, offs_r, offs_k, mask_r, K, BLOCK_K)
    prob = tl.exp(score - tl.max(score, 1)[:, None])
    prob /= tl.sum(prob, 1)[:, None]  # [BLOCK_M, BLOCK_K]
    offs, mask = offs_k.to(tl.int64) * M + offs_m[:, None], mask_m[:, None] & mask_k
    if BACKWARD:
        dl = tl.load(dl_ptr + offs, mask=mask, other=0.0)
        ds = prob * (dl - tl.sum(prob * dl, 1)[:, None])
        du = tl.dot(ds, tl.trans(n), input_precision="ieee")  # [BLOCK_M, BLOCK_R]
        tl.store(du_ptr + offs_m[:, None] * R + offs_r, du.to(du_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r)
        dn = tl.dot(tl.trans(u), ds, input_precision="ieee")  # [BLOCK_R, BLOCK_K]
        tl.store(dn_ptr + (pid * R + offs_r[:, None]) * K + offs_k, dn, mask=mask_r[:, None] & mask_k)
    else:
        tl.store(l_ptr + offs, prob.to(l_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _excitor_table_kernel(
    y_ptr, prompt_ptr, gate_ptr, dprompt_ptr, dgate_ptr, C, D, K, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Of one head: dP = g Y and dg = <Y, P>."""
    head = tl.program_id(0).to(tl.int64)
    offs_k, offs_d = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_D)
    mask, offs = (offs_k < K) & (offs_d < D), offs_k * C + head * D + offs_d
    y = tl.load(y_ptr + offs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
    gate = tl.load(gate_ptr + head).to(tl.float32)
    tl.store(dprompt_ptr + offs, (y * gate).to(dprompt_ptr.dtype.element_ty), mask=mask)
    product = y * tl.load(prompt_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dgate_ptr + head, tl.sum(tl.sum(product, 1), 0).to(dgate_ptr.dtype.element_ty))


def _launch(kernel, k, u, n, z, prompt, wv_up, gate, columns, config, **own):
    """``columns``: blocks of columns, or heads."""
    (B, _, M, _), (K, C), R, V = k.shape, prompt.shape, u.shape[2], n.shape[2] - prompt.shape[0]
    row_blocks = triton.cdiv(M, config.BLOCK_M)
    steps = triton.cdiv(columns, max(1, PROGRAMS // max(1, row_blocks * B)))
    grid = (row_blocks * B, triton.cdiv(columns, max(1, steps)))  # samples may be more than 65,535
    if 0 in grid:
        return
    n = n.contiguous()
    kernel[grid](
        k_ptr=k, u_ptr=u.contiguous(), n_ptr=n, z_ptr=None if z is None else z.contiguous(), prompt_ptr=prompt.contiguous(),
        up_ptr=None if wv_up is None else wv_up.contiguous(), gate_ptr=gate.contiguous(), M=M, C=C, K=K, V=V, R=R, STEPS=steps,
        **_strides("k", k), stride_nb=0 if n.shape[0] == 1 else n.stride(0), GROUPS=gate.shape[0] // k.shape[1], IMAGE=z is not None,
        IEEE=ieee(), STAGES=config.STAGES, BLOCK_M=config.BLOCK_M, BLOCK_K=padded(K), BLOCK_V=min(32, padded(V)), BLOCK_R=padded(R),
        num_warps=config.num_warps, **own,
    )  # fmt: skip


def _strides(name, t):
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bhmd", t.stride())}


def excitor_merge_fwd(k, u, n, z, prompt, wv_up, gate):
    (B, _, M, D), C, config = k.shape, prompt.shape[1], CONFIGS[z is not None, k.element_size()]
    out, width = k.new_empty(B, M, C), config.BLOCK_C
    columns = triton.cdiv(C, width)
    _launch(_excitor_merge_fwd_kernel, k, u, n, z, prompt, wv_up, gate, columns, config, out_ptr=out, D=D, BLOCK_C=width)
    return out


def excitor_turn_fwd(q, k, cos, sin, u, n, z, prompt, wv_up, gate):
    """(Q', K') [B, M, C] of q [B, H, M, d] and k [B, H or a divisor of it, M, d], d even, and tables [B or 1, M, d]."""
    (B, H, M, D), C = q.shape, prompt.shape[1]
    turned, out = k.new_empty(B, M, C), k.new_empty(B, M, C)
    cos, sin = cos.contiguous(), sin.contiguous()
    _launch(
        _excitor_turn_fwd_kernel, k, u, n, z, prompt, wv_up, gate, H, Merge(), q_ptr=q,
        cos_ptr=cos, sin_ptr=sin, turned_ptr=turned, out_ptr=out, HALF=D // 2, BLOCK_D=padded(D // 2), **_strides("q", q),
        stride_tb=0 if len(cos) == 1 else cos.stride(0), stride_tm=cos.stride(1),
    )  # fmt: skip
    return turned, out


def _products(g, Lt, rows, need_dl, need_y):
    """(dL^T [KR, M], Y [KR, C]) of dK' [M, C], L^T [KR, M] and g R [KR, C], in float32; None where not needed."""
    if rows.shape[0] > MOST_ROWS:
        low = None if Lt is None else Lt.to(g.dtype)
        return (rows @ g.t()).float() if need_dl else None, (low @ g).float() if need_y else None
    dl = g.new_empty(rows.shape[0], g.shape[0], dtype=torch.float32) if need_dl else None
    one_pass = need_dl and need_y and fits_one_pass(g, rows.shape[0])
    if need_dl and not one_pass:
        project_down(g, rows, dl)
    return dl, branch_pass(g, Lt, rows, outer=True, down=dl if one_pass else None).sum(0) if need_y else None


def excitor_merge_bwd(g, L, rows, need_dl, need_y):
    Lt = L.t().contiguous() if need_y else None
    dl, y = _products(g.reshape(-1, g.shape[-1]).contiguous(), Lt, rows.contiguous(), need_dl, need_y)
    empty = g.new_empty(0, dtype=torch.float32)
    return empty if dl is None else dl.t().contiguous(), empty if y is None else y


def excitor_text_bwd(g, u, n, prompt, gate, need_dl, need_y):
    """(dU, dN, dP, dg) of text alone: the first two if ``need_dl``, the others if ``need_y``."""
    (K, C), R, H = prompt.shape, u.shape[2], gate.shape[0]
    g, (u, n, prompt, gate) = g.reshape(-1, C).contiguous(), (t.contiguous() for t in (u, n, prompt, gate))
    M = g.shape[0]
    wanted = (u, need_dl), (n, need_dl), (prompt, need_y), (gate, need_y)
    du, dn, dprompt, dgate = (t.new_empty(t.shape if need else 0) for t, need in wanted)
    blocks = {"BLOCK_M": SCORE_ROWS, "BLOCK_K": padded(K), "BLOCK_R": padded(R)}
    grid, how = (triton.cdiv(M, SCORE_ROWS),), {"u_ptr": u, "n_ptr": n, "M": M, "K": K, "R": R, **blocks}
    off = dict.fromkeys(("l_ptr", "dl_ptr", "du_ptr", "dn_ptr"))
    Lt = g.new_empty(K, M) if need_y else None
    if need_y and M:
        _excitor_scores_kernel[grid](**how | off | {"l_ptr": Lt}, BACKWARD=False)
    rows = (prompt.view(K, H, -1) * gate[:, None]).view(K, C).to(g.dtype)
    dl, y = _products(g, Lt, rows, need_dl, need_y)
    if need_dl:
        parts = g.new_empty(*grid, R, K, dtype=torch.float32)
        if M:
            _excitor_scores_kernel[grid](**how | off | {"dl_ptr": dl, "du_ptr": du, "dn_ptr": parts}, BACKWARD=True)
        dn.copy_(parts.sum(0, keepdim=True))
    if need_y:
        D = C // H
        _excitor_table_kernel[(H,)](
            y_ptr=y, prompt_ptr=prompt, gate_ptr=gate, dprompt_ptr=dprompt, dgate_ptr=dgate, C=C, D=D, K=K,
            BLOCK_K=padded(K), BLOCK_D=triton.next_power_of_2(D),
        )  # fmt: skip
    return du, dn, dprompt, dgate


def aot_cases(shared: int):
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        for image in (False, True):
            config, name = CONFIGS[image, size], f"excitor_merge/fwd/{'image' if image else 'text'}/{dtype}"
            pointers = {f"{n}_ptr": f"*{dtype}" for n in ("k", "u", "n", "z", "prompt", "up", "gate", "out")}
            names = ("M", "C", "D", "K", "V", "R", "STEPS", "stride_kb", "stride_kh", "stride_km", "stride_nb")
            blocks = {"BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C, "BLOCK_K": 32, "BLOCK_V": 32, "BLOCK_R": 16}
            constants = blocks | {"stride_kd": 1, "GROUPS": 1, "IMAGE": image, "IEEE": True, "STAGES": config.STAGES}
            options = {"num_warps": config.num_warps}
            yield name, _excitor_merge_fwd_kernel, pointers | dict.fromkeys(names, "i32"), constants, options
            if size == 4:  # spills, and is left to the parts
                continue
            turning = pointers | {f"{n}_ptr": f"*{dtype}" for n in ("q", "turned")} | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
            strides = (f"stride_{n}" for n in ("qb", "qh", "qm", "kb", "kh", "km", "tb", "tm", "nb"))
            blocks |= {"BLOCK_D": 64, "GROUPS": 1, "IMAGE": image, "IEEE": True, "STAGES": config.STAGES, "stride_qd": 1, "stride_kd": 1}
            signature = turning | dict.fromkeys(("M", "C", "HALF", "K", "V", "R", "STEPS", *strides), "i32")
            constants = {n: of for n, of in blocks.items() if n != "BLOCK_C"}
            yield name.replace("fwd", "turn"), _excitor_turn_fwd_kernel, signature, constants, options
        for name, backward in (("scores", False), ("scores/bwd", True)):
            pointers = {f"{n}_ptr": f"*{dtype}" for n in ("u", "n", "l", "du")} | {"dl_ptr": "*fp32", "dn_ptr": "*fp32"}
            blocks = {"BACKWARD": backward, "BLOCK_M": SCORE_ROWS, "BLOCK_K": 32, "BLOCK_R": 16}
            yield f"excitor_merge/{name}/{dtype}", _excitor_scores_kernel, pointers | dict.fromkeys(("M", "K", "R"), "i32"), blocks, {}
        pointers = {"y_ptr": "*fp32"} | {f"{n}_ptr": f"*{dtype}" for n in ("prompt", "gate", "dprompt", "dgate")}
        signature = pointers | dict.fromkeys(("C", "D", "K"), "i32")
        yield f"excitor_merge/table/{dtype}", _excitor_table_kernel, signature, {"BLOCK_K": 32, "BLOCK_D": 128}, {}
