"""Backends by environment variables: what serves each operator and why, and one clear error for a name that is none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastpeft import _library, ops
from fastpeft.runs.doctor import diagnose

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("variable, choice", [("FASTPEFT_BACKEND", "composite"), ("FASTPEFT_ATTENTION", "flash-attn")])
def test_an_unknown_backend(variable, choice):
    """Python gets a ValueError, the command line one line and exit code 2."""
    imported = run("-c", "import fastpeft.ops", **{variable: "cudnn"})
    assert imported.returncode == 1
    last = imported.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {variable}='cudnn' is not a backend; use one of ") and choice in last
    shell = run("-m", "fastpeft", "doctor", **{variable: "cudnn"})
    assert shell.returncode == 2 and not shell.stdout
    assert len(shell.stderr.splitlines()) == 1 and variable in shell.stderr and choice in shell.stderr


DOCTOR = "import json, sys; sys.modules[{gone!r}] = None; from fastpeft.runs.doctor import diagnose; print(json.dumps(diagnose()))"


@pytest.mark.parametrize(
    "environment, gone, expected",
    [
        ({}, "triton", {"lora_linears_fwd": ("tile-wise", "triton is not installed"), "attention": ("ATen's", "sdpa (flash-attn and")}),
        (
            {"FASTPEFT_BACKEND": "triton", "FASTPEFT_ATTENTION": "xformers"},
            "xformers",
            {
                "lora_linears_fwd": ("with TRITON_INTERPRET=1", "triton"),
                "gelu_fwd": ("it has native only", "it has native only"),
                "attention": ("ATen's flash", "FASTPEFT_ATTENTION=xformers, which is not installed"),
            },
        ),
        (
            {"FASTPEFT_BACKEND": "native"},
            "flash_attn",
            {"lora_linears_fwd": ("native, and it has triton only",) * 2, "attention_dq": ("native, and it has no other form",) * 2},
        ),
    ],
)
def test_doctor_tells_why(environment, gone, expected):
    environment = {"FASTPEFT_BACKEND": "", "FASTPEFT_ATTENTION": "", "TRITON_INTERPRET": ""} | environment
    operators = json.loads(run("-c", DOCTOR.format(gone=gone), **environment).stdout.splitlines()[-1])["operators"]
    for op, (cpu, cuda) in expected.items():
        assert cpu in operators[op]["CPU"] and cuda in operators[op]["CUDA"], operators[op]
    assert all("composite (" in by[device] or "composite" not in by[device] for by in operators.values() for device in by)


def test_doctor_without_the_compiled_library(monkeypatch):
    monkeypatch.setattr(_library, "native_missing", "csrc was not built")
    for forced in ("", "native"):
        monkeypatch.setattr(_library, "FORCED", forced)
        assert _library._why_composite("CPU", native=True, triton=False) == "csrc was not built"
        assert "no other form" in _library._why_composite("CPU", native=False, triton=False)


def test_python_m_fastpeft():
    """As the installed command."""
    shell = run("-m", "fastpeft", "doctor", "--json")
    assert shell.returncode == 0 and "operators" in json.loads(shell.stdout.splitlines()[-1])


def test_the_table_of_backends():
    """The table in fastpeft.ops' docstring names every operator once with the form it has, and that form's source has the operator."""
    diagnose()  # defines them all
    table = {}
    for row in ops.__doc__.splitlines():
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        if len(cells) == 3 and cells[1] in ("native", "triton", "none"):
            for name in filter(None, (part.strip() for part in cells[0].split(","))):
                assert name not in table
                table[name] = () if cells[1] == "none" else (cells[1],)
    assert table == _library.forms_of()
    csrc = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.c*"))
    assert {name for name in table if re.search(rf'"{name}[("]', csrc)} == {name for name, form in table.items() if form == ("native",)}
