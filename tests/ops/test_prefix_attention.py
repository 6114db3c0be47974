"""join_prefix and its backward against attention to prefix and tokens in float64; and CUDA's path through attention, on stand-ins."""

import importlib
import itertools

import pytest
import torch

from fastpeft import _library
from fastpeft.ops.attention import attention, attention_reference
from fastpeft.ops.prefix_attention import join_prefix, join_prefix_bwd

module = importlib.import_module("fastpeft.ops.attention")  # fastpeft.ops has the function under that name
flash_module = importlib.import_module("fastpeft.ops._flash")
INTERPRETED = _library.FORCED == "triton"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SCALE = 0.3


@pytest.fixture(autouse=True)
def none_handed_over(monkeypatch):
    """Calls here are small: those with a prefix would go to SDPA. Rows before the keys have test_attention_inputs.py."""
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setattr(module, "reserved_pays", lambda *a: False)


def make(B=2, H=4, G=2, M=7, N=9, d=32, n=5, dtype=torch.float32, params=None):
    """q, k, v, do as projections leave them, [B, M, H, d] in memory; P_k, P_v [G, n, d]."""
    q, k, v, do = (torch.randn(B, m, h, d).to(dtype).transpose(1, 2) for m, h in ((M, H), (N, G), (N, G), (M, H)))
    return q, k, v, do, *(torch.randn(G, n, d).to(params or dtype) for _ in range(2))


def tokens(q, k, v, alive=None):
    """o and lse of attention to the tokens alone, formed in float64."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.double().mT * SCALE
    o, lse = (scores.softmax(-1) @ v.double()).transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1)
    return o.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))


def truth(q, k, v, do, pk, pv):
    """O, lse and the gradients of q, P_k and P_v, whole and the tokens' share of q's, by autograd on the definition in float64."""
    q, k, v, do, pk, pv = (t.detach().double() for t in (q, k, v, do, pk, pv))
    leaves = [t.requires_grad_() for t in (q, pk, pv)]
    o = attention_reference(q, k, v, scale=SCALE, prefix=(pk, pv))
    keys = torch.cat([pk.expand(q.shape[0], -1, -1, -1), k], 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    lse = (q @ keys.mT * SCALE).logsumexp(-1)
    grads = torch.autograd.grad(o, leaves, do)
    with torch.no_grad():
        keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        P = (q @ keys.mT * SCALE - lse[..., None]).exp()
        share = SCALE * (P * (do @ values.mT - (do * o).sum(-1, keepdim=True))) @ keys
    return o.detach(), lse.detach(), grads, share


def compare(check, tensors, needs=((True, True), (True, False), (False, True), (False, False)), slack=1):
    q, k, v, do, pk, pv = tensors
    o, lse, grads, share = truth(*tensors)
    tolerance = slack * TOLERANCE[q.dtype]
    got, joint = join_prefix(q, *tokens(q, k, v), pk, pv, SCALE)
    assert check.error(got, o) <= tolerance and check.error(joint, lse) <= tolerance
    exact = o.to(q.dtype).contiguous(), lse.to(joint.dtype)
    for need_dq, need_dp in needs:
        dq = share.to(q.dtype) if need_dq else None
        dq, *dp = join_prefix_bwd(do, q, *exact, pk, pv, dq, SCALE, need_dp)
        wanted = [grads[0] if need_dq else None, *(grads[1:] if need_dp else (None, None))]
        for value, want, like in zip((dq, *dp), wanted, (q, pk, pv)):
            assert value.numel() == 0 if want is None else check.error(value, want) <= 2 * tolerance
            assert value.dtype == like.dtype


def test_backend():
    for name in ("prefix_attention_fwd", "prefix_attention_bwd"):
        assert _library.backend_of()[name]["CPU"].startswith("triton" if INTERPRETED else "composite")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("M, n, d", [(1, 1, 32), (7, 5, 64), (20, 10, 64), (7, 30, 128), (5, 70, 16), (9, 3, 24)])
def test_against_float64(check, dtype, M, n, d):
    for heads in (4, 2, 1):
        compare(check, make(G=heads, M=M, n=n, d=d, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(check, monkeypatch, dtype):
    """More blocks of rows than programs: each sums over a span of several, the last one short."""
    if INTERPRETED:
        monkeypatch.setattr(importlib.import_module("fastpeft.kernels.prefix_attention"), "BWD_PROGRAMS", 6)
    for n in (10, 40):
        compare(check, make(B=3, M=57, N=2, d=16, n=n, dtype=dtype), needs=[(True, True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_prefix_over_16_bit(check, dtype):
    compare(check, make(dtype=dtype, params=torch.float32))


def test_strides(check):
    """q of another layout than o; a cotangent that is expanded; prefixes cut out of one projection's output, or of two layouts."""
    q, k, v, do, pk, pv = make()
    both = torch.randn(5, 3, 2, 2, 32)[:, 1].permute(1, 2, 0, 3)  # [2, G, n, d]
    compare(check, (q.contiguous(), k, v, torch.randn(32).expand_as(do), *both))
    compare(check, (q.mT.contiguous().mT, k, v, do, pk.transpose(0, 1).contiguous().transpose(0, 1), pv))


