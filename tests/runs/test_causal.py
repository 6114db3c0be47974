"""Runs on causal language models, from files to answers."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastpeft.cli import app
from fastpeft.methods.quantized import is_held, is_quantized
from fastpeft.plan import build
from fastpeft.runs.evaluate import eval_run, load_run
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def alpaca(tmp_path):
    """Instructions of two forms, with input and without; a fact repeated often enough to be learnt."""
    folder = tmp_path / "alpaca"
    folder.mkdir()
    rows = [{"instruction": "Name the colour.", "input": f"thing {i % 4}", "output": COLOURS[i % 4]} for i in range(40)]
    rows += [{"instruction": "Say hello.", "input": "", "output": "hello"}] * 8
    (folder / "alpaca_data.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows[:4]))
    return folder


@pytest.fixture
def pictures(tmp_path):
    """LLaVA conversations about images of one colour, and one without an image."""
    folder = tmp_path / "llava"
    folder.mkdir()
    rows = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        rows += [{"id": f"{i}", "image": f"{colour}.png", "conversations": said}] * 3
    said = [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "hello"}]
    rows.append({"id": "text", "conversations": said})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def config(tmp_path, **more):
    return TrainConfig(**{"out": str(tmp_path / "run"), "batch_size": 8, "progress": False, "steps": 3} | more)


def test_a_language_model_learns_and_answers(alpaca, tmp_path):
    data = DataOptions(str(alpaca), split_file=str(alpaca / "alpaca_data.json"), eval_split_file=str(alpaca / "test.json"))
    how = config(tmp_path, steps=90, batch_size=16, base_learning_rate=1e-3)
    summary = train_run("llama-tiny", "T", data, how, text=TextOptions(template="plain"))
    assert summary["loss_last"] < 0.2 * summary["loss_first"] and summary["eval"]["global"] == 1.0
    assert summary["tokens_per_second"] > 0 and summary["model"] == "llama-tiny"
    rows = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [row["prediction"] for row in rows] == list(COLOURS)
    again = eval_run(tmp_path / "run" / "adapter", DataOptions(str(alpaca), split_file=str(alpaca / "test.json")), progress=False)
    assert again["global"] == 1.0 and again["n"] == 4


@pytest.mark.parametrize("plan", ["LoRA", "IA3", "PTv2", "LayerNorm", "LoRA+IA3", "AdaptionPrompt"])
def test_packing_changes_no_loss(alpaca, tmp_path, plan):
    losses = []
    for packed in (True, False):
        data = DataOptions(str(alpaca), split_file=str(alpaca / "alpaca_data.json"))
        options = {"text": TextOptions(packed=packed), "evaluate": False}
        train_run("llama-tiny", plan, data, config(tmp_path / str(packed)), **options)
        lines = (tmp_path / str(packed) / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradient_accumulation_weighs_labelled_tokens(alpaca, tmp_path):
    losses = []
    for batch_size, parts in ((8, 1), (2, 4)):
        data, out = DataOptions(str(alpaca), split_file=str(alpaca / "alpaca_data.json")), tmp_path / str(parts)
        train_run("llama-tiny", "LoRA", data, config(out, batch_size=batch_size, gradient_accumulation=parts), evaluate=False)
        losses.append([json.loads(line)["loss"] for line in (out / "run" / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_a_short_last_group_weighs_labelled_tokens(pictures, tmp_path, packed):
    """Images and text mixed: an epoch as one batch, and as three of a group that may take eight."""
    rows = []
    for batch_size, parts in ((13, 1), (5, 8)):
        out = tmp_path / str(parts)
        how = config(out, batch_size=batch_size, gradient_accumulation=parts, steps=None)
        text = TextOptions(packed=packed)
        summary = train_run("llava-med-tiny", "F/F/LoRA/F", DataOptions(str(pictures)), how, text=text, evaluate=False)
        assert (summary["steps"], summary["samples"]) == (1, 13)
        rows += [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)


def test_images_and_text_in_one_run(pictures, tmp_path):
    summary = train_run("llava-med-tiny", "F/T/LoRA/T", DataOptions(str(pictures)), config(tmp_path, steps=4), evaluate=False)
    assert summary["steps"] == 4 and summary["parts"]["llm"]["saved_bytes"] > 0
    network, tokenizer, preprocess = load_run(tmp_path / "run" / "adapter")
    assert preprocess.image_size == 32 and len(tokenizer) <= network.config.text_config.vocab_size
    scored = eval_run(
        tmp_path / "run" / "adapter", DataOptions(str(pictures), split_file=str(pictures / "train.json")), progress=False, max_new_tokens=4
    )
    assert scored["n"] == 13


def test_what_was_held_out_can_be_scored_again(alpaca, tmp_path):
    (alpaca / "test.json").unlink()
    data = DataOptions(str(alpaca), hold_out=0.2)
    summary = train_run("llama-tiny", "LoRA", data, config(tmp_path))
    held = tmp_path / "run" / "held_out.json"
    scored = eval_run(tmp_path / "run" / "adapter", DataOptions(str(alpaca), split_file=str(held)), progress=False)
    assert scored["n"] == summary["eval"]["n"] == len(json.loads(held.read_text())) == 10
    held.write_text('["0", "77"]')
    with pytest.raises(ValueError, match="does not have, such as '77'"):
        eval_run(tmp_path / "run" / "adapter", DataOptions(str(alpaca), split_file=str(held)), progress=False)


def test_a_model_without_eyes_refuses_images(pictures, tmp_path):
    with pytest.raises(ValueError, match="the data have images, and a llama sees none"):
        train_run("llama-tiny", "LoRA", DataOptions(str(pictures)), config(tmp_path), evaluate=False)


def test_resumed_equals_uninterrupted(alpaca, tmp_path):
    data = DataOptions(str(alpaca), split_file=str(alpaca / "alpaca_data.json"))
    whole = train_run("llama-tiny", "LoRA", data, config(tmp_path / "a", steps=6), evaluate=False)
    # the schedule is the whole run's: stop it half way, as a signal would
    from fastpeft.train.trainer import Trainer

    step, seen = Trainer._step, []

    def stopping(self, *group):
        row = step(self, *group)
        seen.append(row)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return row

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", stopping)
        train_run("llama-tiny", "LoRA", data, config(tmp_path / "b", steps=6, save_every=2), evaluate=False)
    resumed = train_run("llama-tiny", "LoRA", data, config(tmp_path / "b", steps=6, resume=True), evaluate=False)
    assert resumed["loss_last"] == whole["loss_last"]


def test_command_line(alpaca, tmp_path, capsys):
    out, split, said = tmp_path / "run", str(alpaca / "alpaca_data.json"), "--quiet --json"
    how = f"--model llama-tiny --plan LoRA --steps 2 --batch-size 4 --no-eval --no-packing --max-length 300 {said}"
    app(["train", "--data", str(alpaca), "--split-file", split, "--out", str(out), *how.split()], standalone_mode=False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    app(["eval", "--adapter", str(out / "adapter"), "--data", str(alpaca), "--max-new-tokens", "3", *said.split()], standalone_mode=False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 4
    assert (out / "report.html").stat().st_size > 0


RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("recipe, model, data", [("excitor", "llama-tiny", "alpaca"), ("lavin", "lavin-tiny", "pictures")])
def test_recipes_run_on_tiny_models(request, tmp_path, capsys, recipe, model, data):
    folder = request.getfixturevalue(data)
    (folder / "test.json").unlink(missing_ok=True)
    how = f"--model {model} --steps 2 --batch-size 4 --max-length 400 --hold-out 0.2 --quiet --json"
    arguments = ["train", "--config", str(RECIPES / f"{recipe}.yaml"), "--data", str(folder), "--out", str(tmp_path / "run"), *how.split()]
    app(arguments, standalone_mode=False)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2 and summary["dtype"] == "bf16" and summary["eval"]["n"] > 0
    assert summary["plan"] == {"excitor": "Excitor", "lavin": "MMAdapter/T/MMAdapter"}[recipe]


def test_excitor_trains_on_kept_features(pictures, tmp_path):
    summary = train_run("excitor-tiny", "F/Excitor", DataOptions(str(pictures)), config(tmp_path, steps=6), evaluate=False)
    assert any("image features kept (4 images" in note for note in summary["notes"])
    assert summary["parts"].get("vision", {"flops_per_sample": 0})["flops_per_sample"] == 0


def test_merged_folder_answers_alike(alpaca, tmp_path):
    from fastpeft.runs.merge import merge_run

    data = DataOptions(str(alpaca), split_file=str(alpaca / "alpaca_data.json"))
    train_run("llama-tiny", "LoRA", data, config(tmp_path, steps=10, learning_rate=1e-2), evaluate=False)
    merge_run(tmp_path / "run" / "adapter", tmp_path / "merged")
    ids = torch.tensor([[1, 40, 50, 60]])
    adapted = load_run(tmp_path / "run" / "adapter")[0].eval()
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_lavin_merges_for_a_modality(pictures, tmp_path):
    """What CLIP routes by token stays in an adapter beside the merged base."""
    from fastpeft.runs.merge import merge_run

    train_run("lavin-tiny", "MMAdapter/T/MMAdapter", DataOptions(str(pictures)), config(tmp_path, learning_rate=1e-2), evaluate=False)
    routing = json.loads((tmp_path / "run" / "summary.json").read_text())["routing"]
    assert all(sum(pair) == pytest.approx(1) for layers in routing.values() for pair in layers)
    assert routing.keys() == {"text", "image"} and len(routing["text"]) == 4 and routing["text"] != routing["image"]
    assert "weight of the first expert" in (tmp_path / "run" / "report.html").read_text()
    run, ids = tmp_path / "run" / "adapter", torch.tensor([[1, 40, 41, 42, 43, 50]])
    places = (torch.arange(6) > 0) & (torch.arange(6) < 5)
    given = {"text": {}, "image": {"pixel_values": torch.randn(1, 3, 32, 32), "image_mask": places[None]}}
    adapted = load_run(run)[0].eval()
    with pytest.raises(ValueError, match="say which, modality='text' or 'image'"):
        merge_run(run, tmp_path / "none")
    for modality, seen in given.items():
        folder = merge_run(run, tmp_path / modality, modality=modality)
        assert (folder / "adapter").exists() == (modality == "image")
        merged = load_run(folder / "adapter")[0] if modality == "image" else build(folder)
        with torch.no_grad():
            want, got = adapted(ids, **seen).logits, merged.eval()(ids, **seen).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def problems(tmp_path):
    """ScienceQA: problems with a captioned image and without."""
    folder = tmp_path / "scienceqa"
    told = {"choices": ["cat", "dog"], "answer": 0, "hint": "", "lecture": "", "solution": "", "topic": "t"}
    told |= {"grade": "grade2", "subject": "natural science"}
    entries = {}
    for i in range(6):
        split = "train" if i < 4 else "test"
        entries[str(i)] = told | {"question": f"Which {i}?", "image": "image.png" if i % 2 else None, "split": split}
        if i % 2:
            (folder / "images" / split / str(i)).mkdir(parents=True)
            Image.new("RGB", (40, 40), "red").save(folder / "images" / split / str(i) / "image.png")
    for name, value in (("problems", entries), ("pid_splits", {"train": list("0123"), "test": list("45")})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "captions.json").write_text(json.dumps({"captions": {i: f"picture {i}" for i in "135"}}))
    return folder


def test_an_adapter_asks_as_it_was_trained(problems, tmp_path, monkeypatch):
    """The prompt's format, and captions in place of images for a model that sees none, are the adapter's, not the defaults."""
    text = TextOptions(prompt_format="CQM-A", use_caption=True)
    summary = train_run("llama-tiny", "LoRA", DataOptions(str(problems)), config(tmp_path), text=text)
    assert summary["eval"]["scienceqa"]["n"]["IMG"] == 1
    seen = []
    monkeypatch.setattr("fastpeft.runs.causal.respond_and_score", lambda network, dataset, **how: (seen.append(dataset), ([], {}))[1])
    eval_run(tmp_path / "run" / "adapter", DataOptions(str(problems)), progress=False)
    asked = seen[0].samples[1]
    assert asked.question.startswith("Context: picture 5\nQuestion:") and asked.image is None and asked.answer == "The answer is A."


def test_one_of_several_trained_formats_is_asked_as_it_was_trained(problems, tmp_path, monkeypatch):
    text = TextOptions(prompt_format=["QCM-LEA", "QCM-A"], use_caption=True)
    rows = json.loads((problems / "problems.json").read_text())
    (problems / "problems.json").write_text(json.dumps({qid: row | {"solution": "It is."} for qid, row in rows.items()}))
    train_run("llama-tiny", "LoRA", DataOptions(str(problems)), config(tmp_path, steps=1), text=text, evaluate=False)
    seen = []
    monkeypatch.setattr("fastpeft.runs.causal.respond_and_score", lambda network, dataset, **how: (seen.append(dataset), ([], {}))[1])
    eval_run(tmp_path / "run" / "adapter", DataOptions(str(problems)), progress=False)
    (unsaid,) = (data.samples[0] for data in seen)  # the paper's evaluation: the answer alone, whatever was drawn in training
    assert (unsaid.answer, unsaid.alternatives) == ("The answer is A.", ()) and unsaid.question.endswith("directly.")
    seen.clear()
    for asked in ("QCM-A", "QCM-LEA"):
        eval_run(tmp_path / "run" / "adapter", DataOptions(str(problems)), progress=False, prompt_format=asked, draw_unparsed=0)
    direct, reasoned = (data.samples[0] for data in seen)
    assert direct.question == f"{reasoned.question}\nAnswer with the option's letter from the given choices directly."
    assert (direct.answer, reasoned.answer) == ("The answer is A.", "It is. The answer is A.") and not direct.alternatives


def test_images_without_eyes_are_told_of_captions(problems, tmp_path):
    with pytest.raises(ValueError, match=r"a llama sees none: .*use_caption"):
        train_run("llama-tiny", "LoRA", DataOptions(str(problems)), config(tmp_path), evaluate=False)


def test_a_file_is_not_tested_on_what_it_trains(alpaca, tmp_path):
    data = DataOptions(str(alpaca), split_file="test.json")
    summary = train_run("llama-tiny", "LoRA", data, config(tmp_path))
    assert summary["eval"] is None and any("apart from the training samples" in note for note in summary["notes"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_length": 1}, "max_length must be a whole number of 2 or more, not 1"),
        ({"max_length": "long"}, "max_length must be"),
        ({"packed": "no"}, "packed must be true or false"),
        ({"use_caption": 1}, "use_caption must be true or false"),
        ({"template": 3}, "template must be text"),
    ],
)
def test_text_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        TextOptions(**wrong)


@pytest.mark.parametrize("how, dtype", [("4bit", "bf16"), ("8bit", "fp32")])
def test_a_quantised_base_from_training_to_files(pictures, tmp_path, how, dtype):
    """The adapter's folder says how its base was quantised: evaluation answers with the same base, to the bit; merging writes it out."""
    pytest.importorskip("bitsandbytes")
    out = str(tmp_path / "run")
    data = ["--data", str(pictures), "--split-file", str(pictures / "train.json"), "--device", "cpu", "--quiet"]
    args = ["train", "--model", "lavin-tiny", "--plan", "MMAdapter/T/MMAdapter", "--quantize", how, "--dtype", dtype, "--steps", "3"]
    app([*args, *data, "--batch-size", "4", "--no-eval", "--out", out], standalone_mode=False)
    base = json.loads((tmp_path / "run" / "adapter" / "fastpeft.json").read_text())["base"]
    assert base["quantize"] == how and base["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line)["loss"] > 0 for line in lines)
    saved = [str(f) for f in (tmp_path / "run").rglob("*.safetensors")]
    names = {name for f in saved for name in safe_open(f, "pt").keys()}  # noqa: SIM118
    assert saved and not any("absmax" in n or "quant_state" in n or "SCB" in n or "_proj.weight" in n for n in names)
    model, *_ = load_run(tmp_path / "run" / "adapter", "cpu")
    again = build("lavin-tiny", quantize=how, dtype=model.dtype, **base["overrides"])
    for name, weight in again.named_parameters():
        if is_quantized(weight):
            assert torch.equal(weight, model.get_parameter(name)), name
    assert any(map(is_held, model.modules())) and next(model.parameters()).dtype == model.dtype
    app(["eval", "--adapter", out + "/adapter", *data, "--max-new-tokens", "2"], standalone_mode=False)
    app(["merge", "--adapter", out + "/adapter", "--out", str(tmp_path / "merged"), "--modality", "text"], standalone_mode=False)
    assert not any(map(is_held, build(tmp_path / "merged").modules()))
    app([*args, *data, "--batch-size", "4", "--no-eval", "--out", out, "--resume"], standalone_mode=False)
    other = [{"4bit": "8bit", "8bit": "4bit"}.get(arg, arg) for arg in args]
    with pytest.raises(ValueError, match=r"cannot resume .*base was"):
        app([*other, *data, "--batch-size", "4", "--no-eval", "--out", out, "--resume"], standalone_mode=False)
