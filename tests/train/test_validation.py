"""Validation between steps: the same training to the bit, the best adapter, early stopping, resumption."""

import json
import math
import shutil

import pytest
import torch

from fastpeft.adapters import load_adapter
from fastpeft.cli import app
from fastpeft.data import Preprocess, VQADataset, load_samples
from fastpeft.evaluate import Scoring, answer_questions
from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.train import TrainConfig, Trainer
from fastpeft.train.validation import Validation, ValidationData

pytestmark = pytest.mark.usefixtures("one_thread")


def make(runs, data, plan="F/LoRA/LoRA", *, validation=True, small=None, **config):
    """A trainer that validates on the test images."""
    plain = runs.trainer(data, plan, small=small or runs.DROPOUT, **{k: v for k, v in config.items() if k not in EVALS})
    if not validation:
        return plain
    preprocess = Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    samples = load_samples(data, split="test").samples
    labelled = VQADataset(samples, preprocess, tokenizer=plain.dataset.tokenizer)
    config = {"progress": False, "batch_size": 4, "device": "cpu"} | config
    return Trainer(plain.model, plain.dataset, TrainConfig(**config), validation=ValidationData(labelled, VQADataset(samples, preprocess)))


EVALS = ("eval_every", "patience", "best_by", "eval_scores")


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_validation_changes_no_step(runs, phantoms, tmp_path):
    """Dropout is on: a draw from the run's generator would show."""
    alone = make(runs, phantoms, validation=False, steps=5, out=tmp_path / "alone")
    alone.fit()
    beside = make(runs, phantoms, steps=5, out=tmp_path / "beside", eval_every=2)
    beside.fit()
    assert runs.metrics(tmp_path / "beside") == runs.metrics(tmp_path / "alone")
    assert [row["step"] for row in rows(tmp_path / "beside") if "validation_loss" in row] == [2, 4, 5]
    assert all({"open", "closed", "global"} == row["eval"].keys() for row in rows(tmp_path / "beside") if "eval" in row)


def test_the_loss_is_that_of_single_samples_without_dropout(runs, phantoms):
    trainer = make(runs, phantoms, steps=1, eval_every=1, batch_size=6)
    labelled, one_by_one = trainer.validation.data.labelled, []
    trainer.model.eval()
    with torch.no_grad():
        for i in range(len(labelled)):
            batch = labelled.collator()([labelled[i]])
            one_by_one.append(float(trainer.model(**{name: batch[name] for name in labelled.inputs}).loss))
    trainer.model.train()
    assert trainer.validation.loss() == pytest.approx(sum(one_by_one) / len(one_by_one), rel=1e-5)
    assert trainer.model.training


def test_the_run_ends_with_the_best_adapter(runs, phantoms, tmp_path, monkeypatch):
    losses, kept = iter([3.0, 1.0, 2.0, 1.0]), {}
    trainer = make(runs, phantoms, steps=4, eval_every=1, eval_scores=False, out=tmp_path / "run", learning_rate=0.01)

    def loss(self):
        kept[trainer.done["step"]] = runs.weights(trainer)
        return next(losses)

    monkeypatch.setattr(Validation, "loss", loss)
    summary = trainer.fit()
    assert summary["validation"] == {"best": 1.0, "best_step": 2, "without_better": 2, "by": "loss"}
    runs.assert_same_weights(runs.weights(trainer), kept[2])
    assert not all(torch.equal(kept[2][name], kept[4][name]) for name in kept[2])
    for folder in ("adapter", "best"):
        fresh = runs.trainer(phantoms, small=runs.DROPOUT)
        load_adapter(fresh.model, tmp_path / "run" / folder)
        runs.assert_same_weights(runs.weights(fresh), kept[2])
    assert (tmp_path / "run" / "report.html").read_text().count("validation loss") > 0


def test_without_a_folder_the_best_is_kept_in_memory(runs, phantoms, monkeypatch):
    losses, kept = iter([1.0, 2.0, 3.0]), {}
    trainer = make(runs, phantoms, "F/T/F", steps=3, eval_every=1, eval_scores=False)

    def loss(self):
        kept[trainer.done["step"]] = runs.weights(trainer)
        return next(losses)

    monkeypatch.setattr(Validation, "loss", loss)
    trainer.fit()
    runs.assert_same_weights(runs.weights(trainer), kept[1])


