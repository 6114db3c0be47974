"""Several runs on one page: figures side by side, settings that differ apart from those that are shared."""

import json
import re

import pytest

from fastpeft.report.compare import write_reports


def a_run(folder, *, rate=1e-3, accuracy=0.5, **more):
    folder.mkdir(parents=True)
    config = {"learning_rate": rate, "seed": 3, "warmup": 0.05}
    summary = {"plan": "F/LoRA/LoRA", "model": "miss-tiny", "config": config, "parameters": {"trainable": 1234, "percent": 0.5}}
    summary |= {"eval": {"global": accuracy, "open": None, "closed": accuracy}, "flops_per_sample": 2.5e9, "saved_bytes_per_step": 7e6}
    (folder / "summary.json").write_text(json.dumps(summary | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 5.0 / i}) + "\n" for i in range(1, 9)))
    return folder


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL))


def test_side_by_side(tmp_path):
    other = a_run(tmp_path / "y" / "run", rate=2e-3, accuracy=0.75, treatments={"jtm": [{"LoRA": {"r": 8}}]})
    runs = [a_run(tmp_path / "x" / "run"), other]
    page = write_reports(runs, tmp_path / "c.html")
    text = text_of(page)
    assert "x/run F/LoRA/LoRA 1,234 0.5 % 50.0 % 50.0 % 2.5 GF 7 MB" in text and "75.0 %" in text
    differing, shared = text.split("Where the settings differ")[1].split("What they share")
    assert "Learning rate 0.001 0.002" in differing and "LoRA of jtm \N{EN DASH} r 8" in differing
    assert "Seed 3" in shared and "Warm-up 0.05" in shared and "Learning rate" not in shared
    assert page.read_text().count("<path") >= 2  # a curve each
    assert not re.search(r"https?:|<script|<link|url\(", page.read_text())


def test_one_run_is_its_report(tmp_path):
    run = a_run(tmp_path / "run", loss_window=20, loss_first=5.0, loss_last=1.0, notes=["read me first"], command="fastpeft train --seed 3")
    page = write_reports([run])
    text = text_of(page)
    assert page == run / "report.html" and "mean of the first 20 steps, and of the last 20 steps" in text
    assert text.index("read me first") < text.index("Accuracy") and "Command fastpeft train --seed 3" in text


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.summary\.json: no such file"):
        write_reports([a_run(tmp_path / "run"), tmp_path / "nowhere"], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_collapsed_answers_are_seen(tmp_path):
    rows = [{"prediction": "no", "answer": "no" if i % 4 == 0 else "yes", "correct": i % 4 == 0} for i in range(20)]
    run = a_run(tmp_path / "run")
    (run / "predictions.json").write_text(json.dumps(rows))
    assert "no 100.0 % 25.0 % 25.0 %" in text_of(write_reports([run]))
