"""Studies: what a file may say, the jobs it makes, the table they fill, and a study that is killed and goes on."""

import csv
import io
import json
import math
import os
import random
import signal
import time
from pathlib import Path

import pytest
import study_process
import typer

from fastpeft.cli_study import study
from fastpeft.evaluate.text_metrics import text_metrics
from fastpeft.study import runner
from fastpeft.study.file import data_folders, read_study
from fastpeft.study.jobs import jobs_of
from fastpeft.study.runner import check, run_study
from fastpeft.study.table import CLOCK, COLUMNS, check_columns, table_of
from fastpeft.study.work import run_job

STUDIES = sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml"))
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


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def jobs(path: Path, out: Path = Path("out"), **folders: str):
    return jobs_of(read_study(path), out, folders)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_shipped_study_is_runnable(path, scale):
    study = read_study(path, scale)
    found = jobs_of(study, Path("out"), {name: f"/data/{name}" for name in study.data} if scale == "full" else {})
    check(study, found)
    models = {stage["model"] for job in found for stage in job.stages}
    assert all(model.endswith("-tiny") for model in models) == (scale == "tiny")
    if scale == "tiny":  # in minutes
        assert all(stage["steps"] <= 60 for job in found for stage in job.stages)
        assert not [stage for job in found for stage in job.stages if stage.get("image_encoder", "tiny") != "tiny"]


RECIPE = """
model: llama-tiny
batch_size: 2
steps: 1
learning_rate: 1.0e-3
metrics: [tokens]
stages:
  - {plan: T, data: first}
  - {plan: LoRA, rank: 2, data: second}
"""
STAGED = """
recipe: recipe.yaml
data: {first: {data: FIRST}, second: {data: SECOND}}
generation: {max_new_tokens: 2}
columns: [loss]
rows:
  - {name: lora}
  - {name: ia3, plan: IA3, data: first}
  - {name: alone, plan: T, stages: [first]}
"""