@pytest.mark.parametrize(
    "values, best_by, patience, steps, best",
    [
        ([3, 2, 1, 4, 5, 6, 0, 0], "loss", 2, 5, 3),  # two in a row without a better one
        ([3, 4, 2, 4, 1, 5, 6, 0], "loss", 2, 7, 5),  # a better one begins anew
        ([3, 3, 3, 0, 0, 0, 0, 0], "loss", 2, 3, 1),  # equal is not better
        ([math.nan, math.nan, 1, 1], "loss", 2, 2, None),
        ([3, 4, 5, 6], "loss", 0, 4, 1),
        ([0.1, 0.5, 0.2, 0.3, 0.9], "global", 2, 4, 2),  # of accuracies the highest
    ],
)
def test_patience(runs, phantoms, tmp_path, monkeypatch, values, best_by, patience, steps, best):
    how, given = {"steps": len(values), "eval_every": 1, "patience": patience, "best_by": best_by, "out": tmp_path / "run"}, iter(values)
    trainer = make(runs, phantoms, **how)
    row = {"loss": lambda v: {"validation_loss": v}, "global": lambda v: {"validation_loss": 1.0, "eval": {"global": v}}}[best_by]
    monkeypatch.setattr(Validation, "row", lambda self: row(next(given)))
    summary = trainer.fit()
    assert summary["steps"] == steps and summary["validation"].get("best_step") == best
    again = make(runs, phantoms, **how, resume=True)
    assert again.fit()["steps"] == steps  # a run that has ended early does not go on
    runs.assert_same_weights(runs.weights(again), runs.weights(trainer))


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_that_of_an_uninterrupted_one(runs, phantoms, tmp_path, monkeypatch, stop):
    how = {"steps": 6, "eval_every": 2, "save_every": 1, "patience": 2, "learning_rate": 0.02, "eval_scores": False}
    whole = make(runs, phantoms, out=tmp_path / "whole", **how)
    summary = whole.fit()
    cut, step = make(runs, phantoms, out=tmp_path / "cut", **how), Trainer._step
    monkeypatch.setattr(cut, "_step", lambda *group: step(cut, *group) if cut.done["step"] < stop else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cut.fit()
    again = make(runs, phantoms, out=tmp_path / "cut", resume=True, **how)
    assert again.fit()["validation"] == summary["validation"]
    runs.assert_same_weights(runs.weights(again), runs.weights(whole))
    pick = lambda out: [{k: v for k, v in row.items() if k in ("step", "loss", "validation_loss", "eval")} for row in rows(out)]  # noqa: E731
    assert pick(tmp_path / "cut") == pick(tmp_path / "whole")


def test_what_a_resume_checks(runs, phantoms, tmp_path):
    make(runs, phantoms, steps=2, eval_every=1, eval_scores=False, out=tmp_path / "run").fit()
    again = {"steps": 3, "eval_scores": False, "out": tmp_path / "run", "resume": True}
    with pytest.raises(ValueError, match="validation eval_every was 1, now 2"):
        make(runs, phantoms, eval_every=2, **again).fit()
    with pytest.raises(ValueError, match="cannot resume"):
        make(runs, phantoms, validation=False, **{k: v for k, v in again.items() if k != "eval_scores"}).fit()
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(ValueError, match="best adapter so far, is gone"):
        make(runs, phantoms, eval_every=1, **again | {"steps": 2}).fit()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"patience": 2}, "give eval_every"),
        ({"best_by": "global"}, "give eval_every"),
        ({"eval_every": 2, "best_by": "global", "eval_scores": False}, "best_by=global needs answers"),
        ({"eval_every": -1}, "eval_every must be a whole number of 0 or more"),
        ({"eval_every": 1, "best_by": "f1"}, "best_by must be one of loss, open, closed, global"),
    ],
)
def test_impossible_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**given)


