"""LoRA linear layers: the branch lies in the output before cuBLAS adds the frozen product to it.

    y_0 = b + s S B^T, S = D(x) A^T          then y = y_0 + x W^T by cuBLAS, whose epilogue reads y_0
    dx_0 = D'(dS A), dS = s dy B             then dx = dx_0 + dy W; dA = dS^T D(x), dB = s dy^T S

All but the products is in lora_branch.py: S and y_0 in one launch over x; dS and dB in one over dy; dA and dx_0 in one over x; sums.

Shapes: x [M, K]; W [N, K]; A [R, K]; B [N, R]; S, dS [R, M]. Accumulation in float32; operands of tl.dot in x's dtype.

Measured on an H200, bfloat16, 2026-11-26, microseconds of graph replays at 8192 x 4096 x 4096, r = 8, caches flushed:
- The frozen pair, x W^T and dy W, takes 683 to 735; forward and dx, dA, dB with the passes as they were 899 to 913, of which S 37, y_0 24,
  dS and dB 59, dA and dx_0 43, sums 7; reading y_0 and dx_0 in the epilogues 7. The bytes ask for 17, 17, 17, 34 and 1. The passes have
  changed since, and are not measured: every warp has columns of its own, S is fetched ahead, two and more programs share a multiprocessor.
- By ATen alone, in C++ (csrc/autograd/lora_linear.h): 878; at 8192 x 768 x 768 81 where the passes took 84, and the frozen pair 38. An
  eager call of five Triton kernels takes 1,100 of the host, of ATen's products in C++ 290: those serve, and these passes where
  csrc/autograd was not built. With 700 rows of 768, bound by launches, the passes took 31, ATen's products 48, PyTorch's own 38.
- Triton's own products lost, and are gone: S made in the loop 602 for the forward, S given 516; with TMA 511 and 401; cuBLAS 367.
- [x | S] [W | s B]^T as one product, S behind x already, and dx likewise: 1.12 times the frozen pair, 1.16 with the forward alone so.
"""

import torch
from fastpeft.kernels.lora_branch import branch_pass, fits_one_pass, project_down, reduce_grads

DW, DB, DLA, DLB = 1, 2, 4, 8


def _rows(t):
    """[..., C] as [M, C] with unit stride along C: a view wherever possible."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _stacked(As):
    return As[0] if len(As) == 1 else torch.cat(As)


def lora_linears_fwd(x, weights, biases, As, Bs, scalings, p, seed):
    ranks = [0 if A is None else A.shape[0] for A in As]
    x2, branches = _rows(x), [i for i, R in enumerate(ranks) if R]
    s = x2.new_empty(sum(ranks), x2.shape[0])
    parts, together = s.split(ranks), p == 0.0 and len(branches) > 1
    if together:  # branches that see the same x share one pass over it
        project_down(x2, _stacked([As[i] for i in branches]), s)
    ys = []
    for i, (W, b, A, B, scaling, part) in enumerate(zip(weights, biases, As, Bs, scalings, parts)):
        if not ranks[i]:
            ys.append(torch.nn.functional.linear(x2, W, b).view(*x.shape[:-1], W.shape[0]))
            continue
        y, b = x2.new_empty(x2.shape[0], W.shape[0]), None if b is None else b.contiguous()
        if together:
            branch_pass(None, part, B.t(), up=y, bias=b, scaling=scaling)
        else:
            project_down(x2, A, part, B=B, up=y, bias=b, up_scaling=scaling, p=p, seed=seed, index=i)
        ys.append(y.addmm_(x2, W.t()).view(*x.shape[:-1], W.shape[0]))
    return [*ys, s]


def _branch_grads(flat, Bs, S, dS, scalings, needs):
    """Fills dS and returns the parts of dB, both by branch; in 16 bit one pass over dy serves both."""
    dbs = {}
    for i, dy in flat.items():
        need_db, ds = bool(needs[i] & DLB), dS.get(i)
        if ds is not None and not (need_db and fits_one_pass(dy, ds.shape[0])):
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
    dx = first.new_empty(M, K) if need_dx else None
    stack = first.new_empty(sum(ranks[i] for i in branches), M, dtype=torch.float32)
    dS = dict(zip(branches, stack.split([ranks[i] for i in branches])))
    dbs = _branch_grads(flat, Bs, S, dS, scalings, needs)
    das = _lora_A_grads(x2, dx, stack, dS, As, needs, p, seed)
    begun = bool(branches)
    for i, dy in flat.items() if need_dx else ():
        dx.addmm_(dy, weights[i], beta=int(begun))
        begun = True
    out = [dx.view(*next(dy for dy in dys if dy is not None).shape[:-1], K)] if need_dx else []
    return out + _parameter_grads(flat, x2, As, Bs, das, dbs, needs)
