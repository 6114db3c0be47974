"""`python -m bench gpu`: its calls fit their time, and its files are whole, whatever fails, ends or is missing."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from bench import __main__ as bench
from bench import gpu, pieces, pytest_cases
from fastpeft import _library

SAY = "from bench.pieces import say; print('.', end='', flush=True); say({'case': 'a', 'seconds': 1})"
HANG = SAY + "; import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('was asleep')"


@pytest.fixture
def out(monkeypatch, tmp_path):
    """The folder that the files go to, of a machine that says it has a GPU; pieces may be as short as they are."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    return tmp_path / "out"


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def tried(monkeypatch, **how):
    """Pieces of the call "right": name -> (Python code, seconds)."""
    made = [(name, [sys.executable, "-c", code], seconds) for name, (code, seconds) in how.items()]
    monkeypatch.setitem(gpu.PIECES, "right", lambda seconds: made)


def found(out, call="right"):
    return json.loads((out / f"gpu-{call}.json").read_text())


def test_a_call_leaves_two_files_written_as_it_runs(out, monkeypatch, capsys):
    """A piece that fails and one that hangs, chattering, cost the next nothing; one that hangs is interrupted, and what it found stays."""
    monkeypatch.setattr(pieces, "GRACE", 1.0)
    wrong = SAY + "; say({'case': 'b', 'failed': 'wrong by 1'})"
    chatter = wrong + "\nimport time\nwhile True:\n try: print('here'); time.sleep(0.01)\n except KeyboardInterrupt: print('was asleep')"
    tried(monkeypatch, bad=("raise SystemExit(3)", 30.0), slow=(chatter, 1.5), good=(wrong, 30.0))
    assert bench.main(["gpu", "right"]) == 1
    assert sorted(path.name for path in out.iterdir()) == ["gpu-right.json", "gpu-right.log"]
    told = found(out)
    assert {name: piece["status"] for name, piece in told["pieces"].items()} == {"bad": 3, "slow": 124, "good": 0}
    assert [case["case"] for case in told["pieces"]["slow"]["cases"]] == ["a", "b"] and told["gpu"] == "a GPU"
    assert all(0 <= case["at"] <= piece["seconds"] + 0.1 for piece in told["pieces"].values() for case in piece["cases"])
    assert "was asleep" in (out / "gpu-right.log").read_text()
    assert told["failed"] == ["bad: status 3", "slow: b: wrong by 1", "slow: status 124", "good: b: wrong by 1"]
    assert told["left_out"] == [] and told["interrupted"] is None
    monkeypatch.setattr(gpu, "LEAST", 1e9)
    assert bench.main(["gpu", "right"]) == 0
    assert found(out)["left_out"] == ["bad", "slow", "good"] and "not begun: bad, slow, good" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_piece_that_runs_and_the_rest_is_said(out, monkeypatch, number):
    tried(monkeypatch, first=(SAY, 30.0), second=(HANG, 30.0), third=(SAY, 30.0))
    before = [signal.getsignal(n) for n in pieces.SIGNALS]

    def when_it_runs():
        while not any(piece["cases"] for piece in (found(out)["pieces"].get("second"),) if piece):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    out.mkdir()
    (out / "gpu-right.json").write_text('{"pieces": {}}')
    thread = threading.Thread(target=when_it_runs)
    thread.start()
    assert bench.main(["gpu"]) == 128 + number
    thread.join()
    told = found(out)
    assert told["interrupted"] == number.name and told["left_out"] == ["third"]
    assert {name: piece["status"] for name, piece in told["pieces"].items()} == {"first": 0, "second": 130}
    assert "was asleep" in (out / "gpu-right.log").read_text() and not (out / "gpu-kernels.json").exists()
    assert [signal.getsignal(n) for n in pieces.SIGNALS] == before


def test_what_is_on_disk_after_a_kill(out):
    """The file says what was found, which piece ran and which had not begun."""
    lines = ["from pathlib import Path", "from bench.pieces import Report"]
    lines.append(f"report = Report(Path({str(out)!r}), 'right', {{}}, ['one', 'two', 'three'])")
    for name, code in (("one", SAY), ("two", f"{SAY}; import time; time.sleep(2)")):
        lines.append(f"report.run({name!r}, [{sys.executable!r}, '-c', {code!r}], 60.0, {{}}, Path('.'))")
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=gpu.ROOT, start_new_session=True)
    while not (out / "gpu-right.json").exists() or not found(out)["pieces"].get("two", {}).get("cases"):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    told = found(out)
    assert {name: piece["status"] for name, piece in told["pieces"].items()} == {"one": 0, "two": None}
    assert told["left_out"] == ["three"] and told["pieces"]["two"]["cases"][0]["case"] == "a"


