"""Excitor's key merge: softmax, reconstruction, gate and sum in one read of K and one write of K'; backward in one read of dK'.

    K' = K + g (A_P P + E W_vu^T),  [A_P, A_I] = softmax(U N),  E = A_I Z         _excitor_merge_fwd_kernel
    dL = dK' (g R)^T,  Y = L^T dK'                                                lora_branch.py's pass: those of a LoRA of KR ranks

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
PROGRAMS = 256  # of a launch, where the rows give as many; else rows' scores are made again for a part of the columns


@triton.jit(do_not_specialize=["M", "STEPS"])
def _excitor_merge_fwd_kernel(
    k_ptr, u_ptr, n_ptr, z_ptr, prompt_ptr, up_ptr, gate_ptr, out_ptr,
    M, C, D, K, V, R, STEPS, stride_kb, stride_kh, stride_km, stride_kd, stride_nb,
    IMAGE: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid_c, pid_m, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
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


def excitor_merge_fwd(k, u, n, z, prompt, wv_up, gate):
    (B, _, M, D), (K, C), R = k.shape, prompt.shape, u.shape[2]
    out = k.new_empty(B, M, C)
    V = n.shape[2] - K
    config = CONFIGS[z is not None, k.element_size()]
    row_blocks, columns = triton.cdiv(M, config.BLOCK_M), triton.cdiv(C, config.BLOCK_C)
    steps = triton.cdiv(columns, max(1, PROGRAMS // max(1, row_blocks * B)))
    grid = (triton.cdiv(columns, max(1, steps)), row_blocks, B)
    if 0 in grid:
        return out
    n = n.contiguous()
    _excitor_merge_fwd_kernel[grid](
        k_ptr=k, u_ptr=u.contiguous(), n_ptr=n, z_ptr=None if z is None else z.contiguous(), prompt_ptr=prompt.contiguous(),
        up_ptr=None if wv_up is None else wv_up.contiguous(), gate_ptr=gate.contiguous(), out_ptr=out, M=M, C=C, D=D, K=K, V=V, R=R, STEPS=steps,
        stride_kb=k.stride(0), stride_kh=k.stride(1), stride_km=k.stride(2), stride_kd=k.stride(3),
        stride_nb=0 if n.shape[0] == 1 else n.stride(0), IMAGE=z is not None, IEEE=ieee(), STAGES=config.STAGES,
        BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, BLOCK_K=padded(K), BLOCK_V=min(32, padded(V)), BLOCK_R=padded(R),
        num_warps=config.num_warps,
    )  # fmt: skip
    return out


def excitor_merge_bwd(g, L, rows, need_dl, need_y):
    C = g.shape[-1]
    g, rows, (M, K) = g.reshape(-1, C).contiguous(), rows.contiguous(), L.shape
    L = L.t().contiguous() if need_y else None
    dl, y = (g.new_empty(0, dtype=torch.float32) for _ in range(2))
    if need_dl:
        dl = g.new_empty(K, M, dtype=torch.float32)
    one_pass = need_dl and need_y and fits_one_pass(g, K)
    if need_dl and not one_pass:
        project_down(g, rows, dl)
    if need_y:
        y = branch_pass(g, L, rows, outer=True, down=dl if one_pass else None).sum(0)
    return dl.t().contiguous() if need_dl else dl, y


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
