"""Options declared once: checks, other names, defaults, and the command line's and YAML's readings of them."""

import json
import os
import subprocess
import sys
from typing import Annotated, Literal

import pytest

from fastpeft.options import Count, FilePath, Fraction, Number, Option, OptionError, Size, canonical, fields, options, split
from fastpeft.runs.options import RECIPE, DataOptions, GenerationOptions, MetricOptions, TextOptions, read_yaml
from fastpeft.train import TrainConfig


@options
class Example:
    """An example."""

    size: Annotated[Count, Option(names=("lot", "how_many"))] = 4
    "Things at a time."
    share: Fraction = 0.5
    "of them"
    rate: Number | None = None
    "of change"
    kind: Literal["a", "b"] = "a"
    "of thing"
    loud: Annotated[bool, Option(off="quiet")] = True
    "make a noise"
    folder: FilePath | None = None
    "to write to"
    room: Size | None = None
    "to take"

    def __post_init__(self):
        if self.share > 0.9 and self.loud:
            raise ValueError("a share above 0.9 must be quiet")


def test_what_a_field_says_of_itself():
    told = {f.name: f for f in fields(Example)}
    assert told["size"].must == "a whole number of 1 or more" and told["size"].help == "Things at a time (default 4)."
    assert told["share"].must == "a number from 0 to below 1" and told["rate"].must == "a number of 0 or more"
    assert told["kind"].must == "one of a, b" and told["loud"].must == "true or false" and told["folder"].must == "a path"
    assert [f.name for f in fields(Example) if f.optional] == ["rate", "folder", "room"]
    assert "    size: Things at a time (default 4)." in Example.__doc__


