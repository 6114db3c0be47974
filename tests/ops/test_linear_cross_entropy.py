"""linear_cross_entropy against F.cross_entropy(F.linear(...)), with float64 as the truth."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops import linear_cross_entropy as op
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy_reference
from fastpeft.ops.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(dtype, V=252, C=123, rows=(3, 7), labelled=0.6):
    labels = torch.randint(0, V, rows)
    labels[torch.rand(rows) > labelled] = -100
    return [torch.randn(*rows, C).to(dtype), (torch.randn(V, C) * C**-0.5).to(dtype), torch.randn(V).to(dtype), labels]


def theirs(hidden, weight, bias, labels, softcap=0.0, **options):
    logits = F.linear(hidden, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
    return loss.view(labels.shape) if options.get("reduction") == "none" else loss


def triple(**options):
    return [lambda *inputs, f=f: f(*inputs, **options) for f in (op, linear_cross_entropy_reference, theirs)]


def test_backend():
    want = "triton (interpreted)" if _library.FORCED == "triton" else "composite"
    assert _library.backend_of()["linear_cross_entropy"]["CPU"].startswith(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_gradient_subset(check, dtype, reduction, smoothing):
    inputs = make(dtype)
    for needs in check.subsets(3):
        check.no_worse(*triple(reduction=reduction, label_smoothing=smoothing), inputs, (*needs, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_soft_cap(check, dtype, reduction):
    """A cap that bends most logits, over several chunks, for every subset of required gradients."""
    inputs = make(dtype)
    for needs in check.subsets(3):
        check.no_worse(*triple(reduction=reduction, softcap=1.5, label_smoothing=0.1), inputs, (*needs, False))


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_a_soft_cap_is_a_positive_number(bad):
    with pytest.raises(ValueError, match=r"softcap is .* a positive number"):
        op(*make(torch.float32), softcap=bad)


@pytest.mark.parametrize("V,C", [(1, 7), (7, 1), (257, 901), (901, 768), (5003, 33)])
def test_sizes(check, V, C):
    inputs = make(torch.float32, V, C, rows=(9,))
    check.no_worse(*triple(label_smoothing=0.1), inputs, floor=1.0 if V == 1 else 1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks(check, dtype, monkeypatch):
    module = importlib.import_module("fastpeft.ops._chunked_loss")
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "MIN_ROWS", 4)
    monkeypatch.setattr(module, "ROWS", 4)
    inputs = make(dtype, rows=(20,))
    assert module.chunk_rows(252, 20) == 4
    assert module.chunk_rows(32_000, 4096, device="cuda") >= 220, "fewer, and W is waited for"
    for reduction in ("mean", "none"):
        check.no_worse(*triple(reduction=reduction), inputs, (True, True, True, False))


def test_strided_and_other_ignored_label(check):
    hidden, weight, bias, labels = make(torch.float32)
    labels[labels < 0] = 3
    inputs = [hidden.transpose(0, 1), weight.t().contiguous().t(), bias[:1].expand(252), labels.t()]
    check.no_worse(*triple(ignore_index=3), inputs)
    check.no_worse(*[lambda h, w, y, f=f: f(h, w, None, y) for f in (op, linear_cross_entropy_reference, theirs)], [hidden, weight, labels])
    every = torch.randint(0, 252, (7, 2))[:, 1]  # all rows labelled, labels and the sum's gradient strided
    for reduction in ("mean", "none"):
        check.no_worse(*triple(reduction=reduction), [hidden[0], weight, bias, every])
    leaves = [t.detach().requires_grad_() for t in (hidden[0], weight)]
    got, want = (torch.autograd.grad(f(*leaves, bias, every, reduction="none").sum(), leaves) for f in (op, theirs))
    torch.testing.assert_close(got, want)
    one = [hidden[0, 0], weight, bias, labels[0, 0]]  # no batch at all
    check.no_worse(op, linear_cross_entropy_reference, lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(check, dtype):
    hidden, weight, bias, labels = make(dtype)
    check.no_worse(*triple(), [hidden * 100, weight, bias, labels])
    check.no_worse(*triple(), [torch.full_like(hidden, 3.0), weight, bias, labels])  # all rows alike


def test_impossible_words():
    """A bias of -inf forbids a word: probability and gradient exactly 0, no nan."""
    hidden, weight, bias, labels = make(torch.float32, labelled=1.0)
    labels.clamp_(min=10)
    bias[:10] = float("-inf")
    got, want = ([*inputs] for inputs in zip(*[(t.clone().requires_grad_(),) * 2 for t in (hidden, weight, bias)]))
    loss, exact = op(*got, labels), theirs(*want, labels)
    torch.testing.assert_close(loss, exact)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, got[1])[0]).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_labelled(check, reduction):
    inputs = make(torch.float32, labelled=0.0)
    (got,), grads = check.run(triple(reduction=reduction)[0], inputs)
    (want,), _ = check.run(triple(reduction=reduction)[2], inputs)
    torch.testing.assert_close(got, want, equal_nan=True)  # nan for mean, as in PyTorch
    assert all(not grad.any() for grad in grads[:3])
    empty = [inputs[0][:0], *inputs[1:3], inputs[3][:0]]
    (got,), grads = check.run(triple(reduction=reduction)[0], empty)
    assert grads[0].shape == (0, 7, 123) and not grads[1].any()


def test_upstream_gradient_scales_rows(check):
    inputs, weights = make(torch.float64), torch.rand(3, 7, dtype=torch.float64)
    ours, _, plain = triple(reduction="none")
    got = check.run(ours, inputs, (True, False, False, False), [weights])[1][0]
    want = check.run(plain, inputs, (True, False, False, False), [weights])[1][0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("labelled", [1.0, 0.6, 0.0])
def test_saved_bytes(check, labelled):
    """The docstring's table: labelled rows and, where there are others, their index."""
    hidden, weight, bias, labels = make(torch.bfloat16, labelled=labelled)
    n, M, C = int((labels >= 0).sum()), labels.numel(), hidden.shape[-1]
    assert (n == M) == (labelled == 1.0) and (n > 0) == (labelled > 0.0)
    index = 0 if n == M else 8 * n
    rows = 2 * n * C + index

    def saved(needs, **options):
        inputs = [t.clone().requires_grad_(need) for t, need in zip((hidden, weight, bias), needs)]
        return check.saved_bytes(lambda *a: op(*a, labels, **options), inputs, free=(*inputs[1:], labels))

    for reduction in ("mean", "sum", "none"):
        assert saved((True, False, False), reduction=reduction) == rows
    for reduction in ("mean", "sum"):
        assert saved((True, True, True), reduction=reduction) == rows + weight.nbytes + bias.nbytes
        assert saved((False, False, True), reduction=reduction) == index + bias.nbytes
    labels_of_rows = 0 if n == M else 8 * n
    for needs in check.subsets(3):
        if any(needs[1:]):  # h and y; logits are formed again
            assert saved(needs, reduction="none") == rows + labels_of_rows
    assert saved((False, False, False)) == 0


