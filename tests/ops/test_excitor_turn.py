"""excitor_turn against the rotary embedding and the merge one after the other, and who turns queries and keys with it."""

import importlib

import pytest
import torch

import fastpeft as fp
from fastpeft import _library
from fastpeft.ops.excitor_keys import excitor_keys
from fastpeft.ops.lora_attention import lora_attention

turn = importlib.import_module("fastpeft.ops.excitor_turn")
INTERPRETED = _library.FORCED == "triton"
only_once = pytest.mark.skipif(_library.FORCED != "", reason="the same in every mode")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tables(M, rot, dtype=torch.float64, B=1):
    angle = torch.rand(B, M, rot // 2, dtype=torch.float64).repeat(1, 1, 2) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


def made(*shapes, dtype=torch.float64):
    return [torch.randn(s).to(dtype) for s in shapes]


def make(B=2, H=2, M=5, d=4, r=2, K=3, image=False, dtype=torch.float64, groups=1):
    C = H * d
    shapes = [(B, H, M, d), (B, H // groups, M, d), (B, M, C), (r, C), (C, r), (K, C), (H,)]
    shapes += [(B, 6, 7), (r, 7), (C, r), (r, 7), (C, r)] * image
    fan = [1, 1, 1, C, r, 1, 1, 1, 7, r, 7, r]
    return [(torch.randn(s) * n**-0.5).to(dtype) for s, n in zip(shapes, fan)]


def ours(cos_sin):
    """The one pass, whatever the rule."""

    def call(q, k, hidden, *rest):
        narrow = turn.excitor._narrow(hidden, *rest[:4], rest[4:] or None)
        return turn._together(
            q, k, *(t.to(torch.promote_types(q.dtype, torch.float32)) for t in cos_sin), turn.excitor._params(*narrow, None)
        )

    return call


def reference(cos_sin):
    return lambda q, k, *rest: turn.excitor_turn_reference(q, k, cos_sin, *rest[:5], rest[5:] or None)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_one_after_the_other(check, dtype, image):
    """Queries, keys and their gradients no further from float64; the parameters' gradients those of the merge, to the bit."""
    inputs, cos_sin = make(M=35, d=6, r=3, image=image, dtype=dtype), tables(35, 6, B=2)
    check.no_worse(ours(cos_sin), reference(cos_sin), reference(cos_sin), inputs, [i < 2 for i in range(len(inputs))])
    dys = made((2, 2, 35, 6), (2, 2, 35, 6), dtype=dtype)
    _, grads = check.run(ours(cos_sin), inputs, cotangents=dys)
    _, wanted = check.run(lambda k, *rest: excitor_keys(k, *rest[:5], rest[5:] or None), inputs[1:], cotangents=dys[1:])
    assert all(map(torch.equal, grads[2:], wanted[1:]))


def test_every_gradient_subset(check):
    inputs, cos_sin = make(), tables(5, 4)
    for needs in list(check.subsets(7))[::9]:
        got, want = (check.run(fn(cos_sin), inputs, needs) for fn in (ours, reference))
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert value is exact is None or check.error(value, exact, floor=1.0) < 1e-12


@pytest.mark.parametrize(
    "B, H, M, d, r, K", [(1, 1, 1, 2, 1, 1), (3, 3, 7, 84, 16, 30), (1, 9, 33, 10, 5, 17), (2, 2, 0, 4, 2, 3), (0, 2, 3, 4, 2, 3)]
)
def test_odd_sizes(check, B, H, M, d, r, K):
    inputs, cos_sin = make(B, H, M, d, r, K, dtype=torch.float32), tables(M, d)
    got, want = (check.run(fn(cos_sin), given) for fn, given in ((ours, inputs), (reference, [t.double() for t in inputs])))
    for value, exact in zip(got[0] + got[1], want[0] + want[1]):
        assert check.error(value, exact, floor=1.0) < 1e-5


def test_strides_and_several_programs(check, monkeypatch):
    """Three heads a key; queries as one projection's output holds them, keys of every second head, heads shared out among programs."""
    if INTERPRETED:
        monkeypatch.setattr(importlib.import_module("fastpeft.kernels.excitor_keys"), "PROGRAMS", 4)
    inputs, cos_sin = make(2, 6, 40, 4, dtype=torch.float32, groups=3), tables(40, 4)
    check.no_worse(ours(cos_sin), reference(cos_sin), reference(cos_sin), inputs)
    inputs = make(1, 5, 40, 4, dtype=torch.float32)
    inputs[0] = torch.randn(1, 40, 3, 5, 4)[:, :, 1].transpose(1, 2)
    inputs[1] = torch.randn(1, 10, 40, 8)[:, ::2, :, ::2]
    check.no_worse(ours(cos_sin), reference(cos_sin), reference(cos_sin), inputs)


def test_compiles(check):
    check.compiles(ours(tables(5, 4)), make(dtype=torch.float32))


def test_opcheck():
    q, k, u, prompt, gate = made((2, 2, 5, 4), (2, 2, 5, 4), (2, 5, 2), (3, 8), (2,), dtype=torch.float32)
    args = (q, k, *tables(5, 4, torch.float32), u, torch.randn(1, 2, 3), None, prompt, None, gate)
    torch.library.opcheck(torch.ops.fastpeft.excitor_turn_fwd.default, args)


@pytest.fixture
def forms(monkeypatch):
    """``compare(fn, *inputs)``: outputs and gradients in parts, then in one pass, which must be taken; float64."""
    calls, together = [], turn._together

    def compare(check, fn, inputs):
        want = check.run(fn, inputs)
        assert not calls
        monkeypatch.setattr(turn, "_together", lambda *a: calls.append(a) or together(*a))
        monkeypatch.setattr(turn, "TURNS", {"cpu"})
        monkeypatch.setattr(turn, "DTYPES", (torch.float64,))
        got = check.run(fn, inputs)
        assert calls
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            torch.testing.assert_close(value, exact)

    return compare


@only_once
@pytest.mark.parametrize("rot", [4, 8])
def test_some_channels_are_turned_by_the_parts(check, rot):
    """Whatever the tables turn, the result is the definition's."""
    inputs = made((2, 3, 5, 8), (2, 3, 5, 8), (2, 5, 24), (2, 24), (24, 2), (4, 24), (3,))
    cos_sin = tables(5, rot)
    got = check.run(lambda q, k, *rest: turn.excitor_turn(q, k, cos_sin, *rest), inputs)
    want = check.run(lambda q, k, *rest: turn.excitor_turn_reference(q, k, cos_sin, *rest), inputs)
    for value, exact in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(value, exact)


@only_once
def test_saved_bytes(check, monkeypatch):
    """Nothing of q, k or what became of them."""
    monkeypatch.setattr(turn, "TURNS", {"cpu"})
    monkeypatch.setattr(turn, "DTYPES", (torch.float64,))
    inputs, cos_sin = made((2, 3, 5, 8), (2, 3, 5, 8), (2, 5, 24), (2, 24), (24, 2), (4, 24), (3,)), tables(5, 8)
    for trained, want in (((0, 1), 0), ((0, 1, 6), 8 * (2 * 5 * 2 + 2 * 4)), (range(7), 8 * (2 * 5 * 2 + 2 * 4))):
        leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(inputs)]
        assert check.saved_bytes(lambda *t: turn.excitor_turn(*t[:2], cos_sin, *t[2:]), leaves, free=[*leaves[2:], *cos_sin]) == want


@only_once
def test_in_lora_attention(check, forms):
    x, *weights = made((2, 5, 16), *[(16, 16)] * 4, (2, 16), (16, 2), (4, 16), (4,))
    cos_sin = tables(5, 4)

    def attention(x, q, k, v, o, *excitor):
        return lora_attention(x, (q,), (k,), (v,), (o,), 4, rotary=cos_sin, excitor=excitor, causal=True)

    forms(check, attention, [x, *weights])


@only_once
def test_in_excitor_attention(check, forms):
    module = fp.nn.ExcitorAttention(16, 4, num_prompts=5, r=3, dtype=torch.float64)
    cos_sin = tables(5, 4)
    forms(check, lambda x: module(x, position_embeddings=cos_sin), made((2, 5, 16)))


@only_once
@pytest.mark.parametrize(
    "change, message",
    [({"q": torch.randn(2, 2, 5, 4)}, "must match"), ({"tables": tables(5, 8)}, "rot even"), ({"gate": torch.randn(2)}, "gate")],
)
def test_errors(change, message):
    names = ("q", "k", "hidden", "w_down", "w_up", "prompt", "gate")
    given = dict(zip(names, made((2, 3, 5, 4), (2, 3, 5, 4), (2, 5, 12), (2, 12), (12, 2), (4, 12), (3,))))
    with pytest.raises(ValueError, match=message):
        turn.excitor_turn(**(given | {"tables": tables(5, 4)} | change))
