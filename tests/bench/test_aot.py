"""bench/aot.py: what it says of resources that are too large, of a kernel that does not compile, and under a Triton without limits."""

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
ROOMY = {"registers": 100, "stack": 0, "shared": 50_000, "spills": 0, "tensor_cores": ["HMMA"]}


@pytest.fixture
def aot(monkeypatch):
    from bench import aot

    @contextlib.contextmanager
    def here(processes):
        yield SimpleNamespace(map=map)

    monkeypatch.setattr(aot, "ProcessPoolExecutor", here)
    return aot


def test_what_is_too_much(aot):
    found = {
        "fine/sm_90": ROOMY,
        "wide/sm_90": ROOMY | {"registers": 101, "shared": 60_000},
        "plain/sm_90": ROOMY | {"tensor_cores": []},
        "spills/sm_90": ROOMY | {"spills": 2},
        "excused/sm_90": ROOMY | {"spills": 2},
        "new/sm_90": ROOMY,
        "groups/sm_90": ROOMY | {"warps": 8},
        "lowered/sm_120": {"shared": 7},
    }
    limits = {key: ROOMY | {"spills": 2} for key in found if not key.startswith("new")}
    said = aot.violations(found, limits, {"excused": "known"})
    assert [line.partition(":")[0] for line in said] == ["wide/sm_90", "wide/sm_90", "plain/sm_90", "spills/sm_90", "new/sm_90"]
    assert "registers 101 > 100" in said[0] and "shared 60000 > 50000" in said[1] and "HMMA" in said[2] and "no limit" in said[4]
    assert [line.partition(":")[0] for line in aot.wrong_on_a_card(found)] == ["groups/sm_90"]


def test_shared_memory_of_each_card(aot):
    """What is compiled as for sm_80 is held to sm_86's and sm_89's too."""
    from fastpeft.kernels.card import SHARED

    assert SHARED == {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
    found = {"a/sm_80": {"shared": 99 << 10}, "b/sm_80": {"shared": 100 << 10}, "b/sm_120": {"shared": 172_032}}
    assert [line.partition(":")[0] for line in aot.too_large(found, ["a", "b"])] == ["b/sm_120", "b/sm_86"]


@pytest.mark.parametrize("version", ["3.9.0", "4.0.0"])
def test_one_kernel_that_does_not_compile(aot, monkeypatch, tmp_path, capsys, version):
    """The others are told all the same; under a Triton without limits what is wrong on any card still fails."""
    jobs = [("m", name, 90) for name in ("good", "broken", "spills", "groups")]
    results = {"good": ROOMY, "broken": {"error": "CompilationError: at 3:1"}}
    results |= {"spills": ROOMY | {"spills": 9}, "groups": ROOMY | {"warps": 8}}
    monkeypatch.setattr(aot, "jobs_of", lambda archs, only: (jobs, []))
    monkeypatch.setattr(aot, "work", lambda job: (f"{job[1]}/sm_90", results[job[1]], 0.1))
    monkeypatch.setattr(aot.triton, "__version__", version)
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"spills": {}, "triton": {"3.9.0": {f"{name}/sm_90": ROOMY for name in results}}}))
    monkeypatch.setattr(sys, "argv", ["aot.py", "--check", str(limits)])
    assert aot.main() is True
    said = capsys.readouterr().out
    assert "broken/sm_90: does not compile: CompilationError" in said and "groups/sm_90: wgmma in 8 warps" in said and "good/sm_90 " in said
    assert ("spills/sm_90: 9 spills" in said) == (version == "3.9.0") and ("Spilling: spills/sm_90 (9)" in said) == (version == "4.0.0")
    jobs[:] = jobs[:1]
    assert aot.main() is False


def test_limits_are_recorded_for_both_tritons(aot):
    """Those of the GPU machines' torch 2.11, and of this one, for every case that both compile."""
    told = json.loads((aot.ROOT / "bench/aot_limits.json").read_text())
    assert {"3.6.0", "3.9.0"} <= told["triton"].keys()
    for kernels in told["triton"].values():
        spilling = [key for key, of in kernels.items() if of["spills"] and not any(part in key for part in told["spills"])]
        assert spilling == [] and {key.rpartition("_")[2] for key in kernels} >= {"80", "90"}
