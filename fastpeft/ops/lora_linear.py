"""Linear layers with LoRA branches, several sharing one input, and only the gradients that are asked for.

    S = D(x) A^T            y = x W^T + b + s S B^T             D: dropout of the branch's input (identity for p = 0)

    dS = s dy B             dx = dy W + D'(dS A)
    dA = dS^T D(x)          dB = s dy^T S                       dW = dy^T x             db = sum dy

Source: Hu et al., "LoRA" (2021), section 4.1; dropout where PEFT has it.
Shapes: x [..., in]; W [out, in]; b [out]; A [r, in]; B [out, r]; S, dS [R, M]: the ranks of all branches stacked, and transposed,
so that the skinny products read whole rows (measured: S^T dy 0.6 ms, dy^T S 1.8 ms at M = 2048, 768 x 768, 2 cores).
Accumulation: the GEMM's (float32, float64 for float64). A and B may be float32 masters over a bfloat16 trunk: their rounded
images meet x, their gradients come back in float32.

| gradient needed for | saved                                                  | computed in backward        |
|---------------------|--------------------------------------------------------|-----------------------------|
| x                   | nothing (W, A, B are parameters, no copy)              | one GEMM, one rank-R update |
| A                   | x, once for all projections (or its recipe)               | dS, dA                      |
| B                   | S: R elements a token, not x                           | dB                          |
| W                   | x (likewise)                                           | dW                          |
| b                   | nothing                                                | db                          |
| any, with dropout   | also a seed of 8 bytes: masks are redrawn, not saved     |                            |

W may be :class:`~fastpeft.ops._quantized_weight.QuantizedWeight`, a quantised weight: forward and backward each
dequantize it, and no copy is saved.

Moved through memory, in tensors of the sizes of x, y and W (x, dx: M K; y, dy: M N; W: N K), frozen W, all other gradients; what is R
wide is left out. Counted by tests/ops/test_traffic.py; kernels/lora_linear.py has what was measured.

| form           | forward         | launches | backward               | launches                       |
|----------------|-----------------|----------|------------------------|--------------------------------|
| CPU, float32   | 2 x + 3 y + W   |          | x + 3 dx + 2 dy + W    |                                |
| CUDA, C++      | 2 x + 3 y + W   | 3        | x + 3 dx + 3 dy + W    | 5                              |
| Triton         | 2 x + 3 y + W   | 2        | x + 3 dx + 2 dy + W    | 4, and a sum of dS's parts     |

Two forms that the CPU does not take, as they lose there (Intel Xeon, Sapphire Rapids, one thread, float32, rank 8, middle of 4 s,
interleaved; bench/ops/bench_lora_linear.py has the first, for GPUs to decide):
- [x | x A^T] [W | s B]^T as one product, x and W lying in buffers of K + R columns already. Forward over the frozen layer's, M x K x N,
  this and the form above: 700x768x768 1.17 and 1.11, 700x768x3072 1.10 and 1.02, 700x3072x768 1.08 and 1.09, 2048x768x768 1.13 and 1.07,
  2048x2048x2048 1.05 and 1.02, 1024x4096x4096 1.03 and 1.02: K + R is no multiple of the GEMM's tiles. Copying x there first: 1.05 to
  1.22. Both directions: 2048x768x768 1.26 and 1.14, 2048x768x2304 1.23 and 1.09, 2048x2048x2048 1.08 each, 4096x4096x4096 1.04 and 1.02.
- Three W of one input laid together, one product instead of three: forward 1.00 to 1.05 of their time, dx 0.98 to 1.07 with the dy copied
  together; at 35 rows 0.86 in the middle, 1.04 at the least.

On CUDA the first is not built either. Over the C++ form it saves one reading and writing of y, by a product whose K is a multiple of 64
more, where x's producer already writes into the wide buffer and S is one skinny product there; in backward dy is nobody's to lay out,
and copying it moves what the sum into dx does. Model (an H200's 4.2 TB/s and measured frozen pairs, bfloat16), in percent of the pair,
M x K x N: 8192x2048x2048 7, 8192x4096x4096 4, 8192x4096x11008 4, 8192x11008x4096 1; with x copied, less than 0 of a square; 8192x768x768
12, had its y not fitted into the L2. Measured at 4096 (bench/results/gpu_h200.md): 1.20 of the frozen pair with S made, and 1.21 the C++
form, by what Triton's passes took in both of these runs.
q, k and v of one input, 8192x4096x4096 each, share x's buffer, but S is shared already: of three frozen pairs (2049 us) the C++ form adds
1 x + 6 y in 4 launches, and 9 x in 8 in backward: 1.07 GB, 256 us. The buffer takes 6 y (96 us, 3 launches) for 3 products of 64 more
columns (16 us): 3.9 percent; 0.8 more were S written by the norm, which no row-wise kernel does (a row's 24 sums read all of A from the
caches, 24 times the row's bytes). With dq, dk, dv and dS in such buffers, too, 0.8 for dx, and 2.3 had the rotation's backward dS, a sum
over heads of which each of its groups sees two. For backward the buffer serves at once, dA and dB moving what they move.
Against it stands that W would have to lie in rows of K + R: a parameter that is a view, which a drop-in may not make of a model's own
(checkpoints, sharding and optimisers see its storage; a copy doubles a frozen base), and s B written beside it after each step.

csrc/autograd has the Function below in C++, and the products: on CPUs of calls in one dtype without dropout, the same to the bit at a
third of the host time (bench/results/host_cpu.md); on CUDA of all but mixed dtypes, by cuBLAS, which on an H200 took as long as Triton's
passes and a quarter of the host's time (bench/results/gpu_h200.md). Those passes serve where it was not built. Quantised weights,
and what PyTorch looks into, take Python's Function.

Projections sharing x (q, k, v; gate, up) go through :func:`lora_linears` together: one GEMM for all S, one dx, x saved once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft import _library
from fastpeft.ops import _gemm
from fastpeft.ops._autocast import first_order, under_autocast
from fastpeft.ops._common import check_floating, in_cpp, no_view, wants_grad
from fastpeft.ops._gemm import widened, work_dtype
from fastpeft.ops._quantized_weight import QuantizedWeight, dequantized, shape_placeholder
from fastpeft.ops._recompute import recipe_of, recompute, to_save
from fastpeft.ops._tiled import triton_launcher
from fastpeft.ops.dropout import masked, new_seed
from fastpeft.ops.low_rank_grads import low_rank_grads

DW, DB, DLA, DLB = 1, 2, 4, 8  # bits of `needs`: weight, bias, lora_A, lora_B


class Projection(NamedTuple):
    """One linear layer; ``lora_A`` and ``lora_B`` are both None where it has no branch."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0


def lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling) -> Tensor:
    """The definition, without dropout."""
    y = torch.nn.functional.linear(x, weight, bias)
    if lora_A is None:
        return y
    branch = torch.nn.functional.linear(torch.nn.functional.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return y + scaling * branch


def dropped(x: Tensor, p: float, seed: Tensor | None, index: int) -> Tensor:
    """x, with the mask of branch `index` drawn from the seed: PEFT's distribution, one independent mask per branch."""
    return x if p == 0.0 else masked(x, p, seed, index)


def _ranks(As):
    return [0 if A is None else A.shape[0] for A in As]


def _images(As, dtype):
    """The A's stacked, in the dtype they are multiplied in."""
    return As[0].to(dtype) if len(As) == 1 else torch.cat([A.to(dtype) for A in As])


def _adds_up(x2: Tensor, weight: Tensor) -> bool:
    """Whether the product with W is added to what the branch gives: nothing is rounded between, and a CPU's GEMM adds at no cost (12.9
    and 13.0 ms at 1024^3), where the bias would be a pass over y before it, and the branch one after it."""
    return x2.device.type == "cpu" and x2.dtype == weight.dtype and x2.dtype in (torch.float32, torch.float64)


def _branch_and_bias(rows: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """s S B^T + b, [M, out]: the bias as one more rank, whose S is one."""
    up = B.t().to(rows.dtype) * scaling
    if bias is not None:
        rows, up = torch.cat([rows, rows.new_ones(1, rows.shape[1])]), torch.cat([up, bias[None]])
    return torch.mm(rows.t(), up)


def _fwd(x, weights, biases, As, Bs, scalings, p, seed):
    """[y of each projection, S]."""
    work = work_dtype(x)
    x2 = x.reshape(-1, x.shape[-1]).to(work)
    ranks = _ranks(As)
    s = x2.new_empty(sum(ranks), x2.shape[0])
    rows = s.split(ranks)
    if p == 0.0 and s.shape[0]:
        torch.mm(_images([A for A in As if A is not None], work), x2.t(), out=s)
    ys = []
    for i, (W, b, A, B, scaling) in enumerate(zip(weights, biases, As, Bs, scalings)):
        if A is not None and p > 0.0:
            torch.mm(A.to(work), dropped(x2, p, seed, i).t(), out=rows[i])
        if A is not None and _adds_up(x2, W):
            y = _branch_and_bias(rows[i], B, b, scaling).addmm_(x2, W.t())
        else:
            y = _gemm.linear(x2, W, b)
            if A is not None:
                y.addmm_(rows[i].t(), B.to(work).t(), alpha=scaling)  # in place: y is read and written once more, never copied
        ys.append(y.to(x.dtype).view(*x.shape[:-1], W.shape[0]))
    return [*ys, s.to(x.dtype)]


def _fwd_fake(x, weights, biases, As, Bs, scalings, p, seed):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return [*(x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights), x.new_empty(sum(_ranks(As)), rows)]


def _branch_grads(flat, Bs, s, scalings, ranks, branches, trained):
    """(dS of all ``branches``, [R, M], its rows by branch, dB of those ``trained``), each dy read once for both. The dS lie together, so
    that dx and dA take one GEMM each."""
    ds, dbs, parts = {}, {}, () if s is None else s.split(ranks)
    for i, dy in flat.items():
        up, low = (Bs[i].to(dy.dtype) if i in branches else None), (parts[i].to(dy.dtype) if i in trained else None)
        rows, db = low_rank_grads(dy, up, low, scalings[i], Bs[i].dtype if low is not None else None)
        ds |= {} if rows is None else {i: rows}
        dbs |= {} if db is None else {i: db}
    if len(ds) < 2:
        return next(iter(ds.values()), None), ds, dbs
    stack = torch.cat(list(ds.values()))
    return stack, dict(zip(ds, stack.split([ranks[i] for i in ds]))), dbs


def _input_grad(flat, weights, As, stack, ds, p, seed):
    """dx [M, in], in the working dtype."""
    first, *others = flat
    if ds and p == 0.0 and _adds_up(flat[first], weights[first]):
        dx, others = torch.mm(stack.t(), _images([As[i] for i in ds], stack.dtype)), [first, *others]
    else:
        dx = _gemm.mm(flat[first], weights[first])
        if ds and p == 0.0:
            dx.addmm_(stack.t(), _images([As[i] for i in ds], dx.dtype))
    for i in others:
        _gemm.addmm_(dx, flat[i], weights[i])
    for i in ds if p > 0.0 else ():
        dx += dropped(ds[i].t() @ As[i].to(dx.dtype), p, seed, i)
    return dx


def _lora_A_grads(trained, x2, stack, ds, p, seed):
    """dA of each branch in ``trained``, in the working dtype."""
    if p > 0.0 or not trained:
        return {i: ds[i] @ dropped(x2, p, seed, i) for i in trained}
    rows = stack if trained == list(ds) else torch.cat([ds[i] for i in trained])  # dx alone may need some of the branches
    parts = (rows @ x2).split([ds[i].shape[0] for i in trained])
    return dict(zip(trained, parts if len(parts) == 1 else [part.clone() for part in parts]))  # an op's outputs share no storage


def _bwd(dys, x, weights, As, Bs, s, scalings, p, seed, need_dx, needs):
    """The needed gradients only, in the order dx, then of each projection dW, db, dA, dB."""
    ranks = _ranks(As)
    live = [i for i, dy in enumerate(dys) if dy is not None]
    like = dys[live[0]]
    work = work_dtype(like)
    x2 = None if x is None else x.reshape(-1, x.shape[-1]).to(work)
    flat = {i: dys[i].reshape(-1, dys[i].shape[-1]).to(work) for i in live}
    branches = [i for i in live if ranks[i] and (need_dx or needs[i] & DLA)]
    stack, ds, dbs = _branch_grads(flat, Bs, s, scalings, ranks, branches, [i for i in live if needs[i] & DLB])

    grads = []
    if need_dx:
        dx = _input_grad(flat, weights, As, stack, ds, p, seed)
        grads.append(dx.to(like.dtype).view(*like.shape[:-1], dx.shape[-1]))
    das = _lora_A_grads([i for i in live if needs[i] & DLA], x2, stack, ds, p, seed)
    for i in live:
        if needs[i] & DW:
            grads.append((flat[i].t() @ x2).to(like.dtype))
        if needs[i] & DB:
            grads.append(flat[i].sum(0).to(like.dtype))
        if needs[i] & DLA:
            grads.append(das[i].to(As[i].dtype))
        if needs[i] & DLB:
            grads.append(dbs[i])
    return grads


def _bwd_fake(dys, x, weights, As, Bs, s, scalings, p, seed, need_dx, needs):
    first = next(dy for dy in dys if dy is not None)
    grads = [first.new_empty(*first.shape[:-1], weights[0].shape[1])] if need_dx else []
    for dy, W, A, B, need in zip(dys, weights, As, Bs, needs):
        like = (W, W[:, 0], A, B)
        grads += [t.new_empty(t.shape) for bit, t in zip((DW, DB, DLA, DLB), like) if dy is not None and need & bit]
    return grads


def _on_triton(name, composite):
    """The kernels are for skinny branches: without one, or with more than 128 ranks together, the products are ATen's."""
    launch = triton_launcher("lora_linear", name, composite, draws=True)
    return lambda *args: (launch if 0 < sum(_ranks(args[3])) <= 128 else composite)(*args)


_fwd_on_triton, _bwd_on_triton = _on_triton("lora_linears_fwd", _fwd), _on_triton("lora_linears_bwd", _bwd)
_forward = _library.define(
    "lora_linears_fwd(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] lora_As, Tensor?[] lora_Bs, float[] scalings,"
    " float dropout_p, Tensor? seed) -> Tensor[]",
    fake=_fwd_fake,
    composite=_fwd,
    triton=_fwd_on_triton,
)
_backward = _library.define(
    "lora_linears_bwd(Tensor?[] dys, Tensor? x, Tensor[] weights, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor? s,"
    " float[] scalings, float dropout_p, Tensor? seed, bool need_dx, int[] needs) -> Tensor[]",
    fake=_bwd_fake,
    composite=_bwd,
    triton=_bwd_on_triton,
)
if _library.autograd:
    _library.autograd.serve_lora_linears(_fwd, _bwd, *((_fwd_on_triton, _bwd_on_triton) if _library.triton_serves() else (_fwd, _bwd)))


@_library.flop_formula(torch.ops.fastpeft.lora_linears_fwd)
def _fwd_flops(x, weights, biases, As, Bs, scalings, p, seed, *args, out_shape=None, **kwargs) -> int:
    rows = torch.Size(x[:-1]).numel()
    return sum(2 * rows * (W[0] * W[1] + (0 if A is None else A[0] * (W[0] + W[1]))) for W, A in zip(weights, As))


@_library.flop_formula(torch.ops.fastpeft.lora_linears_bwd)
def _bwd_flops(dys, x, weights, As, Bs, s, scalings, p, seed, need_dx, needs, *args, out_shape=None, **kwargs) -> int:
    total = 0
    for dy, W, A, need in zip(dys, weights, As, needs):
        if dy is None:
            continue
        r = 0 if A is None else A[0]
        per_row = W[0] * W[1] * (need_dx + bool(need & DW)) + r * W[1] * (need_dx + bool(need & DLA))
        per_row += r * W[0] * (bool(need_dx or need & DLA) + bool(need & DLB))
        total += 2 * torch.Size(dy[:-1]).numel() * per_row
    return total


class _LoRALinears(Function):
    @staticmethod
    def forward(ctx, scalings, p, seed, x, *params):
        ctx.set_materialize_grads(False)
        weights, biases, As, Bs = (list(params[i::4]) for i in range(4))
        *ys, s = _forward(x, [dequantized(W, x.dtype) for W in weights], biases, As, Bs, scalings, p, seed)
        _, _, _, ctx.need_dx, *flags = ctx.needs_input_grad
        ctx.needs = [sum(bit for bit, flag in zip((DW, DB, DLA, DLB), flags[i : i + 4]) if flag) for i in range(0, len(flags), 4)]
        ctx.scalings, ctx.p = scalings, p
        need_x, need_s = (any(need & bits for need in ctx.needs) for bits in (DW | DLA, DLB))
        ctx.recipe, kept = to_save(x if need_x else None)
        ctx.quantized = [W if isinstance(W, QuantizedWeight) else None for W in weights]
        dense = (None if isinstance(W, QuantizedWeight) else W for W in weights)
        ctx.save_for_backward(s if need_s else None, seed, *dense, *As, *Bs, *kept)
        return tuple(map(no_view, ys))

    @staticmethod
    @first_order
    def backward(ctx, *dys):
        s, seed, *params = ctx.saved_tensors
        n = len(dys)
        weights, As, Bs = params[:n], params[n : 2 * n], params[2 * n : 3 * n]
        out = [None] * (4 + 4 * n)
        if any(dy is not None for dy in dys):
            x = recompute(ctx.recipe, params[3 * n :])
            like = next(dy for dy in dys if dy is not None)
            as_needed = dequantized if ctx.need_dx else lambda W, _: shape_placeholder(W, like)  # only dx is a product with W
            weights = [W if stored is None else as_needed(stored, like.dtype) for W, stored in zip(weights, ctx.quantized)]
            grads = iter(_backward(list(dys), x, weights, As, Bs, s, ctx.scalings, ctx.p, seed, ctx.need_dx, ctx.needs))
            if ctx.need_dx:
                out[3] = next(grads)
            for i, need in enumerate(ctx.needs):
                for j, bit in enumerate((DW, DB, DLA, DLB)):
                    if dys[i] is not None and need & bit:
                        out[4 + 4 * i + j] = next(grads)
        return tuple(out)


def _check(x: Tensor, projection: Projection) -> None:
    weight, bias, A, B, _ = projection
    quantized = isinstance(weight, QuantizedWeight)
    check_floating("lora_linear", x=x, weight=None if quantized else weight, bias=bias, lora_A=A, lora_B=B)
    if len(weight.shape) != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; pass x [..., in] and weight [out, in]"
        )
    if not quantized and weight.dtype != x.dtype:
        raise TypeError(f"lora_linear: weight is {weight.dtype} and x is {x.dtype}; cast one to the other's")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"lora_linear: bias {tuple(bias.shape)} {bias.dtype}; pass shape [{weight.shape[0]}] in {x.dtype}")
    if (A is None) != (B is None):
        raise ValueError("lora_linear: one of lora_A, lora_B is None; pass both, or neither for a plain linear layer")
    if A is not None and (A.dim() != 2 or A.shape[1] != weight.shape[1] or B.shape != (weight.shape[0], A.shape[0])):
        raise ValueError(
            f"lora_linear: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit weight {tuple(weight.shape)};"
            f" pass lora_A [r, {weight.shape[1]}] and lora_B [{weight.shape[0]}, r]"
        )


