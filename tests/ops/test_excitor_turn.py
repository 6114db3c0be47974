"""excitor_turn by its rule, and who turns queries and keys with it. Its form is a row of _table.py, whatever the rule."""

import importlib

import pytest
import torch

import fastpeft as fp
from fastpeft import _library
from fastpeft.ops.lora_attention import lora_attention

turn = importlib.import_module("fastpeft.ops.excitor_turn")
if _library.FORCED == "triton":
    pytest.skip("the same in every mode", allow_module_level=True)


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


def tables(M, rot):
    angle = torch.rand(1, M, rot // 2, dtype=torch.float64).repeat(1, 1, 2) * 6
    return angle.cos(), angle.sin()


def made(*shapes):
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("rot", [4, 8])
def test_some_channels_are_turned_by_the_parts(check, rot):
    """Whatever the tables turn, the result is the definition's."""
    inputs = made((2, 3, 5, 8), (2, 3, 5, 8), (2, 5, 24), (2, 24), (24, 2), (4, 24), (3,))
    cos_sin = tables(5, rot)
    got = check.run(lambda q, k, *rest: turn.excitor_turn(q, k, cos_sin, *rest), inputs)
    want = check.run(lambda q, k, *rest: turn.excitor_turn_reference(q, k, cos_sin, *rest), inputs)
    for value, exact in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(value, exact)


def test_in_lora_attention(check, forms):
    x, *weights = made((2, 5, 16), *[(16, 16)] * 4, (2, 16), (16, 2), (4, 16), (4,))
    cos_sin = tables(5, 4)

    def attention(x, q, k, v, o, *excitor):
        return lora_attention(x, (q,), (k,), (v,), (o,), 4, rotary=cos_sin, excitor=excitor, causal=True)

    forms(check, attention, [x, *weights])


def test_in_excitor_attention(check, forms):
    module = fp.nn.ExcitorAttention(16, 4, num_prompts=5, r=3, dtype=torch.float64)
    cos_sin = tables(5, 4)
    forms(check, lambda x: module(x, position_embeddings=cos_sin), made((2, 5, 16)))


@pytest.mark.parametrize(
    "change, message",
    [({"q": torch.randn(2, 2, 5, 4)}, "must match"), ({"tables": tables(5, 8)}, "rot even"), ({"gate": torch.randn(2)}, "gate")],
)
def test_errors(change, message):
    names = ("q", "k", "hidden", "w_down", "w_up", "prompt", "gate")
    given = dict(zip(names, made((2, 3, 5, 4), (2, 3, 5, 4), (2, 5, 12), (2, 12), (12, 2), (4, 12), (3,))))
    with pytest.raises(ValueError, match=message):
        turn.excitor_turn(**(given | {"tables": tables(5, 4)} | change))