def test_a_trainer_without_validation_samples_says_so(runs, phantoms):
    with pytest.raises(ValueError, match="eval_every needs validation samples"):
        runs.trainer(phantoms, eval_every=1, steps=1)
    trainer = make(runs, phantoms, steps=1, eval_every=1)
    with pytest.raises(ValueError, match="best_by=open needs answers"):
        data = ValidationData(trainer.validation.data.labelled)
        Validation(trainer.model, data, TrainConfig(eval_every=1, best_by="open"), Scoring(), trainer.device)


# from files ---------------------------------------------------------------------------------------------------------------------


def run(data, out, **more):
    config = TrainConfig(steps=2, batch_size=8, eval_every=1, out=str(out), progress=False, device="cpu", **more)
    return lambda options: train_run("miss-tiny", "F/F/LoRA", DataOptions(str(data), **options), config, pretrained=False)


def test_the_datas_own_validation_split_is_used(phantoms, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    shutil.copy(data / "test.json", data / "validate.json")
    summary = run(data, tmp_path / "run")({})
    assert summary["validation"]["best_step"] in (1, 2) and summary["eval"]["n"] == 20
    (data / "test.json").unlink()  # the validation file then stands in for it
    summary = run(data, tmp_path / "other")({})
    assert any("which chose the best adapter" in note for note in summary["notes"])


def test_a_held_out_part_validates_and_the_test_split_is_scored(phantoms, tmp_path):
    summary = run(phantoms, tmp_path / "run")({"hold_out": 0.2})
    assert summary["eval"]["n"] == 20 and len(json.loads((tmp_path / "run" / "held_out.json").read_text())) == 10
    assert not any("which chose" in note for note in summary["notes"])


def test_data_without_validation_samples_are_refused_with_the_way_out(phantoms, tmp_path):
    with pytest.raises(ValueError, match=r"eval_every needs validation samples.*give hold_out, such as 0.1"):
        run(phantoms, tmp_path / "run")({})


def test_language_models_validate_too(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    lines = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(10)]
    (tmp_path / "data" / "alpaca_data.json").write_text(json.dumps(lines))
    args = ["--model", "llama-tiny", "--plan", "LoRA", "--data", str(tmp_path / "data"), "--hold-out", "0.2", "--steps", "3"]
    args += [
        "--batch-size",
        "4",
        "--eval-every",
        "2",
        "--patience",
        "3",
        "--eval-loss-only",
        "--quiet",
        "--json",
        "--no-eval",
        "--out",
        str(tmp_path / "run"),
    ]
    app(["train", *args], standalone_mode=False)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    validated = {row["step"]: row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row}
    assert set(validated) == {2, 3} and told["validation"]["best"] == min(validated.values())


@pytest.mark.parametrize("plan", ["F/LoRA/LoRA", "F/F/LoRA"])
def test_images_are_taken_from_the_runs_cache(runs, phantoms, plan, tmp_path, monkeypatch):
    """Of images, or of images and questions: each is encoded once, however often the run validates, for the loss and for answers."""
    trainer = make(runs, phantoms, plan, steps=2, eval_every=1, feature_cache=True, out=tmp_path / "run")
    seen, own = [], trainer.model.encode_images
    monkeypatch.setattr(trainer.model, "encode_images", lambda pixels, **how: seen.append(len(pixels)) or own(pixels, **how))
    trainer.fit()
    labelled, asked = trainer.validation.data.labelled, trainer.validation.data.asked
    images = {sample.image for sample in (*labelled.samples, *trainer.dataset.samples)}
    assert sum(seen) <= len(images) * (1 if plan == "F/LoRA/LoRA" else 3)  # a question states' chunk encodes its own images
    before, computed = len(seen), trainer.features.computed
    row = trainer.validation.row()
    assert len(seen) == before and trainer.features.computed == computed and labelled.load_images and asked.load_images
    tokenizer = labelled.tokenizer
    cached = answer_questions(trainer.model, asked, tokenizer, progress=False, features=trainer.features)
    trainer.validation.features = None
    assert trainer.validation.row()["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert len(seen) > before and cached == answer_questions(trainer.model, asked, tokenizer, progress=False)
