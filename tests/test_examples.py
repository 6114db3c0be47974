"""The examples run as scripts, as a user runs them; README.md there names each."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_and_learns(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")  # in this process: importing torch takes longer than an example
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'?\bloss'?:? '?(\d+\.\d+)", printed)]
    assert len(losses) >= 2 and losses[-1] < losses[0], printed
    if name == "hf_trainer.py":
        assert (tmp_path / "runs" / "hf_trainer" / "adapter_model.safetensors").is_file() and "accuracy" in printed


def test_the_readme_names_each():
    assert sorted(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text())) == SCRIPTS
