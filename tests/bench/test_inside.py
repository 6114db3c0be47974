"""bench/inside.py and what runs in it: every rival is told, whatever happens to it, and what is not the same computation has no figure."""

import contextlib
import json
import math
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


class Steps:
    """A runner whose steps cost nothing."""

    shared_bytes = 0

    def __init__(self, loss=1.0, flops=10, fails="", slow=0.0):
        self.loss, self.flops, self.fails, self.slow, self.done = loss, flops, fails, slow, 0

    def enter(self, case):
        time.sleep(self.slow)
        if case == self.fails:
            raise RuntimeError(f"cannot do {case}")
        return {"loss": self.loss, "grad_norm": 2.0, "flops": self.flops, "saved_bytes": 3, "weight_bytes": 4}

    def step(self):
        self.done += 1


def rival(name, same=True, patience=5.0, **options):
    from bench.frame import Rival

    return Rival(name, Steps, options, same, patience)


def test_every_rival_is_told_and_none_stops_another():
    from bench import inside

    told = []
    rivals = [
        rival("no baseline", fails="a"),
        rival("base"),
        rival("other", loss=1.01),
        rival("not the same", same=False, loss=7.0, flops=5),
        rival("half", fails="b"),
        rival("slow", slow=3.0, patience=0.1),
    ]
    rows, failed = inside.run(rivals, ("a", "b"), samples=2, rounds=3, device="cpu", tolerance=1e-4, tell=told.append)
    assert [(r.what, r.case) for r in rows] == [(n, c) for n in ("base", "not the same") for c in "ab"] + [("half", "a")]
    assert {n: why.split(":")[0] for n, why in failed.items()} == {
        "no baseline": "RuntimeError", "other": "ValueError", "half": "RuntimeError", "slow": "TimeoutError"
    }  # fmt: skip
    assert "not the same computation" in failed["other"] and failed["slow"].endswith("took longer than 0 s")
    assert [r.flops_ratio for r in rows] == [1, 1, 2, 2, 1] and all(r.speedup > 0 and r.samples_per_second > 0 for r in rows)
    assert [line["case"] for line in told] == [
        "no baseline", "base, a", "other", "not the same, a", "half, a", "slow", "base, b", "not the same, b", "half"
    ]  # fmt: skip
    json.dumps(told)


def test_a_later_run_is_compared_with_the_first():
    from bench import inside

    how = {"samples": 1, "rounds": 1, "device": "cpu", "tolerance": 1e-4}
    rows, _ = inside.run([rival("base")], ("a",), **how)
    more, failed = inside.run([rival("other", loss=2.0), rival("same")], ("a",), **how, baselines=rows)
    assert list(failed) == ["other"] and [r.what for r in more] == ["same"]


def event(name, start, end, cuda=True, annotation=False):
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)


def test_what_a_trace_says():
    from bench import inside

    events = [
        event("gemm", 0, 10), event("gemm", 20, 25), event("copy", 22, 30), event("Optimizer.step", 0, 100, annotation=True),
        event("cudaLaunchKernel", 0, 1, cuda=False), event("cuLaunchKernelEx", 1, 2, cuda=False), event("cudaGraphLaunch", 2, 3, False),
        event("cudaMemcpyAsync", 3, 4, cuda=False), event("cudaStreamSynchronize", 4, 9, cuda=False), event("aten::mm", 0, 3, cuda=False),
        event("cudaDeviceSynchronize", 9, 30, cuda=False),
    ]  # fmt: skip
    told = inside.told_of(events)
    assert told["gpu_seconds"] == pytest.approx(20e-6) and (told["kernels"], told["launches"], told["waits"]) == (3, 4, 1)
    assert told["top"] == [("gemm", 2, pytest.approx(15e-6)), ("copy", 1, pytest.approx(8e-6))]


