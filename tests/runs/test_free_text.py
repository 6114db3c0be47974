"""Runs whose answers are sentences: what `train` and `eval` say of them, and the report."""

import json

import pytest
from PIL import Image

from fastpeft.cli import app
from fastpeft.evaluate import responses
from fastpeft.runs.evaluate import eval_run
from fastpeft.runs.options import DataOptions, MetricOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

QUESTIONS = [
    ("Is there a fracture?", "Yes", "CLOSED"),
    ("Is it normal?", "No", "CLOSED"),
    ("Which side?", "Left lung", "OPEN"),
    ("Which organ?", "Liver", "OPEN"),
]
SAID = ["Yes, there is a fracture.", "The heart is normal, yes.", "It is in the left lung.", "This is a lung."]


@pytest.fixture
def slake(tmp_path):
    """A folder in Slake's format; the test questions are the training ones."""
    folder = tmp_path / "slake"
    (folder / "imgs").mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(folder / "imgs" / "0.jpg")
    for split, first in (("train", 0), ("test", 100)):
        rows = [
            {"img_name": "0.jpg", "question": q, "answer": a, "answer_type": kind, "content_type": "", "q_lang": "en", "qid": first + i}
            for i, (q, a, kind) in enumerate(QUESTIONS)
        ]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(responses, "respond", lambda *a, **k: list(SAID))


def test_answers_in_sentences_are_scored(slake, said, tmp_path, capsys):
    out = tmp_path / "run"
    config = TrainConfig(steps=1, batch_size=2, out=str(out), progress=False)
    metrics = MetricOptions(metrics="rouge,meteor,tokens")
    summary = train_run("llava-med-tiny", "F/F/LoRA/F", DataOptions(str(slake)), config, metrics=metrics)
    scores = json.loads((out / "summary.json").read_text())["eval"]
    assert scores == summary["eval"] and (scores["open"], scores["closed"], scores["global"]) == (1 / 2, 1 / 2, 1 / 2)
    assert scores["filled_by"]["open"] == "candidate" and scores["free_text"]["exact"]["global"] == 0.0
    assert scores["free_text"]["contains"] == {"open": 1 / 2, "closed": 1 / 2, "global": 1 / 2}
    assert scores["metrics"]["ROUGE-L"]["recall"] > 0 and scores["metrics"]["METEOR"]["synonyms"] == "without synonyms"
    assert scores["metrics"]["tokens"] > 5 and scores["metrics"]["missing"] == {}
    page = (out / "report.html").read_text()
    assert "Answers as free text" in page and "Open questions are right by candidate." in page and "without synonyms" in page

    again = eval_run(out / "adapter", DataOptions(str(slake)), progress=False, metrics=metrics)
    assert {name: again[name] for name in scores} == scores
    capsys.readouterr()
    app(["eval", "--adapter", str(out / "adapter"), "--data", str(slake), "--quiet", "--json", "--metrics", "rouge,bertscore",
         "--bertscore-model", str(tmp_path / "gone")], standalone_mode=False)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told["free_text"] == scores["free_text"] and told["metrics"]["ROUGE-L"] == scores["metrics"]["ROUGE-L"]
    assert "give a local transformers folder" in told["metrics"]["missing"]["BERTScore"]
    assert any(line.startswith("no BERTScore: ") for line in lines)


def test_data_without_a_training_split_say_so(slake, said, tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(steps=1, batch_size=2, out=str(out), progress=False)
    train_run("llava-med-tiny", "F/F/LoRA/F", DataOptions(str(slake)), config, evaluate=False)
    (slake / "train.json").unlink()
    scores = eval_run(out / "adapter", DataOptions(str(slake), split_file=str(slake / "test.json")), progress=False)
    assert scores["filled_by"]["open"] == "exact" and scores["open"] == 0.0 and scores["closed"] == 1 / 2
    assert any("no candidate accuracy" in note for note in scores["notes"])
