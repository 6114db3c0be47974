"""bench/timing.py on a GPU: an eager column and one of a captured graph's replays, and rooflines of numbers that are not constant."""

import contextlib
import itertools
import json
import sys

import pytest
import torch

from bench import timing

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def clocks(monkeypatch):
    """On the lookalike an event's time is its number: no test waits for a clock."""
    numbers = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(numbers)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return float(other.at - self.at)

    if "capture" in sys.modules:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "memory_stats", dict, raising=False)
    monkeypatch.setattr(timing, "_eviction", lambda device: torch.zeros(8, device=device))
    monkeypatch.setattr(timing, "roofline", lambda device, dtype: (100.0, 1.0))
    with contextlib.nullcontext() if "capture" in sys.modules else torch.cuda.stream(torch.cuda.Stream()):  # as bench/__main__.py
        yield


def test_two_columns_and_a_copy(capfd):
    x = torch.randn(64, device="cuda", requires_grad=True)
    replayed = []

    def ours(x):
        replayed.append(1)
        return x * 2

    settings = timing.Settings("cuda", 0.0, quick=True, lines=True)
    fns = {"fastpeft": ours, "waits": lambda x: x * x.sum().item(), "torch": lambda x: x + x}
    how = {"cotangent": torch.ones_like(x), "bytes_moved": (512.0, 512.0), "phases": ("fwd",)}
    rows = timing.measure("double", "64", torch.float32, fns, (x,), settings, **how)
    found = {row.provider: row for row in rows}
    assert list(found) == ["fastpeft", "copy", "waits", "torch"]
    assert all((row.graph_ms is None) == (name == "waits") and row.ms[1] > 0 for name, row in found.items())
    assert "waits not captured: " in found["fastpeft"].note
    calls = len(replayed)
    assert calls == 1 + 1 + 1 + 3  # warmed up, its peak, captured, three times eagerly: a replay calls no Python
    told = [json.loads(line.removeprefix("@case ")) for line in capfd.readouterr().out.splitlines() if line.startswith("@case ")]
    assert [row["provider"] for row in told[0]["rows"]] == list(found) and told[0]["case"] == "double fwd 64 torch.float32"


def test_a_case_that_does_not_run_stops_no_other(capfd):
    def broken(x):
        raise RuntimeError("CompilationError: at 12:3")

    x = torch.randn(8, device="cuda")
    settings = timing.Settings("cuda", 0.0, quick=True, lines=True)
    assert timing.compare("broken", "8", torch.float32, {"fastpeft": lambda: broken(x), "torch": lambda: x + 1}, settings) == []
    assert len(timing.compare("sound", "8", torch.float32, {"fastpeft": lambda: x + 1, "torch": lambda: x + 1}, settings)) == 2
    told = [json.loads(line.removeprefix("@case ")) for line in capfd.readouterr().out.splitlines() if line.startswith("@case ")]
    assert [case.get("failed", "") for case in told] == ["fastpeft: RuntimeError: CompilationError: at 12:3", ""]
    settings.lines = False
    with pytest.raises(RuntimeError, match="at 12:3"):
        timing.compare("broken", "8", torch.float32, {"fastpeft": lambda: broken(x), "torch": lambda: x + 1}, settings)
