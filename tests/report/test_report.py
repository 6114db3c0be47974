"""The report: one file that needs nothing else, whatever a run left behind, and nothing of the data taken for markup."""

import base64
import io
import json
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from fastpeft.cli import main as cli_main
from fastpeft.report.charts import _running_mean, _thin, _ticks, curve
from fastpeft.report.report import EXAMPLES, _si, write_report

ROUTING = {"text": [[0.25, 0.75], [0.5, 0.5], [0.125, 0.875]], "image": [[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]]}
HOSTILE = "</p><script>alert(1)</script> & \"quoted\" 'too' {{ 7 * 7 }}"
SUMMARY = {
    "steps": 40, "samples": 160, "samples_per_second": 44.3, "steady_samples_per_second": 48.05, "tokens_per_second": 512.0,
    "peak_memory_bytes": 4_270_000_000, "saved_bytes_per_step": 810_000_000, "flops_per_sample": 1.34e11, "loss_first": 9.84,
    "loss_last": 0.7123, "model": "miss", "plan": "F/LoRA/LoRA", "dtype": "fp32", "device": "cpu (4 threads)", "batch_size": 4, "seed": 0,
    "seconds": 412.4, "versions": {"torch": "2.13"}, "notes": ["two were skipped"],
    "eval": {"open": 0.412, "closed": 0.735, "global": 0.603, "n": 451, "n_open": 179, "n_closed": 272, "majority": 0.31,
             "majority_closed": 0.55, "always_no_closed": 0.45},
    "parameters": {"total": 362_068_796, "trainable": 589_824, "percent": 0.1629,
                   "parts": {"vit": {"trainable": 0}, "jtm": {"trainable": 589_824}}},
    "parts": {"vit": {"saved_bytes": 0, "flops_per_sample": 1e11}, "jtm": {"saved_bytes": 810_000_000, "flops_per_sample": 3.4e10},
              "other": {"saved_bytes": 0, "flops_per_sample": 0}},
}  # fmt: skip


def row(step: int, **other) -> dict:
    rate = 48 + step % 3
    return {"step": step, "loss": 9 / step + 0.1 * (step % 7), "samples_per_second": rate, "memory_bytes": 3_000_000_000 + step} | other


@pytest.fixture
def make(tmp_path):
    """make(...) writes a run's files and returns its folder."""

    def write(summary=SUMMARY, rows=(), predictions=None):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        if predictions is not None:
            (tmp_path / "predictions.json").write_text(json.dumps(predictions))
        return tmp_path

    return write


@pytest.fixture
def page(make):
    """page(...) is the report's text for these files, checked to be well formed and free of NaN."""

    def read(*args, **kwargs):
        text = write_report(make(*args, **kwargs)).read_text(encoding="utf-8")
        for svg in re.findall(r"<svg.*?</svg>", text, re.S):
            ET.fromstring(svg)
        assert not re.search(r"\b([nN]a[nN]|inf|Infinity|None|Undefined)\b", re.sub(r"base64,[^\"]*", "", text))
        return text

    return read


def answers(folder, n=40):
    shade = np.random.default_rng(0)
    rows = []
    for i in range(n):
        image = folder / f"{i}.png"
        Image.fromarray(shade.integers(0, 255, (300, 400), dtype=np.uint8)).save(image)
        kind, right = ("OPEN", "CLOSED")[i % 2], i % 4 < 2
        rows.append({"qid": i, "img_name": image.name, "image": str(image), "question": f"question {i}?", "answer": "yes",
                     "prediction": "yes" if right else "no", "answer_type": kind, "correct": right})  # fmt: skip
    return rows


def shown(text: str) -> list[str]:
    return re.findall(r"question \d+\?", text)


def test_needs_nothing_else(page, tmp_path):
    text = page(rows=map(row, range(1, 41)), predictions=answers(tmp_path))
    assert not re.search(r"https?:|<script|<link|@import|url\(|\bon\w+=", text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert str(tmp_path) not in text
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".html", "") or p.name.startswith(".")] == ["report.html"]