def test_a_folder_that_cannot_be_written_to(out, monkeypatch, capsys):
    out.write_text("a file")
    tried(monkeypatch, good=(SAY, 30.0))
    assert bench.main(["gpu", "right"]) == 2
    assert "cannot be written to" in (said := capsys.readouterr().err) and "set OUT" in said
    out.unlink()
    report = pieces.Report(out, "right", {}, ["good"])
    monkeypatch.setattr(pieces.Report, "_write", mock.Mock(side_effect=OSError(28, "No space left on device")))
    assert report.run("good", [sys.executable, "-c", SAY], 30.0, {}, gpu.ROOT) == 0  # a disk that is full later ends no run
    assert "No space left" in capsys.readouterr().err


def test_the_minutes_count_from_when_they_are_said_to(out, monkeypatch):
    """What building csrc and imports took is theirs; a piece leaves room for its end."""
    began = []
    monkeypatch.setattr(pieces.Report, "run", lambda self, name, command, seconds, *rest: began.append(seconds))
    monkeypatch.setattr(gpu, "make", lambda report, pieces, stop: began.append(stop - time.perf_counter()))
    assert bench.main(["gpu", "right", "--minutes", "5", "--since", str(time.time() - 200)]) == 0
    assert 90 < began[0] < 101
    makefile = (gpu.ROOT / "Makefile").read_text()
    minutes = [float(number) for number in re.findall(r"bench gpu .*--minutes ([\d.]+) --since \$\$since", makefile)]
    assert len(minutes) == 2 and minutes[0] < 10 and minutes[1] < 8


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
    items = [mock.Mock(nodeid=name) for name in names]
    pytest_cases.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [names[3], names[2], names[1], names[0]]
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


def test_a_worker_whose_cuda_is_gone_ends(monkeypatch):
    """After its failed test was told, and no other: xdist deals the rest to a new one."""
    ended = []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(pytest_cases, "_failed", set())
    monkeypatch.setattr(os, "_exit", ended.append)
    for works, outcome, wanted in ((True, "failed", []), (False, "passed", []), (False, "failed", [3])):
        monkeypatch.setattr(pytest_cases, "cuda_works", lambda works=works: works)
        name = f"t.py::test_{works}_{outcome}"
        pytest_cases.pytest_runtest_logreport(mock.Mock(nodeid=name, outcome=outcome))
        assert ended == []
        pytest_cases.pytest_runtest_logfinish(name)
        assert ended == wanted
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered")))
    assert not pytest_cases.cuda_works()


def test_every_bench_compiles_its_kernels_first(monkeypatch, capfd):
    """One that does not is told, and stops no other."""
    begun = []
    status = lambda command: int(command[4] == "mm_adapter")  # noqa: E731
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **how: begun.append(command) or mock.Mock(wait=lambda: status(command)))
    assert gpu.compile_all() == 0 and sorted(command[4] for command in begun) == sorted(gpu.OPS)
    told = [json.loads(line.removeprefix("@case ")) for line in capfd.readouterr().out.splitlines()]
    assert [case["case"] for case in told] == list(gpu.OPS) and [case["case"] for case in told if case["status"]] == ["mm_adapter"]


def test_aten_where_a_kernel_of_ours_was_meant_is_a_failure(monkeypatch, capfd):
    told = {"gelu_fwd": {"CUDA": "native"}, "attention_dq": {"CUDA": "composite (it has no other form)"}}
    monkeypatch.setattr(_library, "backend_of", lambda: told)
    monkeypatch.setattr(_library, "has_kernel_of_ours", lambda name: name != "attention_dq")
    assert gpu.tell_backends() == 0
    told["rotary"] = {"CUDA": "composite (csrc was not built)"}
    assert gpu.tell_backends() == 1
    assert "csrc was not built" in capfd.readouterr().out.splitlines()[-1]