def test_what_remakes_the_input_is_saved_in_its_place(check):
    """A norm before the head: its own input is kept in any case, so with reduction "none" nothing is kept of its output."""
    hidden, weight, bias, labels = make(torch.float32)
    gamma, n = torch.rand(hidden.shape[-1]), int((labels >= 0).sum())
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]

    def run(h, w):
        return op(rms_norm(h, gamma, 1e-6), w, bias, labels, reduction="none")

    rstd, rows = 4 * labels.numel(), 8 * n + 8 * n
    assert check.saved_bytes(run, leaves, free=(*leaves, gamma, bias, labels)) == rstd + rows
    want = lambda h, w: theirs(rms_norm_reference(h, gamma, 1e-6), w, bias, labels, reduction="none")  # noqa: E731
    for got, exact in zip(check.run(run, leaves)[1], check.run(want, leaves)[1]):
        torch.testing.assert_close(got, exact)


def test_a_float16_mean_divides_late(check):
    """Entries of G / n below float16's smallest number keep their gradient: 1 / n is saved and multiplied in backward."""
    hidden, weight, bias, labels = make(torch.float16, labelled=1.0)
    leaf = hidden.clone().requires_grad_()
    assert check.saved_bytes(lambda h: op(h, weight, bias, labels), [leaf], free=(weight, bias, labels)) == hidden.nbytes + 4


def test_a_graph_kept_gives_the_same_gradient_again():
    """The last backward may give away what forward formed; those before it must not, whatever is done to what they gave."""
    hidden, weight, bias, labels = make(torch.float32)
    for upstream in (1.0, 0.25):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = op(*leaves, labels) * upstream
        want = torch.autograd.grad(theirs(*leaves, labels) * upstream, leaves)
        for time in range(3):
            loss.backward(retain_graph=time < 2)
            for leaf, exact in zip(leaves, want):
                torch.testing.assert_close(leaf.grad, (time + 1) * exact)


