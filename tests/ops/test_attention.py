"""attention against its definition in float64, and against what users write around F.scaled_dot_product_attention."""

import importlib
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_cases import NAMES, calling, make, padding, pick, written_out
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpeft import _library
from fastpeft.ops import _gemm
from fastpeft.ops import attention_backends as backends
from fastpeft.ops.attention import attention, attention_reference

ours = importlib.import_module("fastpeft.ops.attention")  # fastpeft.ops has the function under that name
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
THIN = _library.FORCED == "triton"  # no kernel of this op is Triton's: its mode repeats the default one, thinned out


FEW = ours.FEW


@pytest.fixture(autouse=True)
def none_handed_over(monkeypatch):
    """Calls here are small: those with a prefix would go to SDPA."""
    monkeypatch.setattr(ours, "FEW", 0)


@pytest.mark.parametrize("dtype", DTYPES[:2] if THIN else DTYPES, ids=str)
@pytest.mark.parametrize("prefix, rescale", [*itertools.product((False, True), repeat=2)])
def test_every_case(check, dtype, prefix, rescale):
    sizes = ((1, 5, 9), (5, 9)) if dtype.itemsize > 2 else ((20,), (16, 24))  # 16 bit: enough terms that luck averages out
    for M, N, causal, padded in itertools.product(*sizes, (False, True), (False, True)):
        inputs = pick(make(3, 4, 2, M, N, 8 if dtype.itemsize > 2 else 32, dtype=dtype), prefix, rescale)
        options = {"causal": causal, "mask": padding(3, N) if padded else None, "prefix": prefix, "rescale": rescale}
        check.no_worse(calling(attention, **options), calling(attention_reference, **options), calling(written_out, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix, rescale", [*itertools.product((False, True), repeat=2)])
def test_every_gradient_subset(check, dtype, prefix, rescale):
    inputs = pick(make(dtype=dtype), prefix, rescale)
    options = {"mask": padding(2, 7), "causal": True, "prefix": prefix, "rescale": rescale}
    fns = [calling(fn, **options) for fn in (attention, attention_reference, written_out)]
    for needs in list(check.subsets(len(inputs)))[:: 5 if THIN else 1]:
        check.no_worse(*fns, inputs, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, N, d", [(1, 901, 64), (20, 257, 64), (252, 252, 7), (129, 129, 128)])
def test_longer_and_odd(check, dtype, M, N, d):
    inputs = make(1, 2, 1, M, N, d, dtype=dtype)[:3]
    options = {"causal": True, "prefix": False, "rescale": False}
    check.no_worse(calling(attention, **options), calling(attention_reference, **options), calling(written_out, **options), inputs)


def test_strided_and_broadcast(check):
    """Projections leave [B, M, H, d]; a cache is longer than what is used; one key set may serve the whole batch."""
    inputs = make()
    q = torch.randn(2, 5, 4, 8).transpose(1, 2)
    k = torch.randn(2, 2, 20, 8)[:, :, 4:11]
    v = torch.randn(1, 2, 7, 8).expand(2, -1, -1, -1)
    fns = [calling(fn) for fn in (attention, attention_reference, written_out)]
    check.no_worse(*fns, [q, k, v, *inputs[3:]])
    check.no_worse(*fns, [q.mT.contiguous().mT, *inputs[1:]])


@pytest.mark.parametrize("B, M, N", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(check, B, M, N):
    inputs = make(B, 4, 2, M, N)
    for prefix in (False, True):
        (o,), grads = check.run(calling(attention, prefix=prefix, rescale=False), pick(inputs, prefix, False))
        assert o.shape == (B, 4, M, 8)
        assert torch.isfinite(o).all() and all(torch.isfinite(g).all() for g in grads)
        assert prefix or N or (o == 0).all()


def test_nothing_to_attend_to_is_zero(check):
    """No key at all: output 0, gradient 0, on this path and on the one around SDPA."""
    q, k, v = make(2, 2, 2, 4, 6)[:3]
    mask = torch.zeros(2, 6, dtype=torch.bool)
    paths = [lambda *t: attention(*t, key_padding_mask=mask), lambda *t: backends.around_sdpa(*t, False, mask, 0.3, None, 0.0)]
    for path in paths:
        (o,), grads = check.run(path, [q, k, v])
        assert (o == 0).all() and all((g == 0).all() for g in grads)
    o = attention(q[:, :, :4], k[:, :, :2], v[:, :, :2], causal=True)  # queries 0 and 1 come before the first key
    assert (o[:, :, :2] == 0).all() and (o[:, :, 2:] != 0).all()


def test_scale(check):
    q, k, v = make()[:3]
    scaled = lambda fn: lambda q, k, v: fn(q, k, v, scale=0.3)  # noqa: E731
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)  # noqa: E731
    check.no_worse(scaled(attention), scaled(attention_reference), sdpa, [q, k, v])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(check, scale):
    inputs = [t.double() for t in make(2, 4, 2, 7, 7)[:3]]
    for causal, mask in itertools.product((False, True), (None, padding(2, 7))):
        how = {"scale": scale, "causal": causal, "key_padding_mask": mask}
        (got, grads), (want, wanted) = (check.run(partial(fn, **how), inputs) for fn in (attention, attention_reference))
        torch.testing.assert_close([*got, *grads], [*want, *wanted], rtol=1e-9, atol=1e-9)


def test_zero_factors():
    """(IA)^3 factors of exactly zero have their gradient: nothing is divided by them."""
    inputs = [t.double().requires_grad_() for t in pick(make(), False, True)]
    with torch.no_grad():
        inputs[3][:, ::2] = 0
        inputs[4][:, 1::2] = 0
    got, want = (torch.autograd.grad(calling(fn, prefix=False)(*inputs).sum(), inputs) for fn in (attention, attention_reference))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_saved_bytes(check):
    """q, k, v, o, lse and nothing of the prefix's or the factors' size times the batch."""
    B, H, G, M, N, d = 2, 4, 2, 5, 7, 8
    q, kv, lse = B * H * M * d * 4, B * G * N * d * 4, B * H * M * 4
    everything = 2 * q + 2 * kv + lse
    cases = [((), everything, "qkv"), (("P_k", "P_v"), everything, "qkv"), (("l_k", "l_v"), everything, "qkv")]
    cases += [(("P_k", "P_v", "l_k", "l_v"), everything, ("q", "k", "v", "P_k", "P_v", "l_k", "l_v"))]  # k and v before their factors
    cases += [(("P_k", "P_v"), 2 * q + lse, ()), (("l_k", "l_v"), q, ("l_v",)), ((), 0, ())]
    for extra, want, trained in cases:
        tensors = dict(zip(NAMES, make(B, H, G, M, N, d)))
        prefix, rescale = "P_k" in extra, "l_k" in extra
        trained = trained or (extra if prefix else ())
        leaves = [tensors[name].requires_grad_(name in trained) for name in NAMES[:3] + extra]
        assert check.saved_bytes(calling(attention, prefix=prefix, rescale=rescale), leaves, free=leaves[3:]) == want, (extra, trained)


@pytest.mark.parametrize("causal, padded", [*itertools.product((False, True), repeat=2)])
def test_few_scores_with_a_prefix(check, monkeypatch, causal, padded):
    """Handed over to SDPA around joined keys, below FEW of them; a quarter of it where only the prefix needs a gradient."""
    B, H, M, n, d = 2, 4, 7, 3, 8
    scores = B * H * M * (M + n)
    assert scores < FEW // 4
    inputs = make(B, H, H, M, M, d, n)[:5]
    options = {"causal": causal, "mask": padding(B, M) if padded else None, "rescale": False}
    fns = [calling(fn, **options) for fn in (attention, attention_reference, written_out)]
    q, joined, lse, mask = B * H * M * d * 4, B * H * (M + n) * d * 4, B * H * M * 4, 0
    if causal or padded:
        mask = (B if padded else 1) * (M if causal else 1) * (M + n) * 4
    alone = (False, False, False, True, True)
    for few, handed in ((4 * scores + 4, ((True,) * 5, alone)), (scores + 1, ((True,) * 5,)), (scores, ())):
        monkeypatch.setattr(ours, "FEW", few)
        for needs in ((True,) * 5, alone):
            check.no_worse(*fns, inputs, needs)
            leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs)]
            kept = check.saved_bytes(fns[0], leaves, free=leaves[3:])
            padded_bytes = B * M * padded if needs != alone else 0
            ours_keep = 2 * q + lse + (2 * q + padded_bytes if needs != alone else 0)
            assert kept == (2 * q + 2 * joined + lse + mask if needs in handed else ours_keep), (few, needs)


def test_flops(check):
    """Two products forward, five backward (one of them the scores again); the prefix's separately, over the folded batch."""
    B, H, M, N, d, n = 2, 4, 5, 7, 8, 3
    product = 2 * B * H * M * N * d
    inputs = make(B, H, 2, M, N, d, n)
    plain, prefixed = calling(attention, prefix=False, rescale=False), calling(attention, rescale=False)
    assert check.flops(lambda: plain(*inputs[:3])) == 2 * product
    assert check.flops(lambda: check.run(plain, inputs[:3])) == 7 * product
    assert check.flops(lambda: check.run(prefixed, inputs[:5])) == 7 * product * (N + n) // N


def test_prefix_alone_runs_the_prefix_part_only(check):
    B, H, M, N, d, n = 2, 4, 5, 7, 8, 3
    inputs = make(B, H, 2, M, N, d, n)[:5]
    needs = [False] * 3 + [True] * 2
    flops = check.flops(lambda: check.run(calling(attention, rescale=False), inputs, needs))
    assert flops == 2 * B * H * M * d * (2 * N + 7 * n)


def test_compiles_and_deterministic(check):
    for prefix, rescale in ((False, False), (True, False), (False, True)):
        fn, inputs = calling(attention, True, padding(2, 7), prefix, rescale), pick(make(), prefix, rescale)
        check.compiles(fn, inputs)
        check.deterministic(fn, inputs)


def test_gradcheck():
    inputs = [t.double().requires_grad_() for t in make(2, 2, 1, 3, 4, 3, 2)]
    assert torch.autograd.gradcheck(calling(attention, True, padding(2, 4)), inputs)
    assert torch.autograd.gradcheck(calling(attention_reference, True, padding(2, 4)), inputs)
    assert torch.autograd.gradcheck(calling(attention, True, padding(2, 4), prefix=False), inputs[:3] + inputs[5:])


def test_dropout():
    """Zero on average nothing: the mean over many draws is the output without dropout; gradients flow to every input."""
    inputs = [t.requires_grad_() for t in make()]
    extra = {"prefix": tuple(inputs[3:5]), "rescale": tuple(inputs[5:]), "key_padding_mask": padding(2, 7)}
    draws = torch.stack([attention(*inputs[:3], dropout_p=0.2, **extra) for _ in range(600)])
    want = attention(*inputs[:3], **extra)
    error = (draws.mean(0) - want).abs() / (draws.std(0) / 600**0.5 + 1e-6)
    assert error.max() < 5
    assert all((g != 0).any() for g in torch.autograd.grad(draws[0].sum(), inputs))
    torch.manual_seed(3)
    first = attention(*inputs[:3], dropout_p=0.2)
    torch.manual_seed(3)
    assert torch.equal(first, attention(*inputs[:3], dropout_p=0.2))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.randn(2, 4, 5)}, ValueError, "do not fit"),
        ({"q": torch.randn(2, 3, 5, 8)}, ValueError, "multiple"),
        ({"k": torch.randn(2, 2, 7, 8).double()}, TypeError, "one dtype"),
        ({"key_padding_mask": torch.ones(2, 7)}, ValueError, "True = attend"),
        ({"prefix": (torch.randn(2, 3, 9),) * 2}, ValueError, "pass .P_k, P_v."),
        ({"rescale": (torch.randn(8),) * 2}, ValueError, "pass .l_k, l_v."),
        ({"dropout_p": 1.0}, ValueError, "must lie in"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        attention(**(dict(zip(NAMES[:3], make())) | change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strategies_on_a_cpu(monkeypatch, dtype):
    """The rows of the module's table."""
    q, k = torch.randn(1, 2, 3, 4, dtype=dtype), torch.randn(1, 2, 5, 4, dtype=dtype)
    prefix, padding = (torch.randn(2, 2, 3, 4, dtype=dtype)).unbind(0), torch.ones(1, 5, dtype=torch.bool)
    trained = tuple(p.clone().requires_grad_() for p in prefix)
    for causal, mask in itertools.product((False, True), (None, padding)):
        assert ours._strategy(q, k, k, causal, mask, None, 0.0) == "plain"
        assert ours._strategy(q, k, k, causal, mask, prefix, 0.0) == "joined"
        assert ours._strategy(q, k.clone().requires_grad_(), k, causal, mask, trained, 0.0) == "joined"
        assert ours._strategy(q, k, k, causal, mask, trained, 0.0) == ("joined" if dtype.itemsize == 2 else "split")
        assert ours._strategy(q, k, k, causal, mask, None, 0.1) == ours._strategy(q, k, k, causal, mask, prefix, 0.1) == "dropout"
        assert ours._strategy(q[:, :, :0], k, k, causal, mask, None, 0.1) == "sdpa"
    monkeypatch.setattr(ours, "FEW", 1 << 18)
    lacks = _gemm.widened(q)
    assert ours._strategy(q, k, k, False, None, prefix, 0.0) == ("joined" if lacks else "sdpa")
    assert ours._strategy(q, k, k, False, None, None, 0.0) == "plain"


@settings(max_examples=10 if THIN else 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20),
    st.integers(1, 4), *[st.booleans()] * 4,
)  # fmt: skip
def test_any_shape(check, B, G, groups, M, N, d, n, causal, padded, prefix, rescale):
    torch.manual_seed(M)
    inputs = pick(make(B, G * groups, G, M, N, d, n, torch.float64), prefix, rescale)
    options = {"causal": causal, "mask": padding(B, N) if padded else None, "prefix": prefix, "rescale": rescale}
    fns = [calling(fn, **options) for fn in (attention, attention_reference, written_out)]
    check.no_worse(*fns, inputs, floor=1.0)
