"""Runs on several data sets: shares of an epoch, turns, losses by data set, the resume check."""

import json
import shutil
from collections import Counter

import pytest
from PIL import Image

from fastpeft.cli import app
from fastpeft.data import EpochSampler, Instruction, SampleList, load_instructions, mix
from fastpeft.runs import causal
from fastpeft.runs.options import DataOptions, DataSource, read_yaml
from fastpeft.runs.splits import load_splits, source_names
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path):
    """(Alpaca's instructions with a test split, LLaVA's conversations of two turns about one image)."""
    text, talk = tmp_path / "text", tmp_path / "talk"
    for folder in (text, talk):
        folder.mkdir()
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(12)]
    (text / "alpaca_data.json").write_text(json.dumps(rows))
    (text / "test.json").write_text(json.dumps(rows[:3]))
    Image.new("RGB", (40, 40), "red").save(talk / "COCO_1.png")
    said = [("human", "<image>\nWhich colour?"), ("gpt", "a red one"), ("human", "Sure?"), ("gpt", "yes it is")]
    talks = [{"id": str(i), "image": "1.png", "conversations": [{"from": f, "value": v} for f, v in said]} for i in range(4)]
    (talk / "train.json").write_text(json.dumps(talks))
    return text, talk


def config(tmp_path, **more):
    return TrainConfig(**{"out": str(tmp_path / "run"), "batch_size": 8, "progress": False, "steps": 3, "device": "cpu"} | more)


# options ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, sources",
    [
        ("a", [DataSource("a")]),
        ("a,b", [DataSource("a,b")]),
        ("a,b,weight=2", [DataSource("a,b", weight=2.0)]),
        (["a,turns=first,image_folder=x", "b,weight"], [DataSource("a", turns="first", image_folder="x"), DataSource("b,weight")]),
        ([{"path": "a", "weight": 1}, {"path": "b", "weight": 0.5}], [DataSource("a", weight=1.0), DataSource("b", weight=0.5)]),
    ],
)  # fmt: skip
def test_data_sets_are_spelt_as_paths_with_options(said, sources):
    assert list(DataOptions(said).sources) == sources