def test_a_tied_head_sums_both_gradients():
    """The head's gradient is handed on, not copied: the embedding's is added to it."""
    _, weight, _, labels = make(torch.float32, labelled=1.0)
    ids, grads = torch.randint(0, 252, (3, 7)), []
    for loss in (op, theirs):
        leaf = weight.clone().requires_grad_()
        loss(F.embedding(ids, leaf), leaf, None, labels).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_flops_are_of_labelled_rows(check):
    hidden, weight, bias, labels = make(torch.float32)
    once = 2 * int((labels >= 0).sum()) * weight.numel()

    def step(*needs, **options):
        inputs = [t.clone().requires_grad_(need) for t, need in zip((hidden, weight, bias), needs)]
        loss = op(*inputs, labels, **options)
        if any(needs):
            loss.sum().backward()

    assert check.flops(lambda: step(False, False, False)) == once
    assert check.flops(lambda: step(True, False, False)) == 2 * once
    assert check.flops(lambda: step(True, True, True)) == 3 * once
    assert check.flops(lambda: step(True, True, True, reduction="none")) == 4 * once


def test_reference_gradients():
    hidden, weight, bias, labels = make(torch.float64, 4, 3, rows=(3,))
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    for reduction in ("mean", "none"):
        options = {"label_smoothing": 0.2, "reduction": reduction}
        assert torch.autograd.gradcheck(lambda *a, o=options: linear_cross_entropy_reference(*a, labels, **o), inputs)
        assert torch.autograd.gradcheck(lambda *a, o=options: op(*a, labels, **o), inputs)


def test_registered_operator():
    hidden, weight, bias, labels = make(torch.float32, 7, 5, rows=(6,))
    target = torch.ops.fastpeft.linear_cross_entropy
    torch.library.opcheck(target, (hidden, weight, bias, labels, None, -100, 0.1, True, True, True))
    torch.library.opcheck(target, (hidden, weight, None, labels, torch.rand(6), -100, 0.0, True, False, False))
    torch.library.opcheck(target, (hidden, weight, bias, labels.clamp(min=0), torch.rand(6), None, 0.1, True, True, True))


def test_compiles_and_repeats(check):
    inputs = make(torch.float32)
    for reduction in ("mean", "none"):
        check.compiles(triple(reduction=reduction)[0], inputs, (True, True, True, False))
    check.compiles(triple()[0], inputs, (True, False, False, False))
    check.deterministic(triple()[0], inputs)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 8), V=st.integers(2, 40), smoothing=st.floats(0, 1), shift=st.floats(-50, 50))
def test_properties(rows, V, smoothing, shift):
    """A shift of all logits changes nothing, and each row's gradient in the bias sums to zero."""
    hidden, weight, bias, labels = make(torch.float64, V, 5, rows=(rows,), labelled=1.0)
    leaf = bias.clone().requires_grad_()
    loss = op(hidden, weight, leaf, labels, label_smoothing=smoothing)
    moved = op(hidden, weight, bias + shift, labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss.detach(), moved)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.sum().abs() < 1e-12


LOW, HIGH = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtypes", [(LOW, HIGH, HIGH), (HIGH, LOW, LOW), (LOW, HIGH, LOW), (torch.float16, LOW, LOW)], ids=str)
def test_hidden_and_head_of_different_dtypes(check, dtypes):
    """What PyTorch gives after the casts one would write by hand; gradients in the dtypes source."""
    *tensors, labels = make(torch.float64)
    inputs = [t.to(dtype) for t, dtype in zip(tensors, dtypes)]

    def cast(fn):
        return lambda *tensors: fn(*(t.float() for t in tensors[:3]), tensors[3])

    got, grads = check.run(op, [*inputs, labels])
    want, wanted = check.run(cast(theirs), [*inputs, labels])
    torch.testing.assert_close(got[0], want[0])
    for value, exact, source in zip(grads, wanted, inputs):
        assert value.dtype == source.dtype
        torch.testing.assert_close(value, exact, atol=1e-6, rtol=1e-2 if source.dtype.itemsize == 2 else 1e-5)


def test_errors_say_what_to_do():
    hidden, weight, bias, labels = make(torch.float32)
    with pytest.raises(ValueError, match=r"pass \[\.\.\., C\] and \[V, C\]"):
        op(hidden, weight.t(), bias, labels)
    with pytest.raises(ValueError, match="one per row of weight"):
        op(hidden, weight, bias[:3], labels)
    with pytest.raises(TypeError, match=r"labels.long\(\)"):
        op(hidden, weight, bias, labels.int())
    with pytest.raises(ValueError, match="leading shape"):
        op(hidden, weight, bias, labels[:1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        op(hidden, weight, bias, labels, label_smoothing=2.0)
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        op(hidden, weight, bias, labels, reduction="max")
    with pytest.raises(IndexError, match="outside"):
        op(hidden, weight, bias, labels.clamp(min=252))