def test_a_recipes_stages_are_the_rows(tmp_path):
    """Of rows without their own, whose options go over the last stage's; another plan goes on from the merged weights."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name in ("FIRST", "SECOND"):
        (tmp_path / name).mkdir()
        said = json.dumps([{"instruction": "Spell it.", "input": "", "output": name}] * 2)
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(said)
    text = STAGED.replace("FIRST", str(tmp_path / "FIRST")).replace("SECOND", str(tmp_path / "SECOND"))
    lora, ia3, alone = jobs(write(tmp_path, text), tmp_path / "out")
    kept = ("plan", "rank", "data")
    told = [[tuple(stage.get(name) for name in kept) for stage in job.stages] for job in (lora, ia3, alone)]
    first, second = str(tmp_path / "FIRST"), str(tmp_path / "SECOND")
    assert told[0] == [("T", None, first), ("LoRA", 2, second)] and told[1] == [("T", None, first), ("IA3", 2, first)]
    assert told[2] == [("T", None, first)] and not any("stages" in stage for job in (lora, ia3, alone) for stage in job.stages)
    result = run_job(lora, None)
    merged = Path(lora.folder) / "stage-1" / "merged"
    assert result["plan"] == "LoRA" and result["steps"] == 2 and (merged / "config.json").is_file()
    about = json.loads((Path(lora.folder) / "stage-2" / "adapter" / "fastpeft.json").read_text())
    assert about["base"]["model"] == str(merged.resolve()) and result["scores"]["second"]["n"] == 2
    with pytest.raises(ValueError, match="there is no data set 'first'; data has other"):
        jobs(write(tmp_path, text.replace("first: {", "other: {").replace("data: first", "data: other").replace("[first]", "[other]")))
    with pytest.raises(ValueError, match="tiny: options: stages are a row's, or the recipe's"):
        read_study(write(tmp_path, text + "tiny: {options: {stages: [{steps: 1}]}}"), "tiny")


def test_studies_of_all_papers_are_shipped():
    names = {path.stem for path in STUDIES}
    assert {f"mile_{n}" for n in range(1, 8)} | {"mile_figures", "layernorm_1", "layernorm_2", "layernorm_3"} <= names
    assert {"lavin_1", "lavin_2", "lavin_ablations"} <= names
    assert {"excitor_1", "excitor_3", "excitor_5", "excitor_figure_5", "excitor_ablations"} <= names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rows: []", "it needs rows"),
        ("rows: [{plan: F/LoRA/LoRA}]\ntitel: x", "unknown 'titel'"),
        ("rows: [{plan: F/LoRA/LoRA, learning_rat: 1.0}]", "unknown 'learning_rat'"),
        ("rows: [{plan: F/LoRA/LoRA, learning_rate: fast}]", "learning_rate must be a number"),
        ("rows: [{plan: F/LoRA/LoRA, seed: 3}]", "seed is the study's to say"),
        ("rows: [{name: on, plan: F/LoRA/LoRA}]", "put it in quotes"),
        ("rows: [{plan: F/LoRA/LoRA, data: slake}]", "no data set 'slake'"),
        ("rows: [{plan: F/LoRA/LoRA}]\nseeds: [1, 1]", "different whole numbers"),
        ("rows: [{plan: F/LoRA/LoRA}]\nscore_on: [x]", "no data set 'x'"),
        ("rows: [{plan: F/LoRA/LoRA}]\ngeneration: {temperature: hot}", "temperature must be a number"),
        ("rows: 3", "must be a list"),
        ("- a", "is no study"),
        ("rows: [{plan: F/LoRA/LoRA}]\nrecipe: nowhere.yaml", "cannot read"),
    ],
)
def test_what_a_file_cannot_say(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        read_study(write(tmp_path, text))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("[{plan: F/LoRA/LoRA}, {plan: F/LoRA/LoRA}]", "two rows are called 'F/LoRA/LoRA'"),
        ("[{name: x, plan: F/LoRA/LoRA, from: y}]", "no row 'y' to start from"),
        ("[{name: x, plan: T/T/T, from: y}, {name: y, plan: T/T/T, from: x}]", "start from each other"),
        ("[{name: x, plan: T/T/T, seeds: [1]}, {name: y, plan: T/T/T, from: x}]", "does not run with seed 0"),
        ("[{name: a b, plan: T/T/T}, {name: a-b, plan: T/T/F}]", "one folder"),
        ("[{plan: F/LoRA}]", "2 treatments"),
        ("[{plan: F/LoRA/LoRA, batch_size: 0}]", "batch_size"),
        ("[{plan: F/LoRA/LoRA, image_encoder: B/16}]", "no choice of image encoder"),
    ],
)
def test_rows_that_cannot_run(tmp_path, rows, says):
    path = write(tmp_path, f"data: {{d: DIR}}\nrows: {rows}")
    with pytest.raises(ValueError, match=says):
        check(read_study(path), jobs(path))


def test_a_data_set_needs_a_folder(tmp_path):
    path = write(tmp_path, "data: {slake: {}}\nrows: [{plan: F/LoRA/LoRA}]")
    with pytest.raises(ValueError, match="--data slake=DIR"):
        jobs(path)
    with pytest.raises(ValueError, match="no data set 'slak'"):
        jobs(path, slak="x")
    with pytest.raises(ValueError, match="no tiny: block"):
        read_study(path, "tiny")
    assert data_folders(path, ["DIR"]) == data_folders(path, ["slake=DIR"]) == {"slake": "DIR"}


def test_jobs_of_rows_data_sets_and_seeds(tmp_path):
    path = write(tmp_path, """
recipe: r.yaml
options: {plan: T/T/T, learning_rate: 2e-5}
data: {slake: A, rad: {data: B, languages: [en, zh]}}
seeds: [0, 7]
rows:
  - {name: on, from: full, plan: T/T/T, data: rad}
  - {name: full, data: slake, rank: 8}
  - {plan: F/LoRA/LoRA, rank: 4}