def test_llama_steps_compute_the_same():
    """Of all rivals, full rows and padded ones; LoRA's are compared by bench/inside.py, others here."""
    pytest.importorskip("peft")
    from argparse import Namespace

    from bench import inside, rivals_llama, steps_llama

    base = rivals_llama.base_of("tiny", 2, "cpu", torch.float64)
    batches = {case: rivals_llama.batch_of(512, 3, 20, case) for case in (rivals_llama.FULL, rivals_llama.PADDED)}
    lengths = batches[rivals_llama.PADDED]["attention_mask"].sum(1).tolist()
    assert lengths == [7, 14, 20] and (batches[rivals_llama.PADDED]["labels"] != -100).sum(1).tolist() == [2, 4, 5]
    keys, args = ("peft", "lora", "readable", "peft16"), Namespace(patience=9.0)
    rivals = [r for key in keys for r in steps_llama.rivals_of(key, base, batches, args)]
    how = {"samples": 3, "rounds": 1, "device": "cpu"}
    rows, failed = inside.run(rivals, tuple(batches), **how, tolerance=1e-6)  # transformers' norms are float32 in float64 too
    assert not failed and len(rows) == 8 and len({(r.case, round(r.loss, 5)) for r in rows}) == 2
    cost = {(r.what, r.case): r.flops_per_sample for r in rows}
    assert cost["LoRA, logits unread", "padded"] < 0.8 * cost["LoRA, logits unread", "full rows"] < 0.8 * cost["LoRA", "padded"]
    one = {rivals_llama.FULL: batches[rivals_llama.FULL]}
    methods, failed = inside.run(steps_llama.rivals_of("methods", base, one, None), tuple(one), **how, tolerance=1e-6, baselines=rows)
    assert not failed and [r.what for r in methods] == [name for name, *_ in steps_llama.RIVALS["methods"]]
    assert steps_llama.compared(methods, 1e-6) == "" and all(math.isfinite(r.loss) for r in methods)
    shared = {p.data_ptr() for p in base.parameters() if p.dim() > 1}
    mine = rivals_llama.ours(base, "LayerNorm")
    assert shared == {p.data_ptr() for p in mine.parameters() if p.dim() > 1}
    assert not {p.data_ptr() for p in mine.parameters() if p.requires_grad} & {p.data_ptr() for p in base.parameters()}


def test_sections_go_on_after_one_that_fails(monkeypatch, capfd):
    from bench import steps_gpu

    works = [True, True, False]
    monkeypatch.setattr(steps_gpu, "cuda_works", lambda: works.pop(0))
    called = []

    def section(options):
        called.append(options)
        return 1 / 0 if options[0] == "raises" else 0

    found = {name: (section, [name]) for name in ("good", "raises", "last", "never")}
    assert steps_gpu.run(found, 100.0) == (1, ["never"]) and [options[0] for options in called] == ["good", "raises", "last"]
    assert all(options[1] == "--patience" and 50 < float(options[2]) <= 60 for options in called)
    assert steps_gpu.run(found, 5.0) == (0, []) and len(called) == 3
    told = [json.loads(line.removeprefix("@case ")) for line in capfd.readouterr().out.splitlines()]
    assert sum("ZeroDivisionError" in case.get("failed", "") for case in told) == 1 and sum("left_out" in case for case in told) == 4


@pytest.mark.gpu
def test_steps_run_on_a_gpu(monkeypatch, capfd):
    """Whole steps of the smallest models, as `bench gpu steps` runs them: fastpeft's own, the graphed ones replayed."""
    from bench import inside, steps, steps_gpu, steps_llama

    if "capture" in sys.modules:  # the lookalike
        monkeypatch.setattr(inside, "traced", lambda step, device: step() or inside.told_of([event("a kernel", 0, 10)]))
    monkeypatch.setattr(inside, "meanwhile", here)
    small = ["--device", "cuda", "--rounds", "1", "--lines"]
    miss = [*small, "--model", "miss-tiny", "--image-size", "32", "--batch-size", "2", "--plans", "F/LoRA/LoRA", "--dropout", "0", "0.1"]
    llama = [*small, "--size", "tiny", "--layers", "1", "--batch", "2", "--tokens", "32"]
    sections = {"miss": (steps.main, [*miss, "--rivals", "graphed"])}
    sections["llama"] = (steps_llama.main, [*llama, "--rivals", "lora", "graphed"])
    assert steps_gpu.run(sections, 100.0) == (0, [])
    told = [json.loads(line.removeprefix("@case ")) for line in capfd.readouterr().out.splitlines() if line.startswith("@case")]
    assert [case for case in told if case.get("failed") or case.get("left_out") or case.get("status")] == []
    complete = [case for case in told if case["case"].endswith("complete")]
    assert sorted({case["what"] for case in complete}) == ["LoRA, CUDA graphs", "LoRA, logits unread", "fastpeft, CUDA graphs"]
    assert len(complete) == 6 and all(case["seconds"] > 0 and case["kernels"] > 0 and case["busy"] > 0 for case in complete)
    tables = [case["rows"] for case in told if case["case"].endswith("table")]
    assert len(tables) == 2 and all(row["estimate_bytes"] > 0 and row["peak_bytes"] > 0 for rows in tables for row in rows)


@contextlib.contextmanager
def here():
    """In place of a process beside: here."""

    def submit(function, *args, **how):
        found = Future()
        found.set_result(function(*args, **how))
        return found

    yield SimpleNamespace(submit=submit)
