"""bench/steps on the smallest sizes: rivals agree, costs are those of the plan, whatever differs or fails is said and not timed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastpeft.verify.baseline import without_dropout

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])


@pytest.fixture
def held(miss, tmp_path):
    return written(miss, tmp_path, "F/LoRA/LoRA")


def written(miss, tmp_path, plan):
    """An adapted model, four questions on two images, what its frozen stages compute."""
    from bench.steps import kept_of

    model = without_dropout(miss.build(plan))
    batch = miss.batch(4, padded=True)
    batch |= {"pixel_values": batch["pixel_values"][:2], "image_index": torch.tensor([0, 0, 1, 1])}
    file = tmp_path / "step.pt"
    with torch.no_grad():
        torch.save({"model": model, "batch": batch, "kept": kept_of(model, batch)}, file)
    return file


def measured(file, form, **how):
    from bench.rivals import MissStep

    runner = MissStep(file, form, **({"cached": False, "grouped": False, "memory": 1e9} | how))
    return runner.measure(), runner


def test_every_form_computes_the_same(held):
    pytest.importorskip("peft")
    want, _ = measured(held, "peft")
    forms = [
        ("peft_sdpa", {}),
        ("ours", {}),
        ("ours", {"grouped": True}),
        ("ours", {"cached": True}),
        ("ours", {"cached": True, "grouped": True}),
    ]
    costs = []
    for form, how in forms:
        told, runner = measured(held, form, **how)
        assert told["loss"] == pytest.approx(want["loss"], rel=1e-10) and told["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-8)
        costs.append(told["flops"])
        runner.step()
    assert costs[4] <= costs[3] < costs[1] and costs[2] < costs[1]


def test_question_states_are_kept_where_both_encoders_are_frozen(miss, tmp_path):
    file = written(miss, tmp_path, "F/F/LoRA")
    want, _ = measured(file, "ours")
    told, runner = measured(file, "ours", cached=True, grouped=True, memory=1.0)
    assert len(runner.pieces) == 2 and told["flops"] < 0.5 * want["flops"]
    assert told["loss"] == pytest.approx(want["loss"], rel=1e-10) and told["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-8)


def test_micro_batches_change_nothing(held):
    for form, grouped in (("ours", True), ("ours", False)):
        whole, runner = measured(held, form, grouped=grouped)
        cut, small = measured(held, form, grouped=grouped, memory=1.0)
        assert len(runner.pieces) == 1 and len(small.pieces) == (2 if grouped else 4) and "micro-batches" in cut["note"]
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-10) and cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-8)


def test_frozen_trains_nothing_and_full_everything(held):
    frozen, runner = measured(held, "frozen")
    assert runner.trained == [] and frozen["grad_norm"] == 0.0 and frozen["flops"] > 0
    full, runner = measured(held, "full")
    assert len(runner.trained) == len(list(runner.model.parameters())) and full["flops"] > frozen["flops"]


@pytest.mark.parametrize(
    "plan, images, kept",
    [
        ("F/LoRA/LoRA", 1, {"fastpeft", "uncached", "ungrouped", "off"}),
        ("F/LoRA/LoRA", 2, {"fastpeft", "off"}),
        ("T/LoRA/LoRA", 1, {"fastpeft", "off"}),
        ("T/LoRA/LoRA", 2, {"fastpeft"}),
    ],
)
def test_rivals_that_make_sense(plan, images, kept):
    from argparse import Namespace

    from bench import steps

    batch = {"pixel_values": torch.zeros(images, 1), "image_index": torch.zeros(2)}
    args = Namespace(rivals=list(steps.RIVALS), device="cpu", memory=1.0, patience=1.0)
    rivals, left_out = steps.chosen(plan, batch, args, Path("x"))
    names = {steps.RIVALS[key][0] for key in kept}
    assert {rival.name for rival in rivals if rival.name.startswith("fastpeft")} == names
    assert len(rivals) + len(left_out) == len(steps.RIVALS)


def test_what_is_not_the_same_is_not_timed():
    from bench import frame

    row = frame.Row("a", 1.0, 2.0, 1.0, 1, 1)
    frame.check(frame.Row("b", 1.00001, 2.001, 1.0, 1, 1), row, 1e-4)
    for other in (
        frame.Row("b", 1.001, 2.0, 1.0, 1, 1),
        frame.Row("b", 1.0, 2.01, 1.0, 1, 1),
        frame.Row("b", float("nan"), 2.0, 1.0, 1, 1),
    ):
        with pytest.raises(ValueError, match=r"b: .* of a: not the same computation, nothing is timed"):
            frame.check(other, row, 1e-4)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    from bench import steps

    size = ["--model", "miss-tiny", "--image-size", "32", "--plans", "F/LoRA/LoRA", "--batch-size", "4", "--questions-per-image", "2"]
    assert steps.main([*size, "--rivals", "peft", "fastpeft", "--rounds", "1", "--out", str(tmp_path / "s.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads((tmp_path / "s.json").read_text())
    baseline, ours = told["rows"]
    assert baseline["speedup"] == 1.0 and ours["flops_ratio"] > 1 and min(r["peak_bytes"] for r in told["rows"]) > 1e8
    assert "| fastpeft |" in (tmp_path / "s.md").read_text()
