"""bench/mixed on the smallest sizes: the arms have the same losses and gradients, its data are what it says, a difference is told."""

import sys
from pathlib import Path

import pytest
import torch

import fastpeft as fp
from fastpeft.device import to_device
from fastpeft.evaluate.responses import model_inputs
from fastpeft.optimize import SWAPS
from fastpeft.runs.causal import dataset as causal_dataset
from fastpeft.runs.causal import model_for as causal_model_for
from fastpeft.runs.options import TextOptions
from fastpeft.verify.baseline import scatter_adapters

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mixed(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    from bench import mixed

    return mixed


@pytest.fixture
def folder(mixed, tmp_path):
    return mixed.make_mixed(tmp_path / "b", "b", {"train": 24, "test": 10}, seed=3)


def test_two_steps_of_both(mixed, folder):
    """Loss and gradients of the packed, fused step are those of the straightforward one, before and after an update."""
    samples = mixed.read(folder, "train")
    base, tokenizer, preprocess = causal_model_for("lavin-tiny", samples)
    arms = {name: scatter_adapters(model, 0.2) for name, model in mixed.pair(base, 0).items()}
    found = {}
    for arm, model in arms.items():
        text = TextOptions(packed=arm == "fastpeft", max_length=mixed.LENGTH)
        dataset = causal_dataset(model, samples, tokenizer, preprocess, text)
        optimizer, found[arm] = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5), []
        for start in (0, 12):
            batch = dataset.collator()([dataset[i] for i in range(start, start + 12)])
            loss = model(**to_device(batch, model_inputs(model, dataset), torch.device("cpu"), torch.float32)).loss
            loss.backward()
            kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found[arm].append({"loss": loss.detach()} | kept)
            optimizer.step()
            optimizer.zero_grad()
    assert not [m for m in arms["straightforward"].modules() if type(m) in SWAPS.values()]  # transformers' own, or written out
    for ours, theirs in zip(found["fastpeft"], found["straightforward"]):
        assert ours.keys() == theirs.keys() and {name.split(".")[0] for name in ours} == {"loss", "vision", "neck", "llm"}
        for name, value in theirs.items():
            atol = 1e-7 + 1e-4 * value.abs().max().item()
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.allclose(found["fastpeft"][0]["loss"], found["fastpeft"][1]["loss"])


def test_the_data(mixed, folder):
    train, test = mixed.read(folder, "train"), mixed.read(folder, "test")
    assert [sample.image is not None for sample in train] == [True, False] * 12 and len(test) == 10
    told = [{s.question.rpartition(".")[0] for s in split if s.image is None} for split in (train, test)]
    assert all(text.count(".") == 1 for of in told for text in of) and not told[0] & told[1]
    for sample in train:
        if sample.image is None and "what color is the marker" in sample.question.lower():
            assert sample.answer.lower() in sample.question.lower()
    assert len({sample.answer for sample in train}) > 4


def test_a_difference_is_told(mixed):
    ours = [{"seconds": 1.0, "text": 0.5, "image": at, "all": at} for at in (0.1, 0.2)]
    runs = {"fastpeft": ours, "straightforward": [run | {"image": run["image"] + 0.1, "all": run["all"] + 0.1} for run in ours]}
    apart, lines = mixed.told_of(runs)
    assert apart["image"]["difference"] == pytest.approx(-0.1) and not apart["all"]["within_noise"] and "NOT within noise" in lines[-1]
    assert apart["text"] == {"difference": 0.0, "interval": 0.0, "within_noise": True}


def test_arms_that_differ_are_not_trained(mixed, folder, monkeypatch):
    base, *words = causal_model_for("lavin-tiny", mixed.read(folder, "train"))
    arms = mixed.pair(base, 0)
    scatter_adapters(arms["straightforward"], 0.5)
    args = type("", (), {"batch_size": 8})
    with pytest.raises(SystemExit, match="losses differ"):
        mixed.first_steps(arms, *words, folder, args, {})
    losses = mixed.first_steps(mixed.pair(base, 0), *words, folder, args, {"learning_rate": 1e-2})
    assert len(losses["fastpeft"]) == mixed.FIRST and losses["fastpeft"][0] != losses["fastpeft"][-1]
    assert fp.count(arms["fastpeft"])["trainable"] > 0


def test_both_answer_alike(mixed, folder):
    """Batches with a cache, and each token from the whole text."""
    base, tokenizer, preprocess = causal_model_for("lavin-tiny", mixed.read(folder, "train"))
    arms = {name: scatter_adapters(model, 0.3) for name, model in mixed.pair(base, 0).items()}
    held = causal_dataset(base, mixed.read(folder, "test"), tokenizer, preprocess, TextOptions(max_length=mixed.LENGTH), prompts_only=True)
    ours, theirs = (mixed.answered(arms[name], held, name == "fastpeft") for name in arms)
    assert ours == theirs and len(set(ours)) > 1
