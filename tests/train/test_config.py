"""Options: what they may be, how a YAML file says them, and the recipes that ship."""

from pathlib import Path

import pytest

from fastpeft.runs.options import read_yaml
from fastpeft.train import TrainConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, not 0"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": "20"}, "batch_size must be a whole number of 1 or more, not '20'"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"steps": -3}, "steps must be a whole number of 1 or more, not -3"),
        ({"steps": 2.5}, "steps must be"),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
        ({"seed": 2**64}, "seed must be"),
        ({"gradient_accumulation": 0}, "gradient_accumulation"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number of 0 or more, not nan"),
        ({"learning_rate": -1e-3}, "learning_rate must be a number"),
        ({"base_learning_rate": "fast"}, "base_learning_rate must be a number"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1.0 is above learning_rate 0.001"),
        ({"epochs": 0}, "epochs"),
        ({"warmup": float("inf")}, "warmup must be a number"),
        ({"beta1": 1.0}, "beta1 must be a number from 0 to below 1"),
        ({"beta2": "0.9"}, "beta2 must be a number"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, not 'fp16'"),
        ({"dtype": ["fp32"]}, "dtype must be one of"),
        ({"resume": "maybe"}, "resume must be true or false, not 'maybe'"),
        ({"out": 5}, "out must be text, not 5"),
        ({"resume": True}, "give out"),
        ({"trace": True}, "give out"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig(**options)


def test_a_folder_may_be_a_path(tmp_path):
    assert TrainConfig(out=tmp_path, resume=True).out == str(tmp_path)
    assert TrainConfig(base_learning_rate=None, steps=None).steps is None


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"unknown option 7, learning_rte; known: .*learning_rate"):
        TrainConfig.from_dict({"learning_rte": 1e-3, 7: 1, "steps": 3})
    assert TrainConfig.from_dict({"steps": 3}).steps == 3


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("learning_rate: 2e-5\nbeta2: 98e-2\nsteps: 7\nplan: F/LoRA/LoRA\n")
    assert read_yaml(file) == {"learning_rate": 2e-5, "beta2": 0.98, "steps": 7, "plan": "F/LoRA/LoRA"}


def test_yaml_takes_the_command_lines_names(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 2e-5\nbatch-size: 4\nworkers: 2\nquiet: true\nlanguages: en,zh\nno-eval: true\n")
    want = {"learning_rate": 2e-5, "batch_size": 4, "num_workers": 2, "progress": False, "languages": ("en", "zh"), "no_eval": True}
    assert read_yaml(file) == want


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: [1", "a.yaml.*line 1"),
        ("", "must hold a mapping"),
        ("- steps", "must hold a mapping"),
        ("learning_rate: fast", "learning_rate must be a number, not 'fast'"),
        ("quiet: maybe", "quiet must be true or false, not 'maybe'"),
        ("no-eval: 1", "no-eval must be true or false, not 1"),
        ("model: 5", "model must be text, not 5"),
        (b"plan: \xff\xfe", "cannot read"),
        (None, "cannot read .*No such file"),
    ],
)
def test_unreadable_yaml_is_one_clear_error(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(file)
    assert "\n" not in str(error.value)
