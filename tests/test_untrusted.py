"""Folders from elsewhere: what they hold is data, and is never run."""

import ast
import io
import json
import shutil
from pathlib import Path

import pytest

import fastpeft as fp
from fastpeft.cli import main
from fastpeft.data import load_causal_tokenizer, load_tokenizer, save_tokenizer, train_causal_tokenizer, train_tokenizer
from fastpeft.models import NAMES, resolve
from fastpeft.runs.evaluate import load_run
from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.train.config import TrainConfig

MAPS = {
    "list": {"auto_map": ["planted.Planted", None], "tokenizer_class": None},
    "mapping": {"auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}, "tokenizer_class": None},
    "own class": {"auto_map": {"AutoTokenizer": ["planted.Planted", None]}, "tokenizer_class": "Planted"},
    "known class": {"auto_map": {"AutoTokenizer": [None, "planted.Planted"]}},
}


@pytest.fixture(autouse=True)
def stdin(monkeypatch, tmp_path):
    """Somebody says yes to whatever is asked."""
    answers = io.StringIO("y\n" * 50)
    monkeypatch.setattr("sys.stdin", answers)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return answers


def plant(folder, **changes):
    """Python code in a tokenizer's folder, asked for by its configuration; returns the file that the code would write."""
    marker = folder.parent / "marker"
    (folder / "planted.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Planted(PreTrainedTokenizerFast):\n    pass\n"
    )
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return marker


@pytest.fixture(params=["causal", "wordpiece"])
def tokenizer(request, tmp_path):
    """(a saved tokenizer's folder, its loader)"""
    made, load = {
        "causal": (lambda: train_causal_tokenizer(["a red liver"], 300), load_causal_tokenizer),
        "wordpiece": (lambda: train_tokenizer(["a red liver"], 300), load_tokenizer),
    }[request.param]
    folder = tmp_path / "tokenizer"
    save_tokenizer(made(), folder)
    return folder, load


@pytest.mark.parametrize("planted", MAPS)
def test_code_beside_a_tokenizer(tokenizer, planted, stdin):
    folder, load = tokenizer
    load(folder)
    marker = plant(folder, **MAPS[planted])
    with pytest.raises(ValueError, match=r"tokenizer_config.json: this tokenizer is Python code of its own") as error:
        load(folder)
    assert "\n" not in str(error.value) and not marker.exists() and stdin.tell() == 0


def test_code_that_the_tokenizers_config_names(tokenizer, stdin):
    """config.json beside the tokenizer: transformers reads it for the tokenizer's class."""
    folder, load = tokenizer
    marker = plant(folder)
    about = {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted", "AutoTokenizer": ["planted.Planted", None]}}
    (folder / "config.json").write_text(json.dumps(about))
    assert "planted" not in type(load(folder)).__module__
    assert not marker.exists() and stdin.tell() == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")
    rows = [{"instruction": "Name it.", "input": "", "output": "red"}] * 4
    (folder / "alpaca_data.json").write_text(json.dumps(rows))
    how = TrainConfig(out=str(folder / "run"), batch_size=2, steps=1, progress=False)
    train_run("llama-tiny", "LoRA", DataOptions(str(folder)), how, evaluate=False)
    return folder / "run" / "adapter"


def test_chat_with_an_adapter_from_elsewhere(run, tmp_path, stdin, monkeypatch, capsys):
    """Its tokenizer asks for code; the piped questions would answer "y"."""
    adapter = tmp_path / "adapter"
    shutil.copytree(run, adapter)
    marker = plant(adapter / "tokenizer", **MAPS["mapping"])
    monkeypatch.setattr("sys.argv", ["fastpeft", "chat", "--adapter", str(adapter), "--max-new-tokens", "1"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and not marker.exists() and stdin.tell() == 0
    assert err.startswith("fastpeft: ") and err.count("\n") == 1
    assert "tokenizer_config.json: this tokenizer is Python code of its own" in err


def test_loading_an_adapter_from_elsewhere(run, tmp_path, stdin):
    adapter = tmp_path / "adapter"
    shutil.copytree(run, adapter)
    marker = plant(adapter / "tokenizer", **MAPS["own class"])
    with pytest.raises(ValueError, match="Python code of its own"):
        load_run(adapter)
    assert not marker.exists() and stdin.tell() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-tiny")])
def test_code_in_a_models_folder(name, tmp_path, stdin):
    """Neither the classes that its configuration maps, nor its generation, nor a repository's attention."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    model = resolve(name).family.model(resolve(name).family.configs[name]())
    model.save_pretrained(folder)
    code = f"open({str(marker)!r}, 'w').close()\n\n\ndef generate(*args, **options):\n    pass\n\n\nPlanted = None\n"
    (folder / "planted.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"}}))
    assert type(fp.build(folder)).__name__ == type(fp.build(name, pretrained=False)).__name__
    elsewhere = ["someone/kernels"] + ([{"text_config": "someone/kernels:layer"}] if "text_config" in config else [])
    for attention in elsewhere:
        file.write_text(json.dumps(config | {"attn_implementation": attention}))
        with pytest.raises(ValueError, match=r"config.json: attn_implementation 'someone/.*' is code from elsewhere"):
            fp.build(folder)
    assert not marker.exists() and stdin.tell() == 0


@pytest.mark.parametrize("name, argument", [(".from_pretrained", "trust_remote_code"), ("Image.open", "formats")])
def test_every_door_says_so(name, argument):
    """Each call of transformers' from_pretrained, and of Pillow's open, in the package."""
    calls = []
    for file in Path(fp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                calls.append((f"{file.name}:{node.lineno}", [keyword.arg for keyword in node.keywords]))
    assert calls and [where for where, given in calls if argument not in given] == []