@pytest.mark.parametrize(
    "said, message",
    [
        ([], r"data must be a path, not \[\]"),
        (["a", 3], "data must be a path"),
        (["a,weight=2", "b"], "give a weight to every data set, or to none"),
        ("a,turns=some", "turns must be one of dialogue, each, first, not 'some'"),
        ("a,weight=0", "weight must be a number above 0"),
        ("a,weight=many", "weight must be a number above 0, not 'many'"),
        ([{"pth": "a"}], "unknown option pth; did you mean path"),
    ],
)
def test_wrong_data_sets_are_named(said, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DataOptions(said)


def test_a_split_file_is_of_one_data_set():
    with pytest.raises(ValueError, match="split_file and eval_split_file are of one data set"):
        DataOptions(["a", "b"], split_file="x.json")


def test_yaml_lists_data_sets(tmp_path):
    (tmp_path / "r.yaml").write_text("data:\n  - {path: a, weight: 2, turns: each}\n  - {path: b, weight: 1}\n")
    assert DataOptions(read_yaml(tmp_path / "r.yaml")["data"]).sources[0] == DataSource("a", weight=2.0, turns="each")


def test_names_are_as_much_of_the_paths_as_tells_them_apart():
    assert source_names(DataOptions(["x/a", "y/b"])) == ["a", "b"]
    assert source_names(DataOptions(["x/a", "y/a", "y/c"])) == ["x/a", "y/a", "c"]
    assert source_names(DataOptions(["x/a,turns=first", "x/a,turns=each"])) == ["a (1)", "a (2)"]


# reading ------------------------------------------------------------------------------------------------------------------------


def test_splits_of_several_data_sets_are_joined(folders):
    text, talk = folders
    samples, held = load_splits(DataOptions([str(text), f"{talk},image_prefix=COCO_,turns=each"]), read=causal.read)
    assert Counter(s.data for s in samples) == {"text": 12, "talk": 8} and samples.format == "alpaca+llava"
    assert Counter(s.data for s in held) == {"text": 3} and "talk: no test questions" in samples.note


@pytest.mark.parametrize("turns, questions", [("dialogue", [2] * 4), ("each", [1] * 8), ("first", [1] * 4)])
def test_conversations_are_taken_whole_by_turn_or_begun(folders, turns, questions):
    samples = load_instructions(folders[1], turns=turns, image_prefix="COCO_")
    assert [len(s.turns) for s in samples] == questions and all(s.image.name == "COCO_1.png" for s in samples)
    with pytest.raises(ValueError, match="turns='two': use one of dialogue, each, first"):
        load_instructions(folders[1], turns="two")


def test_options_of_conversations_are_refused_for_questions_about_images(phantoms):
    with pytest.raises(ValueError, match="turns: options of instruction data"):
        train_run("miss-tiny", "F/F/LoRA", DataOptions(f"{phantoms},turns=first"), TrainConfig(steps=1), pretrained=False)


# shares -------------------------------------------------------------------------------------------------------------------------


def listed(name, count):
    return SampleList([Instruction(((f"{name}{i}", "x"),), None, "alpaca", str(i), i, None) for i in range(count)])


@pytest.mark.parametrize("q", [1, 3])
def test_an_epoch_has_each_data_sets_share(q):
    data = mix({"a": listed("a", 10), "b": listed("b", 30)}, {"a": 3, "b": 1})
    data.source_weights = data.weights
    sampler = EpochSampler(data, 7, seed=1, questions_per_image=q)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [i for batch in sampler for i in batch]
        visits = Counter(order)
        assert len(order) == 40 and [len(b) for b in sampler] == [7] * 5 + [5]
        assert sum(visits[i] for i in range(10)) == 30 and {visits[i] for i in range(10)} == {3}
        assert sum(visits[i] for i in range(10, 40)) == 10 and max(visits[i] for i in range(10, 40)) == 1
        seen.append(order)
    assert seen[0] != seen[1]
    sampler.set_epoch(1, 2)
    assert [i for batch in sampler for i in batch] == seen[1][14:]  # goes on within an epoch
    assert sampler.identity()["shares"] == {"a": 30, "b": 10}


def test_without_weights_each_sample_comes_once():
    data = mix({"a": listed("a", 5), "b": listed("b", 2)})
    sampler = EpochSampler(data, 3)
    assert sorted(i for batch in sampler for i in batch) == list(range(7)) and "shares" not in sampler.identity()


# losses -------------------------------------------------------------------------------------------------------------------------


def steps(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("packed, plan", [(True, "F/LoRA"), (False, "F/LoRA"), (True, "F/T")])
def test_losses_by_data_set_are_those_of_each_alone(folders, tmp_path, packed, plan):
    text, talk = str(folders[0]), f"{folders[1]},image_prefix=COCO_"
    how = {"text": causal.TextOptions(packed=packed), "evaluate": False}
    summary = train_run("excitor-tiny", plan, DataOptions([text, talk]), config(tmp_path, batch_size=16), **how)
    how["vocab"] = str(tmp_path / "run" / "adapter" / "tokenizer")
    alone = {}
    for name, data in (("text", text), ("talk", talk)):
        train_run("excitor-tiny", plan, DataOptions(data), config(tmp_path, out=str(tmp_path / name), batch_size=16, steps=1), **how)
        alone[name] = steps(tmp_path / name)[0]["loss"]
        assert "loss_by_source" not in steps(tmp_path / name)[0]
    first = steps(tmp_path / "run")[0]
    assert first["loss_by_source"] == pytest.approx(alone, rel=1e-4)
    assert min(alone.values()) < first["loss"] < max(alone.values())
    assert {name: of["samples"] for name, of in summary["sources"].items()} == {"text": 36, "talk": 12}
    assert "By data set" in (tmp_path / "run" / "report.html").read_text()


def test_losses_of_answers_are_means_over_samples(phantoms, tmp_path):
    """MISS: the loss of a batch is the mean of its data sets' losses by their samples."""
    copy = shutil.copytree(phantoms, tmp_path / "copy")
    train_run("miss-tiny", "F/F/LoRA", DataOptions([str(phantoms), str(copy)]), config(tmp_path), pretrained=False, evaluate=False)
    rows = steps(tmp_path / "run")
    for row in rows:
        found = list(row["loss_by_source"].values())
        assert len(found) == 2 and min(found) <= row["loss"] <= max(found)
    known = [row for row in rows if len(set(row["loss_by_source"].values())) == 2]
    for row in known:  # a share in eighths
        low, high = sorted(row["loss_by_source"].values())
        share = 8 * (row["loss"] - low) / (high - low)
        assert abs(share - round(share)) < 1e-3 and 0 < round(share) < 8
    assert known


def test_mixing_changes_no_loss(folders, tmp_path):
    """One data set cut in two: the same steps as on the whole."""
    rows = json.loads((folders[0] / "alpaca_data.json").read_text())
    for name, part in (("one", rows[:6]), ("two", rows[6:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps(part))
    losses = []
    for out, data in (("a", str(folders[0])), ("b", [str(tmp_path / "one"), str(tmp_path / "two")])):
        how = config(tmp_path, out=str(tmp_path / out), batch_size=5)
        vocab = {"vocab": str(tmp_path / "a" / "adapter" / "tokenizer")} if out == "b" else {}
        train_run("llama-tiny", "LoRA", DataOptions(data), how, evaluate=False, **vocab)
        read = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in read])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_resumed_mixture_must_be_the_same(folders, tmp_path, capsys):
    text, talk = folders
    common = ["--model", "excitor-tiny", "--plan", "F/LoRA", "--batch-size", "4", "--out", str(tmp_path / "run"), "--no-eval", "--quiet"]
    one, two = f"{text},weight=1", f"{talk},image_prefix=COCO_,weight=1"
    app(["train", "--data", one, "--data", two, "--steps", "2", *common], standalone_mode=False)
    app(["train", "--data", one, "--data", two, "--steps", "3", "--resume", *common], standalone_mode=False)
    with pytest.raises(ValueError, match=r"cannot resume.*shares text was 8, now 11"):
        app(["train", "--data", f"{text},weight=2", "--data", two, "--steps", "4", "--resume", *common], standalone_mode=False)
