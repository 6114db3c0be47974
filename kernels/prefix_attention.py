"""A prefix added to finished attention: its keys are read in place, one copy for the whole batch, and dP leaves summed over the batch.

    (o, lse) of the tokens -> (o', lse') of prefix and tokens: the online softmax goes on from (o, lse)     _prefix_attention_fwd_kernel
    P = exp(scale q P_k^T - lse')      dS = P (do P_v^T - rowsum(do o'))                                     _prefix_attention_bwd_kernel
    dq' = dq + scale dS P_k      dP_k = scale dS^T q      dP_v = P^T do

Shapes: q, o, do, dq [B, H, M, d], last dimension dense; lse [B, H, M]; P_k, P_v [H_kv, n, d]. The batch, the query heads that share a key
head and the positions are one axis of ROWS = B groups M: short questions fill tiles together. A backward program owns a span of rows,
with dP in registers, one partial per span, summed after in a fixed order. Prefixes of more than BLOCK_N keys take one launch for dq,
which sees all keys, and one for dP, which splits them. Softmax and accumulation in float32.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels.card import ieee, padded

BLOCK = {2: (32, 32), 4: (16, 16)}  # BLOCK_M, BLOCK_N by bytes of an element: float32 at 32 spilled thousands of registers
BWD_PROGRAMS = 512  # about two waves on 132 multiprocessors at two programs each: more would only be more partials


@triton.jit(do_not_specialize=["M", "ROWS", "stride_lb", "stride_lh"])
def _prefix_attention_fwd_kernel(
    q_ptr, o_ptr, lse_ptr, pk_ptr, pv_ptr, out_ptr, joint_ptr,
    ROWS, M, GROUPS, KEYS, D, stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om, stride_lb, stride_lh, stride_lm,
    stride_ph, stride_pn, scale,
    IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    pid_m, kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, offs_d = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d = row < ROWS, offs_d < D
    mask = mask_m[:, None] & mask_d
    b, h, m = row // (M * GROUPS), kv * GROUPS + row // M % GROUPS, row % M
    l_offs = b * stride_lb + h * stride_lh + m * stride_lm
    o_offs = (b * stride_ob + h * stride_oh + m * stride_om)[:, None] + offs_d
    q = tl.load(q_ptr + (b * stride_qb + h * stride_qh + m * stride_qm)[:, None] + offs_d, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    top = tl.load(lse_ptr + l_offs, mask=mask_m, other=0.0)
    acc = tl.load(o_ptr + o_offs, mask=mask & (top > float("-inf"))[:, None], other=0.0).to(tl.float32)  # no token: o may be nan
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    for start in range(0, KEYS, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < KEYS
        p_offs = kv * stride_ph + offs_n[:, None] * stride_pn + offs_d
        pk = tl.load(pk_ptr + p_offs, mask=mask_n[:, None] & mask_d, other=0.0).to(dtype)  # [BLOCK_N, BLOCK_D]
        pv = tl.load(pv_ptr + p_offs, mask=mask_n[:, None] & mask_d, other=0.0).to(dtype)
        score = tl.where(mask_n, tl.dot(q, tl.trans(pk), input_precision=precision) * scale, float("-inf"))  # [BLOCK_M, BLOCK_N]
        highest = tl.maximum(top, tl.max(score, 1))
        shrink = tl.exp(top - highest)
        prob = tl.exp(score - highest[:, None])
        acc = tl.dot(prob.to(dtype), pv, acc * shrink[:, None], input_precision=precision)
        total = total * shrink + tl.sum(prob, 1)
        top = highest
    tl.store(out_ptr + o_offs, (acc / total[:, None]).to(dtype), mask=mask)
    tl.store(joint_ptr + l_offs, top + tl.log(total), mask=mask_m)


@triton.jit(do_not_specialize=["M", "ROWS", "STEPS", "stride_lb", "stride_lh"])
def _prefix_attention_bwd_kernel(
    do_ptr, q_ptr, o_ptr, lse_ptr, pk_ptr, pv_ptr, dq_ptr, out_ptr, dpk_ptr, dpv_ptr,
    ROWS, M, GROUPS, KEYS, D, STEPS, stride_qb, stride_qh, stride_qm, stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    stride_lb, stride_lh, stride_lm, stride_ph, stride_pn, scale,
    NEED_DQ: tl.constexpr, NEED_DP: tl.constexpr, IEEE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    pid_s, kv, first = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_N
    heads, offs_d = tl.num_programs(1), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dpk, dpv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = first + BLOCK_N if NEED_DP else KEYS
    for step in range(0, STEPS):
        row = (pid_s * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = row < ROWS
        mask = mask_m[:, None] & mask_d
        b, h, m = row // (M * GROUPS), kv * GROUPS + row // M % GROUPS, row % M
        q = tl.load(q_ptr + (b * stride_qb + h * stride_qh + m * stride_qm)[:, None] + offs_d, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
        o_offs = (b * stride_ob + h * stride_oh + m * stride_om)[:, None] + offs_d
        do = tl.load(do_ptr + o_offs, mask=mask, other=0.0)
        delta = tl.sum(do.to(tl.float32) * tl.load(o_ptr + o_offs, mask=mask, other=0.0).to(tl.float32), 1)
        lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + m * stride_lm, mask=mask_m, other=0.0)
        if NEED_DQ:
            g_offs = (b * stride_gb + h * stride_gh + m * stride_gm)[:, None] + offs_d
            dq = tl.load(dq_ptr + g_offs, mask=mask, other=0.0).to(tl.float32)
        for start in range(first, last, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < KEYS
            p_offs = kv * stride_ph + offs_n[:, None] * stride_pn + offs_d
            pk = tl.load(pk_ptr + p_offs, mask=mask_n[:, None] & mask_d, other=0.0).to(dtype)  # [BLOCK_N, BLOCK_D]
            pv = tl.load(pv_ptr + p_offs, mask=mask_n[:, None] & mask_d, other=0.0).to(dtype)
            score = tl.where(mask_n, tl.dot(q, tl.trans(pk), input_precision=precision) * scale, float("-inf"))  # [BLOCK_M, BLOCK_N]
            prob = tl.exp(score - lse[:, None])
            ds = (prob * (tl.dot(do, tl.trans(pv), input_precision=precision) - delta[:, None])).to(dtype)
            if NEED_DP:
                dpk = tl.dot(tl.trans(ds), q, dpk, input_precision=precision)  # [BLOCK_N, BLOCK_D]
                dpv = tl.dot(tl.trans(prob.to(dtype)), do, dpv, input_precision=precision)
            if NEED_DQ:
                dq += tl.dot(ds, pk, input_precision=precision) * scale
        if NEED_DQ:
            tl.store(out_ptr + g_offs, dq.to(dtype), mask=mask)
    if NEED_DP:
        offs_n = first + tl.arange(0, BLOCK_N)
        partial = ((pid_s * heads + kv) * KEYS + offs_n[:, None]) * D + offs_d
        mask = (offs_n < KEYS)[:, None] & mask_d
        tl.store(dpk_ptr + partial, dpk * scale, mask=mask)
        tl.store(dpv_ptr + partial, dpv, mask=mask)


def _like(t: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    return t if t.stride() == layout.stride() else torch.empty_like(layout).copy_(t)


def _sizes(q, pk):
    (B, H, M, D), (heads, keys, _) = q.shape, pk.shape
    return {"ROWS": B * (H // heads) * M, "M": M, "GROUPS": H // heads, "KEYS": keys, "D": D}


def _prefix(pk, pv):
    """Both with one set of strides, as one projection's outputs have; else copies of these few rows."""
    if pk.stride() != pv.stride() or pk.stride(2) != 1:
        pk, pv = pk.contiguous(), pv.contiguous()
    return {"pk_ptr": pk, "pv_ptr": pv, "stride_ph": pk.stride(0), "stride_pn": pk.stride(1)}