def test_very_low_scores(check):
    """Scores near -120: exp(0 - lse), what a key that only fills the block would give, is beyond float32.
    The scores themselves are rounded to 120 2^-24."""
    q, k, v, do, pk, pv = make()
    q[..., 0], k[..., 0], pk[..., 0] = 400, -1, -1
    compare(check, (q, k, v, do, pk, pv), slack=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_query_without_tokens_sees_the_prefix_alone(check, dtype):
    q, k, v, _, pk, pv = make(dtype=dtype)
    o, lse = tokens(q, k, v)
    o[:, :, 2], lse[:, :, 2] = torch.nan, -torch.inf
    got, joint = join_prefix(q, o, lse, pk, pv, SCALE)
    alone = [t.repeat_interleave(2, 0).double() for t in (pk, pv)]
    scores = q[:, :, 2:3].double() @ alone[0].mT * SCALE
    assert check.error(got[:, :, 2:3], scores.softmax(-1) @ alone[1]) <= TOLERANCE[dtype]
    assert check.error(joint[:, :, 2], scores.logsumexp(-1)[:, :, 0]) <= TOLERANCE[dtype]


def test_operators():
    """Schemas, fakes and aliasing, as torch.library checks them."""
    q, k, v, do, pk, pv = make()
    o, lse = tokens(q, k, v)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(join_prefix, (q, o, lse, pk, pv, SCALE), test_utils=tests)
    for dq, need in ((torch.randn_like(q), True), (None, True), (torch.randn_like(q), False)):
        torch.library.opcheck(join_prefix_bwd, (do, q, o, lse, pk, pv, dq, SCALE, need), test_utils=tests)


def test_deterministic():
    q, k, v, do, pk, pv = make(B=3, M=70)
    o, lse = join_prefix(q, *tokens(q, k, v), pk, pv, SCALE)
    first, second = (join_prefix_bwd(do, q, o, lse, pk, pv, torch.zeros_like(q), SCALE, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("causal, M, N", [(False, 5, 9), (True, 9, 9), (True, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_through_attention(check, monkeypatch, dtype, causal, M, N):
    """CUDA's path in 16 bit, with the CPU's flash in place of CUDA's: every subset of gradients."""
    monkeypatch.setattr(module, "_joined", lambda q, alone: False)
    q, k, v, _, pk, pv = make(M=M, N=N, dtype=dtype)
    call = lambda fn: lambda q, k, v, *p: fn(q, k, v, causal=causal, scale=SCALE, prefix=p)  # noqa: E731
    wide = [t.double() for t in (q, k, v, pk, pv)]
    for needs in list(check.subsets(5))[:: 6 if INTERPRETED else 1]:
        got, want = check.run(call(attention), (q, k, v, pk, pv), needs), check.run(call(attention_reference), wide, needs)
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert (value is None) == (exact is None)
            assert exact is None or check.error(value, exact, floor=0.1) <= 3 * TOLERANCE[dtype]


class Efficient:
    """CUDA's efficient attention as its sources say it behaves: what it asks of a mask, an output and a log-sum-exp, and nan for a
    query without a key. Forward and backward by the definition, in float64."""

    masks = 0  # calls that had one

    @staticmethod
    def scores(q, k, mask, causal, scale):
        assert q.shape[1] == k.shape[1], "no grouped heads"
        s = q.double() @ k.double().mT * scale
        if mask is not None:
            Efficient.masks += 1
            assert mask.shape == s.shape and mask.dtype == q.dtype and mask.stride(3) == 1
            assert all(stride % 8 == 0 for stride in mask.stride()[:3]), "rows are read by 16 bytes"
            s = s + mask.double()
        return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf) if causal else s

    @classmethod
    def forward(cls, q, k, v, mask, compute_lse, p, causal, *, scale):
        assert compute_lse and p == 0.0
        s = cls.scores(q, k, mask, causal, scale)
        lse = torch.nn.functional.pad(s.logsumexp(-1), (0, -q.shape[2] % 32), value=torch.inf).float()
        seed = torch.zeros((), dtype=torch.int64)
        return (s.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse, seed, seed

    @classmethod
    def backward(cls, do, q, k, v, mask, o, lse, seed, offset, p, needs, causal, *, scale):
        M = q.shape[2]
        assert do.transpose(1, 2).is_contiguous() and o.transpose(1, 2).is_contiguous() and lse.is_contiguous() and p == 0.0
        assert lse.shape[2] % 32 == 0 and torch.isposinf(lse[:, :, M:]).all()
        P = (cls.scores(q, k, mask, causal, scale) - lse[:, :, :M, None].double()).exp()
        do = do.double()
        dS = P * (do @ v.double().mT - (do * o.double()).sum(-1, keepdim=True)) * scale
        return (dS @ k.double()).to(q.dtype), (dS.mT @ q.double()).to(k.dtype), (P.mT @ do).to(v.dtype), None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal, M, N", [(False, 5, 9), (True, 9, 9), (True, 1, 9), (True, 5, 7), (True, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_efficient_through_attention(check, monkeypatch, dtype, causal, M, N, padded):
    """CUDA's path in float32 and with padding (to the left, to the right, a sample of padding alone), on a stand-in for its kernel."""
    monkeypatch.setattr(module, "_joined", lambda q, alone: False)
    monkeypatch.setattr(flash_module, "kernel_of", lambda *a: "efficient")
    monkeypatch.setattr(flash_module, "_efficient", Efficient.forward)
    monkeypatch.setattr(flash_module, "_efficient_bwd", Efficient.backward)
    monkeypatch.setattr(Efficient, "masks", 0)
    q, k, v, _, pk, pv = make(B=4, M=M, N=N, dtype=dtype)
    mask = None
    if padded:
        mask = torch.ones(4, N, dtype=torch.bool)
        mask[0, :2], mask[1, -2:], mask[2] = False, False, False
    call = lambda fn: lambda q, k, v, *p: fn(q, k, v, causal=causal, key_padding_mask=mask, scale=SCALE, prefix=p)  # noqa: E731
    wide = [t.double() for t in (q, k, v, pk, pv)]
    for needs in list(check.subsets(5))[:: 10 if INTERPRETED else 3]:
        got, want = check.run(call(attention), (q, k, v, pk, pv), needs), check.run(call(attention_reference), wide, needs)
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert (value is None) == (exact is None)
            assert exact is None or check.error(value, exact, floor=0.1) <= 3 * TOLERANCE[dtype]
    assert (Efficient.masks > 0) == (padded or (causal and M not in (1, N)))


def test_cuda_signatures():
    """CUDA's kernels are called as their schemas say: ATen's shape functions take the same arguments on meta tensors."""
    q, k, v, do, *_ = (t.to("meta") for t in make(G=4, dtype=torch.bfloat16))
    mask = torch.zeros(2, 1, 1, 9, dtype=torch.bfloat16, device="meta")
    for kernel, given in (("flash", None), ("efficient", None), ("efficient", mask)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash_module, "kernel_of", lambda *a, kernel=kernel: kernel)
            o, lse = flash_module.flash(q, k, v, False, given, SCALE)
            assert o.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
            grads = flash_module.flash_bwd(do, q, k, v, o, lse, False, given, SCALE)
            assert [t.shape for t in grads] == [q.shape, k.shape, v.shape]


def test_which_kernel_takes_what(monkeypatch):
    """With a prefix on CUDA: flash in 16 bit without a mask, else the efficient kernel; SDPA for float64, dropout and no prefix."""

    class Cuda(torch.Tensor):
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda")

    asked = []
    monkeypatch.setattr(flash_module, "can_use_flash_attention", lambda params: asked.append("flash") or True)
    monkeypatch.setattr(flash_module, "can_use_efficient_attention", lambda params: asked.append("efficient") or True)
    for dtype, M, N, causal, padded, prefixed, p in itertools.product(TOLERANCE, (1, 5), (5, 9), *[(False, True)] * 3, (0.0, 0.1)):
        q, k = (torch.empty(2, 4, m, 64, dtype=dtype).as_subclass(Cuda) for m in (M, N))
        asked.clear()
        got = module._strategy(q, k, k, causal, k if padded else None, k if prefixed else None, p)
        split = prefixed and p == 0.0 and dtype != torch.float64
        assert got == ("split" if split else "sdpa")
        masked = padded or (causal and M not in (1, N))
        assert asked == ([] if not split else ["efficient" if masked or dtype == torch.float32 else "flash"])
    monkeypatch.setattr(module, "CHOICE", "xformers")
    assert module._strategy(q, k, k, False, None, (), 0.0) == "sdpa"
    monkeypatch.setattr(module, "CHOICE", "")
    for name in ("flash", "efficient"):
        monkeypatch.setattr(flash_module, f"can_use_{name}_attention", lambda params: False)
    assert module._strategy(q, k, k, False, None, (), 0.0) == "sdpa"  # both switched off


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal, M, N", [(False, 20, 257), (True, 257, 257), (True, 1, 33), (True, 20, 33)])
@pytest.mark.parametrize("G, n, d", [(4, 10, 64), (2, 5, 128), (1, 70, 64)])
@pytest.mark.parametrize("padded", [False, True])
def test_on_cuda(check, dtype, causal, M, N, G, n, d, padded):
    """CUDA's kernels and the compiled join through attention, subsets of gradients, against float64. With padding, a sample has no key."""
    q, k, v, _, pk, pv = make(B=3, G=G, M=M, N=N, d=d, n=n, dtype=dtype)
    mask = None
    if padded:
        mask = torch.ones(3, N, dtype=torch.bool)
        mask[0, :5], mask[1, -7:], mask[2] = False, False, False
    on_gpu, there = [t.cuda() for t in (q, k, v, pk, pv)], None if mask is None else mask.cuda()
    assert module._strategy(*on_gpu[:3], causal, there, (), 0.0) == "split"
    call = lambda mask, fn: lambda q, k, v, *p: fn(q, k, v, causal=causal, key_padding_mask=mask, scale=SCALE, prefix=p)  # noqa: E731
    for needs in list(check.subsets(5))[::3]:
        got = check.run(call(there, attention), on_gpu, needs)
        want = check.run(call(mask, attention_reference), [t.double() for t in (q, k, v, pk, pv)], needs)
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert exact is None or check.error(value.cpu(), exact, floor=0.1) <= max(3 * TOLERANCE[dtype], 3e-5)
