"""What a study's file may say, the jobs it makes, the table they fill."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from study_process import write

from fastpeft.evaluate.text_metrics import text_metrics
from fastpeft.study.file import data_folders, read_study
from fastpeft.study.jobs import jobs_of
from fastpeft.study.runner import check
from fastpeft.study.table import COLUMNS, check_columns, table_of
from fastpeft.study.work import run_job

STUDIES = sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml"))
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