def _strides(name, t):
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bhm", t.stride())}


def _options(itemsize, D):
    warps = 4 if D * itemsize <= 256 else 8
    return {"BLOCK_M": BLOCK[itemsize][0], "BLOCK_D": padded(D)}, {"num_warps": warps, "num_stages": 2}


def _common(q, pk, pv):
    """Every argument that both kernels take by the same name, but for tensors of the call's own."""
    keys, (blocks, options) = pk.shape[1], _options(q.element_size(), q.shape[3])
    blocks |= {
        "BLOCK_N": min(BLOCK[q.element_size()][1], padded(keys)),
        "IEEE": ieee(),
    }
    return _sizes(q, pk) | _prefix(pk, pv) | _strides("q", q) | blocks | options


def prefix_attention_fwd(q, o, lse, pk, pv, scale):
    """(o', lse'): o' laid out as o."""
    q, out, joint = q if q.stride(3) == 1 else q.contiguous(), torch.empty_like(o), torch.empty_like(lse)
    common = _common(q, pk, pv)
    grid = (triton.cdiv(common["ROWS"], common["BLOCK_M"]), pk.shape[0])
    if 0 not in grid:
        _prefix_attention_fwd_kernel[grid](
            q_ptr=q, o_ptr=_like(o, out), lse_ptr=_like(lse, joint), out_ptr=out, joint_ptr=joint, scale=scale, **_strides("o", out),
            **_strides("l", joint), **common,
        )  # fmt: skip
    return out, joint


