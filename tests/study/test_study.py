"""Studies that run: the results of a whole one, and one that is killed and goes on."""

import csv
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import study_process
import typer
from study_process import write

from fastpeft.cli_study import study
from fastpeft.study import runner
from fastpeft.study.file import read_study
from fastpeft.study.jobs import jobs_of
from fastpeft.study.runner import run_study
from fastpeft.study.table import CLOCK

SMALL = """
title: small
options: {batch_size: 6, steps: 6, save_every: 2, learning_rate: 4.0e-3, feature_cache: true}
data: {a: {}, b: {}}
columns: [rank, from, trainable, percent, adapter_bytes, memory_measured, seconds, loss, open, closed, global]
figures: [loss, percent]
rows:
  - {name: second, plan: F/LoRA/LoRA, from: first, data: b}
  - {name: first, plan: F/LoRA/LoRA, rank: 4, data: a}
  - {name: two stages, plan: F/IA3/IA3, stages: [a, {data: b, steps: 2}]}
tiny:
  options: {model: miss-tiny}
  data:
    a: {made: phantoms, scanner: b, images: {train: 6, validate: 1, test: 2}, questions_per_image: 3}
    b: {made: phantoms, scanner: a, seed: 3, images: {train: 6, validate: 1, test: 2}, questions_per_image: 3}
"""


def contents(out: Path) -> tuple[list[dict], dict[str, bytes]]:
    """The table but for what the clock says, and every adapter."""
    lines = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    table = [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]
    return table, {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("rows/**/adapter/**/*.safetensors"))}


def steps_done(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("rows/*/*/stage-*/metrics.jsonl"))


def run_killed(path: Path, out: Path, at: list[int]) -> None:
    """Run a study, killing it once it has done so many steps in all, each time."""
    context = study_process.context()
    for steps in [*at, None]:
        process = context.Process(target=study_process.study, args=(str(path), str(out)))
        process.start()
        while steps is not None and process.is_alive():
            if steps_done(out) >= steps:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        process.join(120)
        assert process.exitcode == (0 if steps is None else -signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = write(folder, SMALL)
    run_killed(path, folder / "out", [])
    return path, folder / "out"


def test_a_study_runs(whole):
    path, out = whole
    found = json.loads((out / "results.json").read_text())
    assert not found["failed"] and [row["row"] for row in found["rows"]] == ["first", "second", "two stages"]
    assert all((out / name).is_file() for name in ("table.md", "table.csv", "study.html", "figures/loss-of-all-rows.svg"))
    assert "<svg" in (out / "study.html").read_text() and "two stages" in (out / "study.html").read_text()
    features = found["features"]  # 6 images of a, 6 of b: encoded once each, though three rows see them
    assert features["computed"] == 12 and features["loaded"] >= 12
    lineage = json.loads((out / "rows/second/seed-0/stage-1/adapter/fastpeft.json").read_text())["started_from"]
    assert lineage["adapter"].endswith("first/seed-0/stage-1/adapter") and lineage["plan"] == "F/LoRA/LoRA"
    first, second = (out / f"rows/{name}/seed-0/stage-1/adapter/jtm/adapter_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() != second.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    left = [out / ".study.html-new-0123abcd", out / "figures" / ".loss.svg-new-0123abcd"]  # of a process that was killed
    for draft in left:
        draft.touch()
    again = run_study(path, out, scale="tiny", device="cpu", say=lambda line: None)  # finished rows are not run again
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} and len(before) == 3
    assert not any(draft.exists() for draft in left)
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in found["rows"]]
    changed = path.with_name("changed.yaml")
    changed.write_text(SMALL.replace("rank: 4", "rank: 8"))
    with pytest.raises(ValueError, match=r"first, seed 0 with another rank \(4, now 8\)"):
        run_study(changed, out, scale="tiny", device="cpu")


def test_a_killed_study_goes_on(whole, tmp_path):
    """Killed in the middle of its first row and in its second, it ends with the same table and the same adapters, to the bit."""
    _, out = whole
    run_killed(write(tmp_path, SMALL), tmp_path / "out", [3, 9])
    table, adapters = contents(out)
    assert contents(tmp_path / "out") == (table, adapters) and len(adapters) > 4


@pytest.mark.parametrize("file", ["job.json", "result.json"])
@pytest.mark.parametrize("content", [b"", b'{"job', b"3", b"\xff", b"[" * 10**5])
def test_a_damaged_file_of_a_row_is_named(tmp_path, file, content):
    path = write(tmp_path, f"data: {{d: {tmp_path}}}\nrows: [{{name: one, plan: F/LoRA/LoRA}}]")
    folder = tmp_path / "out" / "rows" / "one" / "seed-0"
    folder.mkdir(parents=True)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"one/seed-0/{file} is damaged: delete .*seed-0, and the same command runs that row again"):
        run_study(path, tmp_path / "out", device="cpu", say=lambda line: None)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_lets_the_steps_end_and_says_which_it_was(request, tmp_path, monkeypatch, capsys, name):
    number, ended = getattr(signal, name), []
    if name == "SIGHUP":  # nohup, under which it stays ignored, may have started the tests
        outside = signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, outside))
    path, before = write(tmp_path, f"data: {{d: {tmp_path}}}\nrows: [{{name: one, plan: F/LoRA/LoRA}}]"), signal.getsignal(number)
    process = type("Process", (), {"sentinel": 0, "terminate": lambda self: ended.append(name), "join": lambda self: None})
    monkeypatch.setattr(runner, "_start", lambda *given: process())
    monkeypatch.setattr(runner, "wait", lambda sentinels: os.kill(os.getpid(), number))
    with pytest.raises(typer.Exit) as status:
        study(str(path), str(tmp_path / "out"))
    assert status.value.exit_code == 128 + number and ended == [name] and signal.getsignal(number) is before
    assert capsys.readouterr().err == "fastpeft: stopped in one, seed 0; the same command goes on from there\n"


