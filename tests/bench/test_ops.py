"""bench's own workings: ops measured phase by phase, rivals that fail left out, and the GPU's calls, written as they run."""

import importlib
import json
import os
import re
import sys
from unittest import mock

import pytest
import torch

from bench import __main__ as bench
from bench import gpu, pytest_cases, timing
from fastpeft import _library


@pytest.fixture
def out(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(timing, "roofline", lambda device, dtype: (100.0, 1.0))
    return tmp_path


def test_forward_backward_and_both_of_every_rival(out, capsys):
    assert bench.main(["rescale", "--quick", "--seconds", "0.01"]) == 0
    rows = json.loads((out / "ops-cpu.json").read_text())["rows"]
    for dtype in ("float32", "bfloat16"):
        mine = {row["op"]: row for row in rows if row["provider"] == "fastpeft" and row["dtype"] == dtype}
        assert set(mine) == {"rescale both fwd", "rescale both bwd", "rescale both fwd+bwd", "rescale scale bwd"}
        for row in mine.values():
            assert row["ms"][0] <= row["ms"][1] <= row["ms"][2] and row["gb_per_s"] > 0 and row["roofline"] == row["gb_per_s"] / 100
    baseline = [row for row in rows if row["provider"] == "torch"]
    assert len(baseline) == 8 and all(row["ratio"] == 1.0 for row in baseline)
    assert "| rescale both fwd+bwd | 2048x768 | bfloat16 | torch |" in capsys.readouterr().out


def test_a_rival_that_fails_is_left_out_and_nan_is_not_timed():
    settings, x = timing.Settings("cpu", 0.001, True), torch.ones(3, requires_grad=True)

    def broken(x):
        raise RuntimeError("no compiler here")

    fns = {"fastpeft": torch.neg, "other": broken, "torch": torch.neg}
    rows = timing.measure("neg", "3", torch.float32, fns, (x,), settings, cotangent=torch.ones(3), flops=7.0)
    assert [(row.op, row.provider) for row in rows] == [(f"neg {p}", n) for p in ("fwd", "bwd", "fwd+bwd") for n in ("fastpeft", "torch")]
    assert all("other left out: RuntimeError: no compiler here" in row.note for row in rows)
    assert [row.tflop_per_s is None for row in rows] == [True] * 4 + [False] * 2  # one number of work: both phases together
    with pytest.raises(ValueError, match="not timed"):
        timing.measure("nan", "3", torch.float32, {"fastpeft": lambda x: x / 0 - x / 0, "torch": torch.neg}, (x,), settings)


def test_a_copy_moves_what_an_operator_does():
    copied = timing.copy_of(24.0, "cpu")()
    assert copied.nbytes == 12 and copied.isfinite().all()


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_call_leaves_two_files_written_as_it_runs(out, monkeypatch, capsys):
    """A piece that fails and one that hangs cost the next nothing; a hanging one is interrupted and what it had found stays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    say = "from bench.pieces import say; print('.', end='', flush=True); say({'case': 'a', 'seconds': 1})"
    say += "; say({'case': 'b', 'failed': 'wrong by 1'})"
    hang = f"{say}; import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('was asleep')"
    python = sys.executable
    tried = [("bad", [python, "-c", "raise SystemExit(3)"], 30.0), ("slow", [python, "-c", hang], 5.0), ("good", [python, "-c", say], 30.0)]
    monkeypatch.setitem(gpu.PIECES, "right", lambda seconds: tried)
    assert bench.main(["gpu", "right"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["gpu-right.json", "gpu-right.log"]
    found = json.loads((out / "gpu-right.json").read_text())
    assert {name: piece["status"] for name, piece in found["pieces"].items()} == {"bad": 3, "slow": 124, "good": 0}
    assert [case["case"] for case in found["pieces"]["slow"]["cases"]] == ["a", "b"] and found["gpu"] == "a GPU"
    assert all(0 <= case["at"] <= piece["seconds"] + 0.1 for piece in found["pieces"].values() for case in piece["cases"])
    assert "was asleep" in (out / "gpu-right.log").read_text()
    assert found["failed"] == ["bad: status 3", "slow: b: wrong by 1", "slow: status 124", "good: b: wrong by 1"]
    monkeypatch.setattr(gpu, "LEAST", 1e9)
    assert bench.main(["gpu", "right"]) == 0
    assert json.loads((out / "gpu-right.json").read_text())["left_out"] == ["bad", "slow", "good"]


def test_the_calls_and_their_files_fit():
    """Three calls, two files each, of the eight that come back; the backends and the twins come first."""
    assert list(gpu.PIECES) == list(gpu.CALLS) == ["right", "kernels", "steps"]
    right = gpu.right(60.0)
    assert [name for name, *_ in right][:3] == ["backends", "native", "tests"]
    assert all(any("test_cuda_twins" in argument for argument in command) for _, command, _ in right[1:3])
    assert "-n" not in right[1][1] and "-n" in right[2][1]
    compiled, bf16, fp32 = (command for _, command, _ in gpu.kernels(60.0))
    assert "compile_all" in compiled[-1] and (bf16[-1], fp32[-1]) == ("bf16", "fp32")
    assert bf16[4:7] == ["lora_linear", "layer_norm", "rms_norm"]
    twins = "".join((gpu.ROOT / f"tests/ops/test_{name}.py").read_text() for name in ("cuda_twins", "dropout"))
    assert all(f"def {word}" in twins for word in re.findall(r"test_\w+", gpu.SANITIZED + gpu.NATIVE))
    for call in gpu.PIECES.values():
        assert all(command[0] and seconds <= 480 for _, command, seconds in call(200.0))


def test_the_most_important_tests_come_first():
    names = [f"t.py::test_{name}" for name in ("norms[768-float32]", "linear_cross_entropy", "norms[768-bfloat16]", "lora[bfloat16]")]
    assert sorted(names, key=pytest_cases.rank) == [names[3], names[2], names[1], names[0]]
    assert min(*names, "tests/train/test_on_cuda.py::test_a_run[T/T/T]", key=pytest_cases.rank).endswith("[T/T/T]")  # whole runs before all


def test_workers_of_pytest_have_a_thread_each(monkeypatch):
    """Fourteen of sixteen threads each had one result in 133 seconds."""
    for worker, threads in (("gw0", "1"), (None, None)):
        for name in ("OMP_NUM_THREADS", "PYTEST_XDIST_WORKER"):
            monkeypatch.setenv(name, "")  # remembers what it is
            monkeypatch.delenv(name)
        if worker:
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        importlib.reload(pytest_cases)
        assert os.environ.get("OMP_NUM_THREADS") == threads


def test_every_bench_compiles_its_kernels_first(monkeypatch):
    begun = []
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **how: begun.append(command) or mock.Mock(wait=lambda: 0))
    assert gpu.compile_all() == 0 and sorted(command[4] for command in begun) == sorted(gpu.OPS)


def test_aten_where_a_kernel_of_ours_was_meant_is_a_failure(monkeypatch, capfd):
    told = {"gelu_fwd": {"CUDA": "native"}, "attention_dq": {"CUDA": "composite (it has no other form)"}}
    monkeypatch.setattr(_library, "backend_of", lambda: told)
    monkeypatch.setattr(_library, "has_kernel_of_ours", lambda name: name != "attention_dq")
    assert gpu.tell_backends() == 0
    told["rotary"] = {"CUDA": "composite (csrc was not built)"}
    assert gpu.tell_backends() == 1
    assert "csrc was not built" in capfd.readouterr().out.splitlines()[-1]
