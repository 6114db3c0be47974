"""An environment variable that names no backend: one clear error, wherever it is met."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("variable, choice", [("FASTPEFT_BACKEND", "composite"), ("FASTPEFT_ATTENTION", "flash-attn")])
def test_an_unknown_backend(variable, choice):
    """Python gets a ValueError, the command line one line and exit code 2."""
    imported = run("-c", "import fastpeft", **{variable: "cudnn"})
    assert imported.returncode == 1
    last = imported.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {variable}='cudnn' is not a backend; use one of ") and choice in last
    shell = run("-m", "fastpeft", "doctor", **{variable: "cudnn"})
    assert shell.returncode == 2 and not shell.stdout
    assert len(shell.stderr.splitlines()) == 1 and variable in shell.stderr and choice in shell.stderr
