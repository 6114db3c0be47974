"""Checkpoints of every format that was ever written resume: formats/0 has no manifest, 1 one without a format, 2 one that says it.

Each is what the run below left after two of its steps, under the version of its time.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastpeft as fp
from fastpeft.data import CausalDataset, Instruction, train_causal_tokenizer
from fastpeft.train.state import FORMAT

FORMATS = Path(__file__).parent / "formats"
TEXTS = [("Name the colour of blood.", "red"), ("Name the colour of bile.", "green"), ("Is it night?", "no"), ("Is it day?", "yes")]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(out: Path, steps: int, **options) -> fp.Trainer:
    words = train_causal_tokenizer([text for pair in TEXTS for text in pair], 280)
    model = fp.build("llama-tiny", pretrained=False, seed=3, vocab_size=280, **SMALL)
    torch.manual_seed(4)
    fp.adapt(model, "LoRA", r=1, lora_dropout=0.1)
    samples = [Instruction((pair,), None, "alpaca", "", n, Path()) for n, pair in enumerate(TEXTS)]
    how = {"batch_size": 2, "progress": False, "device": "cpu", "learning_rate": 1e-2, **options}
    return fp.Trainer(model, CausalDataset(samples, words, "plain", 32), fp.TrainConfig(steps=steps, out=str(out), **how))


@pytest.mark.parametrize("number", range(FORMAT + 1))
def test_a_checkpoint_of_an_earlier_format_resumes(tmp_path, number):
    out = tmp_path / "run"
    shutil.copytree(FORMATS / str(number), out / "checkpoint", ignore=shutil.ignore_patterns("metrics.jsonl"))
    shutil.copyfile(FORMATS / str(number) / "metrics.jsonl", out / "metrics.jsonl")
    saved = load_file(out / "checkpoint" / "trained.safetensors")
    run = trainer(out, 3, resume=True, allow_change=("tokenizer", "reading"))  # a vocabulary may be learnt otherwise by another tokenizers
    seen = []
    step = run._step
    run._step = lambda *group: (seen.append(state(run)), step(*group))[1]
    assert run.fit()["steps"] == 3
    (weights,) = seen
    assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert json.loads((out / "checkpoint" / "manifest.json").read_text())["format"] == FORMAT


def state(run: fp.Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_the_newest_format_has_a_fixture():
    assert sorted(path.name for path in FORMATS.iterdir()) == [str(number) for number in range(FORMAT + 1)]
    assert json.loads((FORMATS / str(FORMAT) / "manifest.json").read_text())["format"] == FORMAT


def test_a_checkpoint_of_a_later_format_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "run"
    for folder in ("checkpoint", "checkpoint-1"):
        shutil.copytree(FORMATS / str(FORMAT), out / folder)
    manifest = out / "checkpoint" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": FORMAT + 1}))
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=rf"checkpoint is of format {FORMAT + 1}, and this fastpeft reads up to"),
    ):
        warnings.simplefilter("error")
        trainer(out, 3, resume=True).fit()
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "checkpoint-1"]