@pytest.mark.parametrize(
    "given, message",
    [
        ({"size": 0}, "size must be a whole number of 1 or more, not 0"),
        ({"size": True}, "size must be a whole number of 1 or more, not True"),
        ({"size": "4"}, "size must be a whole number of 1 or more, not '4'"),
        ({"size": 2.0}, "size must be a whole number of 1 or more, not 2.0"),
        ({"lot": -1}, "size must be a whole number of 1 or more, not -1"),
        ({"share": 1.0}, "share must be a number from 0 to below 1, not 1.0"),
        ({"rate": float("inf")}, "rate must be a number of 0 or more, not inf"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
        ({"loud": 1}, "loud must be true or false, not 1"),
        ({"folder": 3}, "folder must be a path, not 3"),
        ({"room": "24"}, "'24' has no unit; write it as 24GB or 24MB"),
        ({"share": 0.95}, "a share above 0.9 must be quiet"),
        ({"size": 1, "lot": 2}, "lot and size are the same option: give one of them"),
    ],
)
def test_wrong_values_are_one_line(given, message):
    with pytest.raises(ValueError) as error:
        Example(**given)
    assert str(error.value) == message


def test_unknown_options_are_named_with_the_nearest():
    with pytest.raises(TypeError, match="Example: unknown option sise; did you mean size"):
        Example(sise=3)
    with pytest.raises(ValueError, match="unknown option qiet; did you mean quiet"):
        split({"qiet": True}, Example)


def test_other_names_are_the_same_option():
    assert Example(how_many=7).size == 7 and Example(quiet=True).loud is False and Example(3).size == 3
    assert canonical({"how-many": 7, "quiet": False}, Example) == {"size": 7, "loud": True}
    assert canonical({"lot": 7, "size": 7}, Example) == {"size": 7}


HF = {
    "max_steps": ("steps", 7), "num_train_epochs": ("epochs", 3.0), "per_device_train_batch_size": ("batch_size", 2),
    "gradient_accumulation_steps": ("gradient_accumulation", 4), "learning_rate": ("learning_rate", 1e-4), "warmup_ratio": ("warmup", 0.1),
    "warmup_steps": ("warmup", 10), "adam_beta1": ("beta1", 0.8), "adam_beta2": ("beta2", 0.9), "max_grad_norm": ("max_grad_norm", 2.0),
    "dataloader_num_workers": ("num_workers", 1), "save_steps": ("save_every", 5), "output_dir": ("out", "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_hugging_faces_names_are_taken(name, tmp_path):
    field, value = HF[name]
    assert getattr(TrainConfig(**{name: value}), field) == value
    file = tmp_path / "a.yaml"
    file.write_text(f"{name}: {value}\n")
    assert read_yaml(file) == {field: value}


def test_pefts_names_are_taken(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lora_r: 8\nlora_alpha: 16\nlora_dropout: 0.1\nmodel_name_or_path: miss\n")
    assert read_yaml(file) == {"rank": 8, "lora_alpha": 16, "lora_dropout": 0.1, "model": "miss"}


def test_no_name_means_two_options():
    names = [name for cls in (*RECIPE, GenerationOptions) for f in fields(cls) for name in {f.name, f.option.off, *f.option.names} - {""}]
    assert len(names) == len(set(names))


def test_every_option_of_a_run_is_described_and_has_a_heading():
    for field in (field for cls in (DataOptions, TextOptions, MetricOptions, TrainConfig, GenerationOptions) for field in fields(cls)):
        assert field.description and field.option.panel, field.name


def test_errors_name_their_option():
    with pytest.raises(OptionError) as error:
        DataOptions("x", hold_out=2)
    assert error.value.option == "hold_out"


WITHOUT_TORCH = """
import sys, time
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "peft"):
            raise AssertionError(name + " was imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["fastpeft", *sys.argv[1:]]
from fastpeft.cli import main
main()
"""


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--help"], 0, "Usage"),
        (["train", "--help"], 0, "--batch-size"),
        (["eval", "--help"], 0, "--num-beams"),
        (["trian"], 2, "No such command 'trian'"),
        (["train", "--stepz", "3"], 2, "No such option: --stepz"),
        (["train", "--steps", "none"], 2, "Invalid value for '--steps'"),
        (["train", "--steps", "0", "--data", "x", "--out", "y"], 2, "steps must be a whole number of 1 or more, not 0 (option '--steps')"),
        (["train", "--per_device_train_batch_size=0", "--data", "x", "--out", "y"], 2, "batch_size must be a whole number"),
        (["train", "--data", "x"], 2, "--out is missing"),
        (["train", "--track", "wandb,comet", "--data", "x", "--out", "y"], 2, "no tracker is called comet"),
        (["eval", "--adapter", "x", "--data", "y", "--top-p", "2"], 2, "top_p must be a number from 0 to 1, not 2.0"),
    ],
)
def test_help_and_usage_errors_import_no_torch(arguments, code, said):
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, env=wide)
    assert done.returncode == code and said in done.stdout + done.stderr, (done.stdout, done.stderr)
    assert code == 0 or (done.stderr.count("\n") == 1 and done.stdout == "")


def test_importing_fastpeft_imports_neither_torch_nor_transformers_nor_peft():
    code = "import sys, fastpeft; dir(fastpeft); print(*sorted({'torch', 'transformers', 'peft', 'triton'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_functions_keep_their_names_beside_modules_of_the_same_name():
    code = "import fastpeft, fastpeft.optimize; from fastpeft.optimize import Report; print(callable(fastpeft.optimize))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_metrics_are_chosen_alike_everywhere(tmp_path):
    assert MetricOptions().metrics == ("rouge", "meteor", "bertscore", "tokens")
    assert MetricOptions(metrics="rouge,tokens").metrics == MetricOptions(metrics=["rouge", "tokens"]).metrics == ("rouge", "tokens")
    with pytest.raises(ValueError, match="no metric is called bleu; there are rouge, meteor, bertscore, tokens"):
        MetricOptions(metrics="bleu")
    file = tmp_path / "a.yaml"
    file.write_text("metrics: [rouge, bertscore]\nbertscore_model: bert\nbertscore_layer: 9\nbertscore_idf: true\nwordnet: wn\n")
    (chosen,) = split(read_yaml(file), MetricOptions)
    given = {"metrics": ("rouge", "bertscore"), "bertscore_model": "bert", "bertscore_layer": 9, "bertscore_idf": True, "wordnet": "wn"}
    assert chosen.chosen() == given | {"bertscore_baseline": None}


SEVERAL = {"allow_change": ("seed", "steps"), "languages": ("en", "zh"), "metrics": ("rouge", "tokens"), "track": ("wandb", "mlflow")}


def test_several_values_are_taken_alike_everywhere(tmp_path):
    assert SEVERAL.keys() == {f.name for made in RECIPE for f in fields(made) if f.many} - {"stages"}
    for cls, field in ((made, f) for made in RECIPE for f in fields(made) if f.name in SEVERAL):
        values = SEVERAL[field.name]
        needed = {"data": "x", "out": "y"}
        needed = {f.name: needed[f.name] for f in fields(cls) if f.name in needed}
        for given in (values, list(values), ",".join(values), ", ".join(values)):
            assert getattr(cls(**{field.name: given}, **needed), field.name) == values
            file = tmp_path / "a.yaml"
            file.write_text(json.dumps({field.name: given} | needed))
            assert getattr(split(read_yaml(file), cls)[0], field.name) == values
