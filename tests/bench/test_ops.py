"""bench's own workings: ops measured phase by phase, and rivals that fail left out."""

import json

import pytest
import torch

from bench import __main__ as bench
from bench import timing


@pytest.fixture
def out(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(timing, "roofline", lambda device, dtype: (100.0, 1.0))
    return tmp_path


def test_forward_backward_and_both_of_every_rival(out, capsys):
    assert bench.main(["rescale", "--quick", "--seconds", "0.01"]) == 0
    rows = json.loads((out / "ops-cpu.json").read_text())["rows"]
    for dtype in ("float32", "bfloat16"):
        mine = {row["op"]: row for row in rows if row["provider"] == "fastpeft" and row["dtype"] == dtype}
        assert set(mine) == {"rescale both fwd", "rescale both bwd", "rescale both fwd+bwd", "rescale scale bwd"}
        for row in mine.values():
            assert row["ms"][0] <= row["ms"][1] <= row["ms"][2] and row["gb_per_s"] > 0 and row["roofline"] == row["gb_per_s"] / 100
    baseline = [row for row in rows if row["provider"] == "torch"]
    assert len(baseline) == 8 and all(row["ratio"] == 1.0 for row in baseline)
    assert "| rescale both fwd+bwd | 2048x768 | bfloat16 | torch |" in capsys.readouterr().out


def test_a_rival_that_fails_is_left_out_and_nan_is_not_timed():
    settings, x = timing.Settings("cpu", 0.001, True), torch.ones(3, requires_grad=True)

    def broken(x):
        raise RuntimeError("no compiler here")

    fns = {"fastpeft": torch.neg, "other": broken, "torch": torch.neg}
    rows = timing.measure("neg", "3", torch.float32, fns, (x,), settings, cotangent=torch.ones(3), flops=7.0)
    assert [(row.op, row.provider) for row in rows] == [(f"neg {p}", n) for p in ("fwd", "bwd", "fwd+bwd") for n in ("fastpeft", "torch")]
    assert all("other left out: RuntimeError: no compiler here" in row.note for row in rows)
    assert [row.tflop_per_s is None for row in rows] == [True] * 4 + [False] * 2  # one number of work: both phases together
    with pytest.raises(ValueError, match="not timed"):
        timing.measure("nan", "3", torch.float32, {"fastpeft": lambda x: x / 0 - x / 0, "torch": torch.neg}, (x,), settings)


def test_a_copy_moves_what_an_operator_does():
    copied = timing.copy_of(24.0, "cpu")()
    assert copied.nbytes == 12 and copied.isfinite().all()