def prefix_attention_bwd(do, q, o, lse, pk, pv, dq, scale, need_dp):
    """(dq', dP_k, dP_v) from the joint o and lse; empty where not needed. dq None: not needed."""
    need_dq, (heads, keys, D) = dq is not None, pk.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    out = torch.empty_like(dq) if need_dq else q.new_empty(0)
    common = _common(q, pk, pv)
    row_blocks, key_blocks = triton.cdiv(common["ROWS"], common["BLOCK_M"]), triton.cdiv(keys, common["BLOCK_N"])
    steps = max(1, triton.cdiv(row_blocks, triton.cdiv(BWD_PROGRAMS, heads * key_blocks)))
    spans = triton.cdiv(row_blocks, steps)
    dpk, dpv = (q.new_empty(spans if need_dp else 0, heads, keys, D, dtype=torch.float32) for _ in range(2))
    common |= _strides("o", o) | _strides("l", lse) | _strides("g", out if need_dq else q)
    together = need_dp and key_blocks == 1
    launches = [(need_dq, True)] if together else [(True, False)] * need_dq + [(False, True)] * need_dp
    for with_dq, with_dp in launches if row_blocks else ():
        _prefix_attention_bwd_kernel[(spans, heads, key_blocks) if with_dp else (row_blocks, heads, 1)](
            do_ptr=_like(do, o), q_ptr=q, o_ptr=o, lse_ptr=lse, dq_ptr=_like(dq, out) if need_dq else None, out_ptr=out, dpk_ptr=dpk,
            dpv_ptr=dpv, STEPS=steps if with_dp else 1, scale=scale, NEED_DQ=with_dq, NEED_DP=with_dp, **common,
        )  # fmt: skip
    if not need_dp:
        return out, pk.new_empty(0), pv.new_empty(0)
    return out, dpk.sum(0).to(pk.dtype), dpv.sum(0).to(pv.dtype)


def aot_cases(shared: int):
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        for D, keys in ((64, 32), (128, 32), (256, 32), *[(64, 10)] * (itemsize == 2)):  # ten keys: a narrower block
            blocks, options = _options(itemsize, D)
            blocks |= {"BLOCK_N": min(BLOCK[itemsize][1], padded(keys)), "IEEE": True}
            size = f"d{D}" + (f"/n{keys}" if keys < 32 else "")
            sizes = dict.fromkeys(("ROWS", "M", "GROUPS", "KEYS", "D", "stride_ph", "stride_pn"), "i32") | {"scale": "fp32"}
            strides = {f"stride_{name}{axis}": "i32" for name in "qol" for axis in "bhm"}
            pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "o", "pk", "pv", "out")} | {"lse_ptr": "*fp32"}
            signature = pointers | {"joint_ptr": "*fp32"} | sizes | strides
            yield f"prefix_attention/fwd/{size}/{dtype}", _prefix_attention_fwd_kernel, signature, blocks, options
            pointers |= {"do_ptr": f"*{dtype}", "dq_ptr": f"*{dtype}", "dpk_ptr": "*fp32", "dpv_ptr": "*fp32"}
            signature = pointers | sizes | {"STEPS": "i32"} | strides | {f"stride_g{axis}": "i32" for axis in "bhm"}
            for name, needs in (("bwd", (True, True)), ("dq", (True, False)), ("dp", (False, True))):
                flags = {"NEED_DQ": needs[0], "NEED_DP": needs[1]}
                yield f"prefix_attention/{name}/{size}/{dtype}", _prefix_attention_bwd_kernel, signature, blocks | flags, options
