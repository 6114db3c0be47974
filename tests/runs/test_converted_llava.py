"""A converted LLaVA-Med is trained, scored and asked from its folder alone, by the command line, on data in their published form."""

import json

import pytest
import torch
from official_llava import BASE, MED, TOKENS, clip, config_of, projector_state, text_state, write_folder
from PIL import Image

import fastpeft as fp
from fastpeft.adapters import describe
from fastpeft.cli import app
from fastpeft.data import load_instructions
from fastpeft.study.made_data import make

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*words):
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_folder(root / "llama", config_of(model_type="llama", architectures=["LlamaForCausalLM"]), text_state(), shards=1)
    torch.save(clip(), root / "ViT.pt")
    write_folder(root / "delta", config_of(**MED), text_state(BASE + 4, seed=1, scale=0.05) | projector_state(), tokens=TOKENS)
    call("convert", root / "delta", root / "med", "--llama", root / "llama", "--clip", root / "ViT.pt")
    return root / "med"


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    """LLaVA-Med's question answering files: conversations with answer_type."""
    root = tmp_path_factory.mktemp("vqa")
    (root / "images").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (40, 30), name).save(root / "images" / f"{name}.png")
    asked = [("is it hot?", "yes", "CLOSED"), ("tell the hello", "hello", "OPEN")]
    for split in ("train", "test"):
        rows = [
            {"id": i, "image": f"{name}.png", "answer_type": kind}
            | {"conversations": [{"from": "human", "value": f"{q}\n<image>"}, {"from": "gpt", "value": a}]}
            for i, (name, (q, a, kind)) in enumerate((name, one) for name in ("red", "blue") for one in asked)
        ]
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def run(folder, vqa, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    how = ["--template", "v0_train", "--max-length", 900, "--steps", 2, "--batch-size", 2, "--metrics", "tokens", "--quiet"]
    call("train", "--model", folder, "--plan", "F/T/LoRA/F", "--data", vqa, *how, "--out", out, "--device", "cpu")
    return out


def test_trained_and_scored(run, vqa, capsys):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["eval"]["n"] == 4 and summary["eval"]["filled_by"]["open"] == "candidate"
    assert summary["generation"]["stop_strings"] == ["###"]
    assert describe(run / "adapter")["prompt"]["template"] == "v0_train"
    how = ["--max-new-tokens", 3, "--metrics", "tokens", "--quiet", "--json", "--device", "cpu"]
    call("eval", "--adapter", run / "adapter", "--data", vqa, "--template", "simple", *how)
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["n"] == 4 and {"open", "closed", "global"} <= scored.keys() and scored["generation"]["stop_strings"] == ["###"]
    with pytest.raises(ValueError, match="template='v9': use one of"):
        call("eval", "--adapter", run / "adapter", "--data", vqa, "--template", "v9", *how)


def test_asked_and_scored_on_reports(run, folder, tmp_path, capsys):
    """fp.load of the folder; and an adapter of question answering on XrayGPT's summaries, which have no splits (zero-shot)."""
    make(tmp_path / "mimic", {"made": "summaries", "images": {"train": 1, "validate": 1, "test": 2}, "questions_per_image": 2})
    assert isinstance(fp.load(folder).ask(next((tmp_path / "mimic" / "image").glob("*.png")), "what?", max_new_tokens=2), str)
    how = ["--max-new-tokens", 3, "--metrics", "rouge,tokens", "--quiet", "--json", "--device", "cpu"]
    call("eval", "--adapter", run / "adapter", "--data", tmp_path / "mimic" / "filter_cap.json", *how)
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scored["n"] == 4 and "captions" in scored and scored["metrics"]["tokens"] > 0


def test_a_folder_without_an_adapter_is_scored(folder, vqa, capsys):
    """Zero-shot: what the converted weights answer by themselves."""
    how = ["--max-new-tokens", 2, "--metrics", "tokens", "--quiet", "--json", "--device", "cpu"]
    call("eval", "--adapter", folder, "--data", vqa, *how)
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    asked = [(sample.image, sample.question) for sample in load_instructions(vqa, split="test")]
    assert scored["n"] == len(asked) == 4 and scored["generation"]["stop_strings"] == ["###"]
    with pytest.raises(ValueError, match=r"has neither fastpeft.json nor config.json"):
        call("eval", "--adapter", vqa, "--data", vqa, *how)


def test_made_conversations(tmp_path):
    """Of a study at tiny scale: dialogues to train on, questions with answer_type to ask, the image before or after the first."""
    made = {"made": "conversations", "images": {"train": 6, "validate": 1, "test": 2}, "questions_per_image": 4}
    folder = make(tmp_path / "made", made)
    training, asked = load_instructions(folder), load_instructions(folder, split="test")
    assert training.format == "llava" and {len(s.turns) for s in training} == {3} and all(len(s.turns) == 1 for s in asked)
    assert {s.image_at == 0 for s in training} == {True, False} and {s.facts["answer_type"] for s in asked} <= {"OPEN", "CLOSED"}
    assert all(s.image_at in (0, len(s.question)) for s in training)
