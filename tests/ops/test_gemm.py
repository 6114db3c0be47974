"""Products in float32 where a CPU lacks 16-bit arithmetic (ops/_gemm.py), switched on here whatever this CPU has."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastpeft import _library, ops
from fastpeft.ops import _flash, _gemm
from fastpeft.ops.lora_linear import linear, lora_linear_reference

pytestmark = pytest.mark.skipif(_library.FORCED == "triton", reason="Triton's kernels multiply as they do on a GPU")
LOW = [torch.bfloat16, torch.float16]
PRODUCTS = ("lora_linear", "lora_linears", "attention", "excitor_keys", "mm_adapter", "norm_mm_adapter", "linear_cross", "absorbed")


@pytest.fixture
def lacking(monkeypatch):
    """A function that says whether this CPU lacks bfloat16 and float16 from here on."""
    return lambda lacks=True: monkeypatch.setattr(_gemm, "LACKING", tuple(LOW) if lacks else ())


def run_both(check, lacking, fn, inputs, needs):
    """(outputs and gradients) with products in the dtype itself, then in float32."""
    results = []
    for lacks in (False, True):
        lacking(lacks)
        outputs, grads = check.run(fn, inputs, needs)
        results.append(outputs + grads)
    return results


def test_what_this_cpu_lacks():
    """oneDNN is asked; a CPU with AVX2 alone multiplies neither."""
    assert set(_gemm.LACKING) <= set(LOW)
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert torch.bfloat16 in _gemm.LACKING
    assert all(_gemm.work_dtype(torch.ones(1, dtype=dtype)) == dtype for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("accepts, instructions, most, want", [
    (False, True, "", False), (True, True, "", True), (True, False, "", False), (True, True, "avx512_core", False),
    (True, True, "AVX512_CORE_BF16", True),
])  # fmt: skip
def test_the_rule(monkeypatch, accepts, instructions, most, want):
    """bfloat16 that oneDNN emulates on AVX-512 counts as lacking; float16 is as oneDNN says."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: accepts)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: accepts)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert _gemm._multiplies(torch.bfloat16) == want
    assert _gemm._multiplies(torch.float16) == accepts


@pytest.mark.parametrize("M, K, N", [(1, 40, 30), (2, 64, 70), (5, 33, 129), (7, 1, 9), (3, 8, 1), (0, 4, 5), (4, 0, 5)])
def test_products_by_blocks(monkeypatch, M, K, N):
    """Whatever a block holds and however the weight lies: float32's own product."""
    monkeypatch.setattr(_gemm, "BLOCK", 96)
    a, b = torch.randn(M, K), torch.randn(K, N).bfloat16()
    a = a.bfloat16().float()
    for weight in (b, b.t().contiguous().t(), torch.stack([b, b], 1)[:, 0], torch.stack([b, b], 2)[..., 0]):
        exact = M <= _gemm.FEW_ROWS and weight.stride(0) == 1
        tolerance = {"rtol": 1e-2, "atol": 1e-1} if exact or K == 1 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(_gemm.mm(a, weight), a @ b.float(), **tolerance)
        torch.testing.assert_close(_gemm.addmm_(torch.ones(M, N), a, weight), 1 + a @ b.float(), **tolerance)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_matmul(check, lacking, dtype):
    lacking()
    for shapes in (((5, 7), (7, 3)), ((4, 5, 7), (4, 7, 3)), ((5, 7), (4, 7, 3))):
        inputs = [torch.randn(shape).to(dtype) for shape in shapes]
        for needs in check.subsets(2):
            check.no_worse(_gemm.matmul, torch.matmul, torch.matmul, inputs, needs)
            leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs)]
            assert check.saved_bytes(_gemm.matmul, leaves) == sum(t.nbytes for t, need in zip(leaves, needs[::-1]) if need)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lora_linear_is_no_worse_than_pytorch(check, lacking, dtype):
    lacking()

    def ours(*args):
        return ops.lora_linear(*args, 0.7)

    def theirs(x, W, b, A, B):
        return F.linear(x, W, b) + F.linear(F.linear(x, A), B) * 0.7

    sizes = ((3, 7, 13), (9, 13), (9,), (3, 13), (9, 3))
    inputs = [(torch.randn(s) * (s[-1] ** -0.5 if i else 1.0)).to(dtype) for i, s in enumerate(sizes)]
    for needs in check.subsets(5):
        check.no_worse(ours, lambda *args: lora_linear_reference(*args, 0.7), theirs, inputs, needs)
    for needs in check.subsets(3):
        check.no_worse(linear, F.linear, F.linear, inputs[:3], needs)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_is_no_worse_than_pytorch(check, lacking, dtype, reduction, monkeypatch):
    from fastpeft.ops import _chunked_loss

    lacking()
    monkeypatch.setattr(_chunked_loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(_chunked_loss, "ROWS", 8)
    monkeypatch.setattr(_chunked_loss, "MIN_ROWS", 8)  # several chunks where there is no dW
    labels = torch.randint(0, 252, (3, 7))
    labels[torch.rand(3, 7) > 0.6] = -100
    inputs = [torch.randn(3, 7, 123).to(dtype), (torch.randn(252, 123) * 123**-0.5).to(dtype), torch.randn(252).to(dtype), labels]

    def theirs(hidden, weight, bias, labels):
        loss = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, -2), labels.flatten(), reduction=reduction)
        return loss.view(labels.shape) if reduction == "none" else loss

    for needs in check.subsets(3):
        check.no_worse(lambda *a: ops.linear_cross_entropy(*a, reduction=reduction), theirs, theirs, inputs, (*needs, False))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"key_padding_mask": True}])