""".replace("name: on", "name: onward"))  # fmt: skip
    (tmp_path / "r.yaml").write_text("batch_size: 5\nlearning_rate: 1.0")
    found = jobs(path, tmp_path, rad="C")
    assert [job.name for job in found] == [
        "full, seed 0", "onward, seed 0", "full, seed 7", "onward, seed 7",
        "F/LoRA/LoRA r=4 on slake, seed 0", "F/LoRA/LoRA r=4 on slake, seed 7",
        "F/LoRA/LoRA r=4 on rad, seed 0", "F/LoRA/LoRA r=4 on rad, seed 7",
    ]  # fmt: skip
    onward = next(job for job in found if job.name == "onward, seed 7")
    assert onward.starts_from == "full, seed 7"
    assert onward.stages == (
        {"batch_size": 5, "learning_rate": 2e-5, "plan": "T/T/T", "data": "C", "languages": ("en", "zh"), "seed": 7},
    ) or list(onward.stages[0]["languages"]) == ["en", "zh"]
    assert len({job.folder for job in found}) == len(found)


def _result(trainable: int, base: int, score: float | None, seconds: float = 1.0) -> dict:
    parts = {
        "vit": {"trainable": 0, "base": 100, "adapters": 0},
        "jtm": {"trainable": trainable, "base": base, "adapters": trainable},
        "dec": {"trainable": 40, "base": 40, "adapters": 0},
    }
    counts = {"trainable": trainable + 40, "percent": 12.3456, "percent_of_base": 13.0, "parts": parts}
    return {
        "parameters": counts, "plan": "F/LoRA/T", "model": "m", "adapter_bytes": 2_000_000, "memory": {"peak_bytes": 3e9},
        "peak_memory_bytes": 4e9, "seconds": seconds, "loss_last": 0.5, "scores": {"a": {"open": score, "closed": None, "global": 0.5}},
    }  # fmt: skip


def test_table_of_means_and_spread(tmp_path):
    path = write(
        tmp_path,
        "data: {a: DIR}\nseeds: [0, 1, 2]\nrows: [{name: x, plan: F/LoRA/T, paper: {open: 30, percent: 9}}, {name: 'y|z', plan: T/T/T}]",
    )
    found = jobs(path)
    scores = iter([0.2, 0.3, 0.7])
    results = [(job, _result(10, 60, next(scores)) if job.row == "x" else None) for job in found]
    names = ("trainable", "percent", "peft", "peft_percent", "peft_by_part", "adapter_bytes", "memory", "open", "closed")
    table = table_of("caption", names, results, {"y|z, seed 0": "out of memory"}, None, paper=True)
    lines = table.markdown().splitlines()
    assert lines[2].startswith("| Row | vit | jtm | dec | Trainable | #Params, % | #Params, %, paper |")
    spread = math.sqrt(((0.2 - 0.4) ** 2 + (0.3 - 0.4) ** 2 + (0.7 - 0.4) ** 2) / 2)
    assert f"| 40.00 ± {100 * spread:.2f} | 30 | - |" in lines[4]
    assert "| 50 | 12.346 | 9 | 10 | 16.667 | jtm 10 | 2.00 |" in lines[4]
    assert lines[5].startswith("| y\\|z (failed: out of memory) |")
    first, second = csv.DictReader(io.StringIO(table.csv()))
    assert float(first["open"]) == pytest.approx(0.4) and float(first["open_spread"]) == pytest.approx(spread)
    assert (first["open_paper"], first["closed"], second["note"]) == ("30", "", "failed: out of memory")
    assert "paper" not in table_of("caption", names, results, {}, None, paper=False).markdown()
    with pytest.raises(ValueError, match="no column 'opn'"):
        check_columns(["opn"])


def test_each_column_reads_a_result(tmp_path):
    """Of a real result of each kind nothing is asked that is not there."""
    (job,) = jobs(write(tmp_path, "data: {a: DIR}\nrows: [{name: x, plan: F/LoRA/T}]"))
    metrics = text_metrics(["no finding in it"], [["no finding at all there"]], tokenizer=None, metrics=("rouge", "meteor"))
    metrics |= {"tokens": 5.0, "BERTScore": {"precision": 0.6, "recall": 0.7, "f1": 0.8}}
    scores = {"open": 0.1, "closed": 0.2, "global": 0.3, "scienceqa": {"NAT": 0.4, "Avg": 0.5}, "metrics": metrics}
    scores["captions"] = {"BLEU-4": 0.497, "CIDEr": 1.575}
    scores["mmlu"] = {"task_mean": 0.35, "relative_change": -0.03, "base": {"task_mean": 0.36}}
    result = _result(10, 60, 0.1) | {"scores": {"a": scores}}
    shown = table_of("c", tuple(COLUMNS), [(job, result)], {}, "a", paper=False).lines[0][2]
    want = {"NAT": "40.00", "Avg": "50.00", "SOC": "-", "rouge_recall": "40.00", "rouge_precision": "50.00"}
    want |= {"tokens": "5.000", "bertscore_f1": "80.00", "bleu_4": "49.70", "cider": "157.50"}
    want |= {"mmlu": "35.00", "mmlu_base": "36.00", "mmlu_change": "-3.00", "mmlu_wins": "-"}
    assert {name: shown[name].text for name in want} == want
    assert shown["meteor"].mean == metrics["METEOR"]["score"] > 0


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