def test_rows_side_by_side_are_the_same(whole, tmp_path):
    """Two at once, of which one waits for the row that it starts from. And ``steps`` are of every stage."""
    path, out = whole
    process = study_process.context().Process(
        target=study_process.study, args=(str(path), str(tmp_path / "out")), kwargs={"side_by_side": 2}
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0 and contents(tmp_path / "out") == contents(out)
    stages = [stage for job in jobs_of(read_study(path, "tiny"), tmp_path, {}, steps=2) for stage in job.stages]
    assert {stage["steps"] for stage in stages} == {2} and len(stages) == 4


def test_rows_of_one_base_train_in_one_run_side_by_side(tmp_path):
    """One that fails is named, and the others have their results."""
    text = """
options: {model: miss-tiny, batch_size: 6, steps: 2}
data: {a: {}}
figures: []
rows:
  - {name: small, plan: F/LoRA/LoRA, rank: 2}
  - {name: wild, plan: F/LoRA/LoRA, learning_rate: 1.0e+30, max_grad_norm: 0, warmup: 0, steps: 5}
  - {name: large, plan: F/F/LoRA, rank: 8}
tiny: {data: {a: {made: phantoms, images: {train: 4, validate: 1, test: 1}, questions_per_image: 3}}}
"""
    study = ("study", str(write(tmp_path, text)), str(tmp_path / "out"))
    process = study_process.context().Process(target=study_process.study, args=study[1:], kwargs={"side_by_side": 3})
    process.start()
    process.join(120)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["row"]: row["steps"] for row in found["rows"] if "steps" in row} == {"small": 2, "large": 2}
    assert list(found["failed"]) == ["wild, seed 0"] and "FloatingPointError" in found["failed"]["wild, seed 0"]
    folders = [tmp_path / "out/rows" / name / "seed-0" for name in ("small", "wild", "large")]
    assert [(folder / "log.txt").is_file() for folder in folders] == [True, False, False]  # of one process
    notes = json.loads((folders[2] / "stage-1/summary.json").read_text())["notes"]
    assert any(note.startswith("trained on one base with small, seed 0, wild, seed 0:") for note in notes)


def test_figures_of_excitor(tmp_path):
    """MMLU beside the base, which is asked once for both rows; gates and similarities of the row that has an Excitor."""
    text = """
options: {model: llama-tiny, steps: 1, batch_size: 4, template: plain}
data: {alpaca: {}, mmlu: {}}
score_on: [mmlu]
generation: {top_p: 0.5}
columns: [mmlu, mmlu_base, mmlu_change, mmlu_wins, mmlu_ties, mmlu_losses]
figures: [mmlu, gates, similarity]
rows: [{name: excited, data: alpaca, plan: "Excitor(layers=[1, 3])"}, {name: plain, data: alpaca, plan: LoRA}]
tiny:
  data:
    alpaca: {made: instructions, images: {train: 3, validate: 1, test: 1}}
    mmlu: {made: mmlu, images: {train: 1, validate: 1, test: 1}}
"""
    process = study_process.context().Process(target=study_process.study, args=(str(write(tmp_path, text)), str(tmp_path / "out")))
    process.start()
    process.join(120)
    excited, plain = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    for row in (excited, plain):
        scored = row["scores"]["mmlu"]["mmlu"]
        assert scored["n_tasks"] == 4 == scored["wins"] + scored["ties"] + scored["losses"] and 0 <= scored["base"]["task_mean"] <= 1
    assert list(excited["gates"]) == list(excited["similarity"]) == ["1", "3"] and plain["gates"] is plain["similarity"] is None
    assert all(0 < layer["change"] < 1 and layer["extra"] > 0 for layer in excited["similarity"].values())
    assert len(list((tmp_path / "out/base-answers").iterdir())) == 1
    drawn = {path.stem for path in (tmp_path / "out/figures").iterdir()}
    assert {"gates-of-excitor", "similarity-by-layer-excited", "mmlu-against-the-base-by-task"} <= drawn


@pytest.mark.slow
def test_a_study_killed_at_random_five_times(whole, tmp_path):
    _, out = whole
    steps = sorted(random.Random(time.time_ns()).sample(range(0, 20), 5))
    run_killed(write(tmp_path, SMALL), tmp_path / "out", steps)
    assert contents(tmp_path / "out") == contents(out), steps


def test_a_failing_row_stops_alone(tmp_path):
    """What starts from it is left out, the others run, and another call tries again."""
    head, tail = SMALL[: SMALL.index("rows:")], SMALL[SMALL.index("tiny:") :]
    rows = """rows:
  - {name: second, plan: F/LoRA/LoRA, from: first, data: b}
  - {name: first, plan: F/LoRA/LoRA, learning_rate: 1.0e+30, max_grad_norm: 0, data: a}
  - {name: other, plan: F/F/IA3, data: b, steps: 1, no_eval: true}
"""
    text = head + rows + tail
    context = study_process.context()
    process = context.Process(target=study_process.study, args=(str(write(tmp_path, text)), str(tmp_path / "out")))
    process.start()
    process.join(120)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["failed"]) == ["first, seed 0", "second, seed 0"]
    assert "lower learning_rate" in found["failed"]["first, seed 0"] and "which failed" in found["failed"]["second, seed 0"]
    assert "| first (failed:" in (tmp_path / "out" / "table.md").read_text()
    assert [row["row"] for row in found["rows"] if "error" not in row] == ["other"]
