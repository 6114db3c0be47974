"""Excitor's key merge: softmax, reconstruction, gate and sum in one read of K and one write of K'; backward in one read of dK'.

    K' = K + g (A_P P + E W_vu^T),  [A_P, A_I] = softmax(U N),  E = A_I Z         _excitor_merge_fwd_kernel
    dL = dK' (g R)^T,  Y = L^T dK'                                                _excitor_merge_bwd_kernel

Shapes: k [B, H, M, d], any strides; u [B, M, r]; n [B or 1, r, K + V]; z [B, V, r]; prompt [K, C]; wv_up [C, r]; gate [H];
L [B M, KR], R [KR, C], KR = K + r or K. A forward program owns BLOCK_M rows and STEPS blocks of columns: it makes A for itself,
from r numbers a row. A backward program owns a block of columns and a span of rows: Y stays in registers, dL leaves in one partial
per block of columns; both partials are summed after, in a fixed order. Softmax and accumulation in float32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastpeft.kernels.card import ieee, padded, shared_memory, stages


@dataclass(frozen=True)
class Merge:
    """Text: 32 scores a row, so that each block of columns makes its own. Images: hundreds, shared by STEPS blocks of columns."""

    BLOCK_M: int = 32
    BLOCK_C: int = 128
    STEPS: int = 1
    num_warps: int = 4


# by (image, bytes of an element): float32 with an image spilled at 32 x 128 on sm_80
CONFIGS = {
    (False, 2): Merge(),
    (False, 4): Merge(BLOCK_C=64),
    (True, 2): Merge(STEPS=8),
    (True, 4): Merge(BLOCK_C=32, STEPS=16, num_warps=8),
}
# partial sums, K (columns M + spans C) floats for some 128 programs, are the fewest about here; three tiles of 16 KB under way in each
BWD_ROWS, BWD_BYTES, BWD_PROGRAMS, BWD_STAGES = 32, 512, 128, 4


@triton.jit
def _keys(k_ptr, offs_m, mask_m, offs_c, end, D, stride_kh, stride_km, stride_kd):
    k_ptrs = k_ptr + offs_m[:, None] * stride_km + (offs_c // D) * stride_kh + (offs_c % D) * stride_kd
    return tl.load(k_ptrs, mask=mask_m[:, None] & (offs_c < end), other=0.0)  # [BLOCK_M, BLOCK_C]


@triton.jit(do_not_specialize=["M"])
def _excitor_merge_fwd_kernel(
    k_ptr, u_ptr, n_ptr, z_ptr, prompt_ptr, up_ptr, gate_ptr, out_ptr,
    M, C, D, K, V, R, stride_kb, stride_kh, stride_km, stride_kd, stride_nb,
    IMAGE: tl.constexpr, IEEE: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_c, pid_m, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = out_ptr.dtype.element_ty
    offs_m, offs_r, offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    mask_m, mask_r, mask_k = offs_m < M, offs_r < R, offs_k < K
    row = pid_b * M + offs_m
    k_ptr += pid_b * stride_kb
    offs_c = pid_c * STEPS * BLOCK_C + tl.arange(0, BLOCK_C)
    k = _keys(k_ptr, offs_m, mask_m, offs_c, C, D, stride_kh, stride_km, stride_kd)  # on its way while the scores are made
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
    for step in range(0, STEPS):
        mask_c = offs_c < C
        p = tl.load(prompt_ptr + offs_k[:, None] * C + offs_c, mask=mask_k[:, None] & mask_c, other=0.0).to(dtype)
        extra = tl.dot(prob, p, input_precision=precision)  # [BLOCK_M, BLOCK_C]
        if IMAGE:
            w = tl.load(up_ptr + offs_c * R + offs_r[:, None], mask=mask_r[:, None] & mask_c, other=0.0).to(dtype)
            extra = tl.dot(e, w, extra, input_precision=precision)
        gate = tl.load(gate_ptr + offs_c // D, mask=mask_c, other=0.0).to(tl.float32)
        merged = (k.to(tl.float32) + gate * extra).to(dtype)
        out_ptrs, mask = out_ptr + row[:, None] * C + offs_c, mask_m[:, None] & mask_c
        offs_c += BLOCK_C
        if STEPS > 1:
            end = tl.where(step + 1 < STEPS, C, 0)
            k = _keys(k_ptr, offs_m, mask_m, offs_c, end, D, stride_kh, stride_km, stride_kd)
        tl.store(out_ptrs, merged, mask=mask)


@triton.jit(do_not_specialize=["M", "STEPS"])
def _excitor_merge_bwd_kernel(
    g_ptr, l_ptr, r_ptr, dl_ptr, y_ptr, M, C, K, STEPS,
    NEED_DL: tl.constexpr, NEED_Y: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_c, pid_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype = g_ptr.dtype.element_ty
    offs_c, offs_k = pid_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    mask_c, mask_k = offs_c < C, offs_k < K
    if NEED_DL:
        r = tl.load(r_ptr + offs_k * C + offs_c[:, None], mask=mask_c[:, None] & mask_k, other=0.0).to(dtype)  # [BLOCK_C, BLOCK_K]
    y = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for step in range(0, STEPS):
        offs_m = (pid_s * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        g = tl.load(g_ptr + offs_m[:, None] * C + offs_c, mask=mask_m[:, None] & mask_c, other=0.0)  # [BLOCK_M, BLOCK_C]
        if NEED_DL:
            dl = tl.dot(g, r, input_precision=precision)  # [BLOCK_M, BLOCK_K]
            tl.store(dl_ptr + (pid_c * M + offs_m[:, None]) * K + offs_k, dl, mask=mask_m[:, None] & mask_k)
        if NEED_Y:
            l = tl.load(l_ptr + offs_m * K + offs_k[:, None], mask=mask_k[:, None] & mask_m, other=0.0)  # [BLOCK_K, BLOCK_M]
            y = tl.dot(l.to(dtype), g, y, input_precision=precision)
    if NEED_Y:
        tl.store(y_ptr + (pid_s * K + offs_k[:, None]) * C + offs_c, y, mask=mask_k[:, None] & mask_c)


def _bwd_blocks(K: int, g_size: int, l_size: int, shared: int) -> dict:
    """The widest block of columns whose sums stay in registers, 32,768 in 16 bit, and which leaves room for two tiles under way; a quarter
    of it elsewhere (half of it, at K = 128, spilled). Products of float32 without tensor cores hold more than their sums."""
    rows = padded(K)

    def fitting(columns):
        tile = BWD_ROWS * (columns * g_size + rows * l_size)
        return stages(BWD_STAGES, tile, rows * (columns * g_size + BWD_ROWS * 4), shared)

    sums = 32768 if g_size == 2 else 8192 if rows <= 64 else 4096
    columns = max(32, min(BWD_BYTES // g_size, sums // rows))
    if fitting(columns) < 3:
        columns = max(32, columns // 4)
    return {"BLOCK_M": BWD_ROWS, "BLOCK_C": columns, "BLOCK_K": rows, "num_warps": 8, "num_stages": fitting(columns)}


def excitor_merge_fwd(k, u, n, z, prompt, wv_up, gate):
    (B, _, M, D), (K, C), R = k.shape, prompt.shape, u.shape[2]
    out = k.new_empty(B, M, C)
    V = n.shape[2] - K
    config = CONFIGS[z is not None, k.element_size()]
    grid = (triton.cdiv(C, config.BLOCK_C * config.STEPS), triton.cdiv(M, config.BLOCK_M), B)
    if 0 in grid:
        return out
    n = n.contiguous()
    _excitor_merge_fwd_kernel[grid](
        k_ptr=k, u_ptr=u.contiguous(), n_ptr=n, z_ptr=None if z is None else z.contiguous(), prompt_ptr=prompt.contiguous(),
        up_ptr=None if wv_up is None else wv_up.contiguous(), gate_ptr=gate.contiguous(), out_ptr=out, M=M, C=C, D=D, K=K, V=V, R=R,
        stride_kb=k.stride(0), stride_kh=k.stride(1), stride_km=k.stride(2), stride_kd=k.stride(3),
        stride_nb=0 if n.shape[0] == 1 else n.stride(0), IMAGE=z is not None, IEEE=ieee(), STEPS=config.STEPS,
        BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, BLOCK_K=padded(K), BLOCK_V=min(32, padded(V)), BLOCK_R=padded(R),
        num_warps=config.num_warps, num_stages=2,
    )  # fmt: skip
    return out


def excitor_merge_bwd(g, L, rows, need_dl, need_y):
    C = g.shape[-1]
    g, L, rows, K = g.reshape(-1, C).contiguous(), L.contiguous(), rows.contiguous(), rows.shape[0]
    M = g.shape[0]
    blocks = _bwd_blocks(K, g.element_size(), L.element_size(), shared_memory(g))
    columns = triton.cdiv(C, blocks["BLOCK_C"])
    steps = max(1, triton.cdiv(triton.cdiv(M, BWD_ROWS), max(1, BWD_PROGRAMS // columns)))
    spans = triton.cdiv(M, BWD_ROWS * steps)
    dl = g.new_empty(columns if need_dl else 0, M, K, dtype=torch.float32)
    y = g.new_empty(spans if need_y else 0, K, C, dtype=torch.float32)
    if spans:
        _excitor_merge_bwd_kernel[(columns, spans)](
            g_ptr=g, l_ptr=L, r_ptr=rows, dl_ptr=dl, y_ptr=y, M=M, C=C, K=K, STEPS=steps, NEED_DL=need_dl, NEED_Y=need_y,
            IEEE=ieee(), **blocks,
        )  # fmt: skip
    return dl.sum(0) if need_dl else dl.view(-1), y.sum(0) if need_y else y.view(-1)


def aot_cases(shared: int):
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        for image in (False, True):
            config, name = CONFIGS[image, size], f"excitor_merge/fwd/{'image' if image else 'text'}/{dtype}"
            pointers = {f"{n}_ptr": f"*{dtype}" for n in ("k", "u", "n", "z", "prompt", "up", "gate", "out")}
            names = ("M", "C", "D", "K", "V", "R", "stride_kb", "stride_kh", "stride_km", "stride_nb")
            blocks = {"BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C, "BLOCK_K": 32, "BLOCK_V": 32, "BLOCK_R": 16}
            constants = blocks | {"stride_kd": 1, "IMAGE": image, "IEEE": True, "STEPS": config.STEPS}
            options = {"num_warps": config.num_warps, "num_stages": 2}
            yield name, _excitor_merge_fwd_kernel, pointers | dict.fromkeys(names, "i32"), constants, options
        pointers = {"g_ptr": f"*{dtype}", "l_ptr": "*fp32", "r_ptr": f"*{dtype}", "dl_ptr": "*fp32", "y_ptr": "*fp32"}
        signature = pointers | dict.fromkeys(("M", "C", "K", "STEPS"), "i32")
        for K in (32, 64, 128):
            blocks = _bwd_blocks(K, size, 4, shared)
            options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
            blocks |= {"NEED_DL": True, "NEED_Y": True, "IEEE": True}
            yield f"excitor_merge/bwd/{f'r{K}/' if K > 32 else ''}{dtype}", _excitor_merge_bwd_kernel, signature, blocks, options
