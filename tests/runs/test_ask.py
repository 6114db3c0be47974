"""One call to an answer: fp.load(folder).ask(image, question), and `fastpeft ask`."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

import fastpeft as fp
from fastpeft.adapters import describe
from fastpeft.cli import main
from fastpeft.data import load_samples
from fastpeft.runs.evaluate import eval_run, load_run
from fastpeft.runs.merge import merge_run
from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.train import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    config = TrainConfig(steps=2, batch_size=4, out=out, device="cpu", progress=False)
    train_run("miss-tiny", "F/LoRA/LoRA", DataOptions(str(phantoms)), config, pretrained=False, evaluate=False, r=3)
    return out


def test_answers_are_those_of_eval_whatever_the_image_is_given_as(run, phantoms, tmp_path):
    samples = list(load_samples(phantoms, split="test"))[:3]
    eval_run(run, DataOptions(str(phantoms)), device="cpu", out=str(tmp_path / "answers.json"), progress=False)
    wanted = [row["prediction"] for row in json.loads((tmp_path / "answers.json").read_text())][:3]
    loaded = fp.load(run, device="cpu")
    images = [sample.image for sample in samples]
    questions = [sample.question for sample in samples]
    assert loaded.ask(images, questions) == wanted
    assert [loaded.ask(str(image), q) for image, q in zip(images, questions)] == wanted
    opened = [Image.open(image).convert("RGB") for image in images]
    assert loaded.ask(opened, questions) == wanted
    assert [loaded.ask(np.array(image), q) for image, q in zip(opened, questions)] == wanted
    assert loaded.ask(images[0], questions) == [loaded.ask(images[0], q) for q in questions] and loaded.ask(images[0], []) == []


def test_a_merged_model_answers_alike(run, phantoms, tmp_path):
    merged = merge_run(run, tmp_path / "merged")
    sample = load_samples(phantoms, split="test")[0]
    assert fp.load(merged, device="cpu").ask(sample.image, sample.question) == fp.load(run / "adapter").ask(sample.image, sample.question)


def test_a_full_disk_is_told_by_the_merged_folders_name(run, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(OSError, match=r"merged cannot be written: .*No space left"):
        merge_run(run, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_from_a_runs_folder_as_from_its_adapters(run, phantoms, tmp_path):
    config = TrainConfig(steps=1, batch_size=2, out=tmp_path / "run", device="cpu", progress=False)
    train_run("miss-tiny", None, DataOptions(str(phantoms)), config, pretrained=False, evaluate=False, init_adapter=str(run))
    about, before = describe(tmp_path / "run" / "adapter"), describe(run / "adapter")
    assert about["started_from"]["adapter"] == str(run / "adapter")
    assert about["treatments"] == before["treatments"] and before["treatments"]["dec"][0]["LoRA"]["r"] == 3  # its plan and options
    other = dataclasses.replace(config, out=tmp_path / "other")
    with pytest.raises(ValueError, match=f"is of {before['base']['model']}, and the model is llama-tiny: give its own"):
        train_run("llama-tiny", None, DataOptions(str(phantoms)), other, init_adapter=str(run))
    with pytest.raises(ValueError, match=r"holds an adapter, not a model: give its base as the model, and this folder as --init-adapter"):
        train_run(str(run), None, DataOptions(str(phantoms)), other)
    model = load_run(run)[0]
    assert fp.load_adapter(model, run) is model


@pytest.mark.parametrize("name, plan", [("llama-tiny", "LoRA"), ("llava-med-tiny", "F/F/LoRA/F"), ("lavin-tiny", "MMAdapter/T/MMAdapter")])
def test_causal_models_are_asked_too(name, plan, tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)).save(image)
    entries = [{"instruction": f"say {i}", "input": "", "output": f"{i} it is"} for i in range(4)]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(entries))
    config = TrainConfig(steps=1, batch_size=2, out=tmp_path / "run", device="cpu", progress=False)
    train_run(name, plan, DataOptions(str(tmp_path), split_file=str(tmp_path / "alpaca_data.json")), config, evaluate=False)
    loaded = fp.load(tmp_path / "run", device="cpu")
    assert isinstance(loaded.ask(None, "say 2", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="<image> stands in a text without an image"):
        loaded.ask(None, "<image>\nsay 2")
    if loaded.preprocess is None:
        with pytest.raises(ValueError, match="sees none"):
            loaded.ask(image, "what is it?")
    else:
        told = loaded.ask(image, "what is it?", max_new_tokens=3)
        assert isinstance(told, str) and loaded.ask(image, "<image>\nwhat is it?", max_new_tokens=3) == told


def test_what_cannot_be_asked(run, tmp_path):
    loaded = fp.load(run, device="cpu")
    with pytest.raises(ValueError, match="2 images for 1 questions"):
        loaded.ask(["a.png", "b.png"], "what?")
    with pytest.raises(ValueError, match="needs an image"):
        loaded.ask(None, "what?")
    with pytest.raises(ValueError, match="no such image"):
        loaded.ask(tmp_path / "none.png", "what?")
    with pytest.raises(ValueError, match="is no image: give a path"):
        loaded.ask(np.zeros((4, 4, 3)), "what?")
    with pytest.raises(ValueError, match="takes num_beams and max_length"):
        loaded.ask(np.zeros((4, 4, 3), np.uint8), "what?", top_p=0.5)
    with pytest.raises(ValueError, match="llama-tiny has random weights"):
        fp.load("llama-tiny")
    with pytest.raises(ValueError, match="neither a model name"):
        fp.load(tmp_path / "nowhere")


def test_the_command(run, phantoms, monkeypatch, capsys):
    sample = load_samples(phantoms, split="test")[0]
    command = [sys.executable, "-m", "fastpeft", "ask", "--adapter", str(run), "--image", str(sample.image), sample.question, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["answers"] == [fp.load(run).ask(sample.image, sample.question)] and done.stdout.splitlines()[0] == told["answers"][0]
    monkeypatch.setattr(sys, "argv", ["fastpeft", "ask", "--adapter", str(run), "what?"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "needs an image" in said and said.count("\n") == 1
