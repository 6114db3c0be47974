"""Runs whose prompts are longer than max_length: every one ends scored, or is refused before it trains."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from fastpeft.adapters import describe
from fastpeft.cli import app, main
from fastpeft.data import load_instructions
from fastpeft.evaluate.chat import Chat
from fastpeft.models import NAMES, resolve
from fastpeft.runs.causal import dataset as causal_dataset
from fastpeft.runs.causal import model_for as causal_model_for
from fastpeft.runs.causal import options_of
from fastpeft.runs.evaluate import load_run
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.train import train_run
from fastpeft.train import trainer
from fastpeft.train.config import TrainConfig

PLANS = {"llava-med-tiny": "F/T/LoRA/F", "lavin-tiny": "MMAdapter/T/MMAdapter", "excitor-tiny": "F/Excitor", "llama-tiny": "LoRA"}
PLANS |= {"llava-med-v1.5-tiny": "F/T/LoRA/F"}
COLOURS = ("red", "green", "blue", "white")


def conversation(n: int, words: int, image: bool) -> dict:
    asked = "word " * words + "Which colour?"
    said = [{"from": "human", "value": f"<image>\n{asked}" if image else asked}, {"from": "gpt", "value": COLOURS[n % 4]}]
    return {"id": str(n), "conversations": said} | ({"image": f"{COLOURS[n % 4]}.png"} if image else {})


def write(folder, model: str, train: int = 0, test: int = 200):
    """Words before each question: of the eighth sample for training, and of half of those to score."""
    folder.mkdir(exist_ok=True)
    for colour in COLOURS:
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
    image = model != "llama-tiny"
    rows = [conversation(n, train if n == 7 else 0, image) for n in range(8)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps([conversation(n, test if n % 2 else 0, image) for n in range(4)]))
    return folder


def test_every_causal_model_is_here():
    assert set(PLANS) == {name for name in NAMES if name.endswith("-tiny") and resolve(name).family.template}


def command(*words, capsys):
    app([*map(str, words), "--quiet", "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("model", PLANS)
def test_a_run_ends_scored(model, tmp_path, capsys):
    """By the command line: train, eval of its adapter, and a dialogue about an image."""
    data, out = write(tmp_path / "data", model), tmp_path / "run"
    how = ["--model", model, "--plan", PLANS[model], "--data", data, "--steps", 1, "--batch-size", 4, "--max-length", 220]
    summary = command("train", *how, "--out", out, capsys=capsys)
    assert summary["eval"]["n"] == 4 and (out / "report.html").is_file() and (out / "summary.json").is_file()
    assert "to score: 2 prompts cut to max_length=220 within their question" in summary["notes"]
    scored = command("eval", "--adapter", out / "adapter", "--data", data, "--max-new-tokens", 2, capsys=capsys)
    assert scored["n"] == 4 and scored["notes"] == ["2 prompts cut to max_length=220 within their question"]
    network, tokenizer, preprocess = load_run(out / "adapter")
    text = options_of(describe(out / "adapter"))
    image = None if preprocess is None else str(data / "red.png")
    read = lambda samples: causal_dataset(network, samples, tokenizer, preprocess, text, prompts_only=True)  # noqa: E731
    chat = Chat(network, read, image, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"more than 220 tokens, .*/reset"):
        chat.ask("word " * 300)
    assert chat.turns == [] and isinstance(chat.ask("Which?"), str) and len(chat.turns) == 1


@pytest.mark.parametrize("model", PLANS)
def test_a_run_without_room_is_refused_before_it_trains(model, tmp_path, monkeypatch, capsys):
    data, out = write(tmp_path / "data", model, train=300), tmp_path / "run"
    words = ["train", "--model", model, "--plan", PLANS[model], "--data", data, "--steps", 1, "--batch-size", 4, "--max-length", 220]
    monkeypatch.setattr("sys.argv", ["fastpeft", *map(str, words), "--out", str(out), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastpeft: ")]
    assert stop.value.code == 2 and not out.exists() and len(err) == 1
    assert "train.json: entry 7: no room for a response in max_length=220 (1 of 8 samples)" in err[0] and "--max-length" in err[0]
    summary = command(*words, "--out", out, "--skip-bad", capsys=capsys)
    assert "1 samples left out: response cut off" in summary["notes"] and summary["eval"]["n"] == 4


def test_prompts_without_room_for_the_image(tmp_path):
    """Trained on text alone, scored on images: refused before training, or left out and told."""
    model, folder = "llava-med-tiny", tmp_path / "data"
    data = DataOptions(str(write(folder, model)))
    text = [{"id": "t", "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]}]
    (folder / "train.json").write_text(json.dumps(text * 4))
    rows = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps(rows + text))
    samples = load_instructions(folder)
    network, tokenizer, preprocess = causal_model_for(model, samples)
    room = TextOptions(max_length=max(causal_dataset(network, samples, tokenizer, preprocess, TextOptions()).lengths))
    how = TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=4, progress=False)
    with pytest.raises(ValueError, match=r"test.json: entry 0: no room for the image's 16 places .*\(4 of 5 samples\)"):
        train_run(model, PLANS[model], data, how, text=room)
    assert not (tmp_path / "run").exists()
    summary = train_run(model, PLANS[model], replace(data, skip_bad=True), how, text=room)
    assert summary["eval"]["n"] == 1 and "to score: 4 samples left out: no room for the image" in summary["notes"]


def test_a_run_whose_scoring_fails_is_told_all_the_same(tmp_path, monkeypatch):
    data = write(tmp_path / "data", "llama-tiny")
    how = TrainConfig(out=str(tmp_path / "run"), steps=1, batch_size=4, progress=False)

    def fail(*args, **options):
        raise RuntimeError("no\nscore")

    monkeypatch.setattr(trainer, "answer_and_score", fail)
    with pytest.raises(RuntimeError, match="no\nscore"):
        train_run("llama-tiny", "LoRA", DataOptions(str(data)), how)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["eval"] is None and "not scored (RuntimeError: no score)" in summary["notes"][-1]
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "adapter").is_dir()
    assert not (tmp_path / "run" / "predictions.json").exists()