@under_autocast("lower")
def lora_linears(x: Tensor, projections: Sequence[Projection | tuple], dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs of several linear layers of one input, each a :class:`Projection` (weight, bias, lora_A, lora_B, scaling).

    Weights and biases have x's dtype; adapters may have another. Dropout draws one independent mask per branch.
    Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    projections = [Projection(*p) for p in projections]
    if not projections:
        raise ValueError("lora_linears: no projections; pass at least one (weight, bias, lora_A, lora_B, scaling)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_linear: dropout_p is {dropout_p}; it must lie in [0, 1)")
    for projection in projections:
        _check(x, projection)
    projections = [p._replace(lora_A=None, lora_B=None) if p.lora_A is not None and not len(p.lora_A) else p for p in projections]
    scalings = [float(p.scaling) for p in projections]
    dropout_p = float(dropout_p) if any(p.lora_A is not None for p in projections) else 0.0
    seed = new_seed() if dropout_p > 0.0 else None
    params = [t for p in projections for t in p[:4]]
    if wants_grad(x, *params):
        quantized = any(isinstance(p.weight, QuantizedWeight) for p in projections)
        ys = None if quantized else in_cpp("lora_linears", x, params, scalings, dropout_p, seed, *to_save(x))
        if ys is not None:
            return tuple(ys)
        return _LoRALinears.apply(scalings, dropout_p, seed, x, *params)
    weights, biases, As, Bs = (params[i::4] for i in range(4))
    return tuple(_forward(x, [dequantized(W, x.dtype) for W in weights], biases, As, Bs, scalings, dropout_p, seed)[:-1])


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """``x W^T + b + scaling dropout(x) A^T B^T``: x [..., in], W [out, in], A [r, in], B [out, r] -> [..., out] in x's dtype.

    Dropout (probability ``dropout_p``) falls on the branch's input only, as in PEFT. A frozen weight gets no gradient, and x is
    then kept for lora_A alone. Raises ValueError or TypeError where shapes or dtypes do not fit.
    """
    return lora_linears(x, [(weight, bias, lora_A, lora_B, scaling)], dropout_p)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, which saves nothing for a trained weight where backward can recompute ``x`` (see _recompute.py), and multiplies in
    float32 where the CPU lacks x's dtype (see _gemm.py); W may be a QuantizedWeight."""
    if isinstance(weight, QuantizedWeight) or (_gemm.LACKING and widened(x)):
        return lora_linear(x, weight, bias, None, None)
    # a DTensor has __tensor_flatten__: PyTorch knows how its own operators are sharded
    if weight.requires_grad and recipe_of(x) is not None and torch.is_grad_enabled() and not hasattr(weight, "__tensor_flatten__"):
        return lora_linear(x, weight, bias, None, None)
    return torch.nn.functional.linear(x, weight, bias)
