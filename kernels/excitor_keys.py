"""Excitor's key merge: softmax, reconstruction, gate and sum in one read of K and one write of K'; backward in one read of dK'.

    K' = K + g (A_P P + E W_vu^T),  [A_P, A_I] = softmax(U N),  E = A_I Z         _excitor_merge_fwd_kernel
    dL = dK' (g R)^T,  Y = L^T dK'                                                lora_branch.py's pass: those of a LoRA of KR ranks
    text: L^T, or dU = dS N^T and dN = U^T dS, dS = A (dA - rowsum(A dA))         _excitor_scores_kernel
          dP = g Y, dg_h = <Y_h, P_h>                                             _excitor_table_kernel

Shapes: k [B, H, M, d], any strides; u [B, M, r]; n [B or 1, r, K + V]; z [B, V, r]; prompt [K, C]; wv_up [C, r]; gate [H];
L [B M, KR], R [KR, C], KR = K + r or K. A program owns BLOCK_M rows and STEPS blocks of columns: it makes A for itself, from r numbers a
row, once for all columns where the rows alone give programs enough. With a program for each block of columns the merge took some 150 us
of an H200 at 8192 x 4096, where k's bytes ask for 37: 8,192 programs each waited for their scores. Softmax and accumulation in float32.
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


@triton.jit(do_not_specialize=["M", "STEPS"])
def _excitor_merge_fwd_kernel(
    k_ptr, u_ptr, n_ptr, z_ptr, prompt_ptr, up_ptr, gate_ptr, out_ptr,
    M, C, D, K, V, R, STEPS, stride_kb, stride_kh, stride_km, stride_kd, stride_nb,
    IMAGE: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid_c, pid_m, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = out_ptr.dtype.element_ty
    offs_m, offs_r, offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask_m, mask_r, mask_k = offs_m < M, offs_r < R, offs_k < K
    row = pid_b * M + offs_m
    k_ptr += pid_b * stride_kb
    u = tl.load(u_ptr + row[:, None] * R + offs_r, mask=mask_m[:, None] & mask_r, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    n_row = n_ptr + pid_b * stride_nb + offs_r[:, None] * (K + V)
    n = tl.load(n_row + offs_k, mask=mask_r[:, None] & mask_k, other=0.0).to(tl.float32)
    score = tl.where(mask_k, tl.dot(u, n, input_precision="ieee"), float("-inf"))  # [BLOCK_M, BLOCK_K]
    top = tl.max(score, 1)
    prob = tl.exp(score - top[:, None])
    total = tl.sum(prob, 1)
    if IMAGE:  # online softmax over the image's keys: 512 scores a row at once spilled 14,000 registers
        e = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
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
        e = (e / total[:, None]).to(dtype)
    prob = (prob / total[:, None]).to(dtype)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        offs_c = (pid_c * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c
        k_ptrs = k_ptr + offs_m[:, None] * stride_km + (offs_c // D) * stride_kh + (offs_c % D) * stride_kd
        k = tl.load(k_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
        p = tl.load(prompt_ptr + offs_k[:, None] * C + offs_c, mask=mask_k[:, None] & mask_c, other=0.0).to(dtype)
        extra = tl.dot(prob, p, input_precision=precision)  # [BLOCK_M, BLOCK_C]
        if IMAGE:
            w = tl.load(up_ptr + offs_c * R + offs_r[:, None], mask=mask_r[:, None] & mask_c, other=0.0).to(dtype)
            extra = tl.dot(e, w, extra, input_precision=precision)
        gate = tl.load(gate_ptr + offs_c // D, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(out_ptr + row[:, None] * C + offs_c, (k.to(tl.float32) + gate * extra).to(dtype), mask=mask)


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


def excitor_merge_fwd(k, u, n, z, prompt, wv_up, gate):
    (B, _, M, D), (K, C), R = k.shape, prompt.shape, u.shape[2]
    out = k.new_empty(B, M, C)
    V = n.shape[2] - K
    config = CONFIGS[z is not None, k.element_size()]
    row_blocks, columns = triton.cdiv(M, config.BLOCK_M), triton.cdiv(C, config.BLOCK_C)
    steps = triton.cdiv(columns, max(1, PROGRAMS // max(1, row_blocks * B)))
    grid = (row_blocks, triton.cdiv(columns, max(1, steps)), B)
    if 0 in grid:
        return out
    n = n.contiguous()
    _excitor_merge_fwd_kernel[grid](
        k_ptr=k, u_ptr=u.contiguous(), n_ptr=n, z_ptr=None if z is None else z.contiguous(), prompt_ptr=prompt.contiguous(),
        up_ptr=None if wv_up is None else wv_up.contiguous(), gate_ptr=gate.contiguous(), out_ptr=out, M=M, C=C, D=D, K=K, V=V, R=R,
        STEPS=steps, stride_kb=k.stride(0), stride_kh=k.stride(1), stride_km=k.stride(2), stride_kd=k.stride(3),
        stride_nb=0 if n.shape[0] == 1 else n.stride(0), IMAGE=z is not None, IEEE=ieee(), STAGES=config.STAGES,
        BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, BLOCK_K=padded(K), BLOCK_V=min(32, padded(V)), BLOCK_R=padded(R),
        num_warps=config.num_warps,
    )  # fmt: skip
    return out


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
            constants = blocks | {"stride_kd": 1, "IMAGE": image, "IEEE": True, "STAGES": config.STAGES}
            options = {"num_warps": config.num_warps}
            yield name, _excitor_merge_fwd_kernel, pointers | dict.fromkeys(names, "i32"), constants, options
        for name, backward in (("scores", False), ("scores/bwd", True)):
            pointers = {f"{n}_ptr": f"*{dtype}" for n in ("u", "n", "l", "du")} | {"dl_ptr": "*fp32", "dn_ptr": "*fp32"}
            blocks = {"BACKWARD": backward, "BLOCK_M": SCORE_ROWS, "BLOCK_K": 32, "BLOCK_R": 16}
            yield f"excitor_merge/{name}/{dtype}", _excitor_scores_kernel, pointers | dict.fromkeys(("M", "K", "R"), "i32"), blocks, {}
        pointers = {"y_ptr": "*fp32"} | {f"{n}_ptr": f"*{dtype}" for n in ("prompt", "gate", "dprompt", "dgate")}
        signature = pointers | dict.fromkeys(("C", "D", "K"), "i32")
        yield f"excitor_merge/table/{dtype}", _excitor_table_kernel, signature, {"BLOCK_K": 32, "BLOCK_D": 128}, {}