def test_figures_accuracy_and_parts(page):
    text = page(rows=map(row, range(1, 41)))
    for figure in ("589,824", "0.163 %", "9.84 → 0.712", "44.3 samples/s", "4.27 GB", "810 MB", "134 GF", "6.9 min", "160 samples in all"):
        assert figure in text, figure
    table = re.search(r"<h2>Accuracy.*?</table>", text, re.S)[0]
    cells = [re.sub("<.*?>", "", c).strip("\u2013") for c in re.findall(r"<td>(.*?)</td>", table)]
    assert cells[:10] == ["179", "41.2 %", "", "", "", "272", "73.5 %", "55.0 %", "+18.5", "45.0 %"]
    assert cells[10:] == ["451", "60.3 %", "31.0 %", "+29.3", ""]
    parts = re.search(r"<h2>By part.*?</table>", text, re.S)[0]
    assert re.findall(r'class="bar" width="([\d.]+)"', parts) == ["0.0", "0.0", "74.6", "100.0", "100.0", "25.4"]
    assert "other" not in parts  # nothing outside the parts cost anything
    assert "two were skipped" in text and "process held" in text
    assert "allocator" in page(SUMMARY | {"device": "NVIDIA H100"})


def test_hostile_strings_stay_text(page, tmp_path):
    fields = ("question", "answer", "prediction", "img_name", "answer_type")
    predictions = [p | dict.fromkeys(fields, HOSTILE) for p in answers(tmp_path, 2)]
    summary = SUMMARY | dict.fromkeys(("model", "plan", "device", "dtype"), HOSTILE) | {"notes": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    text = page(summary | {"parts": {HOSTILE: {"saved_bytes": 1}}}, [row(1)], predictions)
    assert "<script" not in text and "alert(1)" in text and "{{ 7 * 7 }}" in text
    assert not re.search(r'alt="[^"]*[<>]', text)


def test_text_that_is_no_unicode(page):
    assert "a?b" in page(SUMMARY | {"model": "a\ud800b"})


@pytest.mark.parametrize("key", SUMMARY)
@pytest.mark.parametrize("value", [None, "absent", float("nan"), [], "text"])
def test_any_field_may_be_missing_or_odd(page, key, value):
    summary = {k: v for k, v in SUMMARY.items() if k != key} if value == "absent" else SUMMARY | {key: value}
    assert "fastpeft training report" in page(summary)


def test_nothing_but_an_empty_summary(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    text = write_report(tmp_path).read_text()
    assert "<h1>Training</h1>" in text and "<h2>Accuracy" not in text and "<figure" not in text and "<h2>By part" not in text


@pytest.mark.parametrize("rows", [
    [row(1)],
    [row(1_000_000)],
    [row(1, loss=0.0, samples_per_second=0, memory_bytes=0)],
    [row(1, loss=float("nan")), row(2, loss=float("inf")), row(3, loss=None), {"step": 4}],
    [row(i, loss=2.5) for i in range(1, 30)],
    [row(i, loss=-1e-9 * i) for i in range(1, 30)],
    [row(i, loss=1e20 * i, samples_per_second=1e-7) for i in range(1, 30)],
])  # fmt: skip
def test_odd_metrics_draw(page, rows):
    text = page(rows=rows)
    assert "<h3>Memory" in text
    for d in re.findall(r' d="(M[^"]*)"', text):
        x, y = np.array([[float(v) for v in p.split(",")] for p in d[1:].removesuffix("h0").split()]).T
        assert (x >= 0).all() and (x <= 920).all() and (y >= 0).all() and (y <= 280).all()


def test_accuracy_during_training(page):
    rows = [row(i, **({"eval": {"open": 0.1 * i, "closed": None, "global": 0.2}} if i % 2 else {})) for i in range(1, 7)]
    text = page(rows=rows)
    figure = re.search(r"<h3>Accuracy during.*?</figure>", text, re.S)[0]
    assert "open 10 at step 1, 50 at step 5" in figure and "closed" not in figure


def test_damaged_metrics(make):
    out = make(rows=map(row, range(1, 5)))
    metrics = out / "metrics.jsonl"
    good = metrics.read_text()
    metrics.write_text(good + '{"step": 5, "lo')  # as a killed run leaves it
    assert "at step 4" in write_report(out).read_text()
    metrics.write_text(good + '{"step": 5, "lo\n' + good)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 5"):
        write_report(out)
    metrics.write_text("[1]\n" + good)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        write_report(out)
    metrics.unlink()
    assert "<h2>Training" not in write_report(out).read_text()


def test_a_step_written_twice_counts_once(page):
    text = page(rows=[row(1), row(2, loss=50.0), row(2, loss=3.0)])
    assert "loss 9.1 at step 1, 3 at step 2" in text


@pytest.mark.parametrize("damage", ["summary.json", "summary.json []", "summary.json {", "predictions.json {}", "predictions.json ["])
def test_errors_name_the_file(make, capsys, monkeypatch, damage):
    out, (name, _, content) = make(), damage.partition(" ")
    report = write_report(out).read_text()
    (out / name).write_text(content) if content else (out / name).unlink()
    with pytest.raises(ValueError, match=name):
        write_report(out)
    assert command(monkeypatch, str(out)) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1
    assert (out / "report.html").read_text() == report  # the old one stands


def command(monkeypatch, *arguments: str) -> int:
    """`fastpeft report ...`; its exit status."""
    monkeypatch.setattr(sys, "argv", ["fastpeft", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli_main()
    return ended.value.code


def test_command_renders_again(make, capsys, monkeypatch):
    out = make(rows=[row(1)])
    assert command(monkeypatch, str(out)) == 0 and capsys.readouterr().out.strip() == f"report in {out / 'report.html'}"
    first = (out / "report.html").read_bytes()
    command(monkeypatch, str(out), "--out", str(out / "again.html"))
    assert (out / "again.html").read_bytes() == first


def test_many_steps_stay_small(page):
    text = page(rows=[row(i, eval={"global": 0.5} if i % 1000 == 0 else None) for i in range(1, 50_001)])
    assert len(text) < 200_000


def test_examples_are_mixed_and_settled(page, tmp_path):
    predictions = answers(tmp_path)
    text = page(predictions=predictions)
    chosen = shown(text)
    assert len(chosen) == len(set(chosen)) == EXAMPLES
    for kind in ("open", "closed"):
        for mark in ("✓ right", "✗ wrong"):
            assert len(re.findall(f'{mark}</span><span class="muted"> · {kind}', text)) == EXAMPLES // 4
    assert "of all 40 answers, 20 are right" in text
    assert shown(page(predictions=predictions[::-1])) == chosen


def test_images_that_are_gone_or_damaged_are_passed_over(page, tmp_path):
    predictions = answers(tmp_path, 8)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"no image")
    odd = [{}, 3, predictions[2] | {"image": None}, predictions[2] | {"image": "a\0b"}, {"image": str(tmp_path)}]
    text = page(predictions=predictions + odd)
    assert sorted(shown(text)) == [f"question {i}?" for i in range(2, 8)]
    for i in range(8):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    assert "<h2>Answers" not in page(predictions=predictions)


def test_thumbnails_are_small(page, tmp_path):
    text = page(predictions=answers(tmp_path, 1))
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", text)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (200, 150)


@pytest.mark.parametrize(("low", "high"), [(0, 10.3), (0, 1), (0, 0.7), (3, 3.001), (-7e-9, 5e-9), (0, 1e20)])
def test_ticks_are_1_2_5_and_cover(low, high):
    ticks, decimals = _ticks(low, high, 5)
    gaps = np.diff(ticks)
    assert ticks[0] <= low and ticks[-1] >= high * (1 - 1e-9) and 3 <= len(ticks) <= 8
    assert gaps == pytest.approx(gaps[0]) and f"{gaps[0]:.0e}"[0] in "125"
    assert len({f"{t:.{decimals}f}" for t in ticks}) == len(ticks)


def test_thinning_keeps_extremes_and_the_mean_is_a_mean():
    y = np.random.default_rng(0).normal(size=10_000)
    y[1234], y[777] = 90, -90
    x, thin = _thin(np.arange(10_000), y)
    assert len(thin) <= 480 and thin.max() == 90 and thin.min() == -90 and (np.diff(x) > 0).all()
    mean = _running_mean(y, 5)
    assert mean[[0, 50, -1]] == pytest.approx([y[:3].mean(), y[48:53].mean(), y[-3:].mean()])
    assert curve([{"step": 1, "a": True}, {"step": 2, "a": 3}], "a", 2) == ([2.0], [6.0])


def test_powers_of_1000():
    words = {0: "0 B", 999: "999 B", 1000: "1 kB", 1.234e9: "1.23 GB", 9.876e17: "988 PB", None: "", "1": "", True: ""}
    assert {value: _si(value, "B") for value in words} == words


def test_routing_by_layer_and_modality(page):
    text = page(SUMMARY | {"routing": ROUTING})
    assert "text 0.25 at layer 1, 0.125 at layer 3; image 0.75 at layer 1, 0.625 at layer 3" in text and "By layer." in text
    for nothing in ({}, {"text": None}, {"text": [["x"]]}, [1]):
        assert "Routing" not in page(SUMMARY | {"routing": nothing})