@pytest.mark.parametrize("forward", [True, False])
def test_attention_is_no_worse_than_pytorch(check, lacking, monkeypatch, dtype, how, forward):
    """With a forward in 16 bit, and with neither."""
    how = dict(how)
    lacking()
    monkeypatch.setattr(_flash, "FORWARD_IN_16_BIT", forward)
    mask = torch.ones(2, 12, dtype=torch.bool) if how.pop("key_padding_mask", None) else None
    if mask is not None:
        mask[0, 7:] = False
    inputs = [torch.randn(2, 4, 12, 16).to(dtype), *(torch.randn(2, 2, 12, 16).to(dtype) for _ in range(2))]

    def theirs(q, k, v):
        allowed = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=bool(how), enable_gqa=True)

    for needs in check.subsets(3):
        check.no_worse(lambda *a: ops.attention(*a, key_padding_mask=mask, **how), theirs, theirs, inputs, needs)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_op_is_no_worse_than_in_its_own_dtype(check, lacking, table, dtype):
    """All ops that multiply, each gradient alone and all together: at most the error of the product in 16 bit, the same bytes saved."""
    rows = {name: row for name, row in table.items() if name.startswith(PRODUCTS) and not row.random}
    assert len(rows) > 12
    for name, row in rows.items():
        inputs = row.inputs(6, 24, dtype)
        all_needs = row.needs(inputs)
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        for needs in (all_needs, *(tuple(i == j for i in range(len(inputs))) for j in range(sum(all_needs)))):
            exact = itertools.chain(*check.run(row.reference, wide, needs))
            for own, got, truth in zip(*run_both(check, lacking, row.call, inputs, needs), exact):
                assert (got is None) == (truth is None) == (own is None)
                if got is not None:
                    assert got.dtype == own.dtype and got.shape == own.shape, name
                    error, before = check.error(got, truth, 1e-3), check.error(own, truth, 1e-3)
                    assert error <= 1.5 * before + torch.finfo(dtype).eps, (name, needs, error, before)
            saved = []
            for lacks in (False, True):
                lacking(lacks)
                leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs)]
                saved.append(check.saved_bytes(row.call, leaves, free=leaves))
            assert saved[1] <= saved[0], (name, needs, saved)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_no_product_is_left_in_16_bit(check, lacking, table, products, dtype):
    """Forward and backward of every op, dropout and small batches with a prefix among them."""
    lacking()
    heads = [torch.randn(2, 2, 3, 8) for _ in range(3)]
    sizes = ((5, 8), (6, 8), (6,), (2, 8), (6, 2))
    calls = {name: (row.call, row.inputs(6, 24), row.constants) for name, row in table.items()}
    calls |= {
        "small prefix": (lambda q, k, v, pk, pv: ops.attention(q, k, v, prefix=(pk, pv)), heads + [torch.randn(2, 4, 8)] * 2, 0),
        "dropout": (lambda q, k, v: ops.attention(q, k, v, dropout_p=0.5), heads, 0),
        "lora dropout": (lambda *a: ops.lora_linear(*a, 0.7, 0.5), [torch.randn(size) for size in sizes], 0),
        "linear": (linear, [torch.randn(size) for size in sizes[:3]], 0),
    }
    for name, (call, inputs, constants) in calls.items():
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        with products() as made:
            check.run(call, inputs, [i < len(inputs) - constants for i in range(len(inputs))])
        assert not made.in_16_bit(), (name, made.in_16_bit())
        assert made.seen or not name.startswith(PRODUCTS) or name.startswith("attention_inputs"), name  # these make none


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_dropout_draws_the_same_mask_in_backward(check, lacking, dtype):
    """The mask of the branch: dx is the gradient of the very output, whatever dtype the mask is drawn in."""
    lacking()
    eye, zero = torch.eye(24).to(dtype), torch.zeros(24, 24).to(dtype)
    x = torch.ones(40, 24).to(dtype).requires_grad_()
    y = ops.lora_linear(x, zero, None, eye, eye, 1.0, 0.5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, y) and 0.3 < float((y == 0).float().mean()) < 0.7


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_plain_layers_save_nothing_for_a_frozen_weight(check, lacking, dtype):
    lacking()
    x, weight = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(6, 8).to(dtype)
    assert check.saved_bytes(lambda x: linear(x, weight), [x], free=(weight,)) == 0
    with torch.autocast("cpu", dtype=dtype):
        assert linear(torch.randn(5, 8), torch.randn(6, 8)).dtype == dtype


def test_compiles(check, lacking):
    lacking()
    inputs = [torch.randn(shape).bfloat16() for shape in ((2, 3, 8), (6, 8), (6,))]
    check.compiles(linear, inputs)
    heads = [torch.randn(2, 2, 5, 8).bfloat16() for _ in range(3)]
    check.compiles(ops.attention, heads)


def test_float32_and_gpus_are_left_alone(lacking):
    lacking()
    assert not _gemm.widened(torch.ones(2)) and _gemm.widened(torch.ones(2).bfloat16())
    assert not _gemm.widened(torch.ones(2, device="meta").bfloat16())
    assert _gemm.work_dtype(torch.ones(2, device="meta").bfloat16()) == torch.bfloat16
