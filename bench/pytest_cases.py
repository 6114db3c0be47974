"""pytest plugin of `bench gpu right`: the most important tests first, each result told as it comes (bench/pieces.py).

An error inside a kernel leaves CUDA in a state in which nothing runs any more in that process: a worker of xdist then ends, and a new one
has the tests that are left.
"""

from __future__ import annotations

import os
import sys

from bench.pieces import say

if "PYTEST_XDIST_WORKER" in os.environ:  # many such processes, each with as many threads as there are cores, would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

# of a test's name, from the most important on
ORDER = ("lora", "norm", "prefix", "attention", "adapter", "cross_entropy")


def rank(nodeid: str) -> tuple[int, int]:
    """Whole runs, then bfloat16 before what names no dtype, before other dtypes; within that by operator."""
    if "/ops/" not in nodeid and nodeid.startswith("tests/"):
        return -1, 0
    name = nodeid.rpartition("/")[2]
    other = any(dtype in name for dtype in ("float64", "float32", "float16"))
    dtype = 0 if "bfloat16" in name else 2 if other else 1
    return dtype, next((i for i, part in enumerate(ORDER) if part in name), len(ORDER))


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: rank(item.nodeid))  # stable: every process of xdist collects the same


def cuda_works() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


_failed: set[str] = set()  # tests of this worker


def pytest_runtest_logfinish(nodeid) -> None:
    """Its reports have been sent."""
    if nodeid in _failed and not cuda_works():
        os._exit(3)


def pytest_runtest_logreport(report) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that deals the tests out hears of each, too
        _failed.update([report.nodeid] * (report.outcome == "failed"))
        return
    if report.when == "call" or report.outcome != "passed":
        case = {"case": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            text = str(report.longrepr).strip()
            case["failed"] = next((line for line in text.splitlines() if line.startswith("E ")), text.splitlines()[-1])[:300]
            print(f"{report.nodeid}\n{text}", file=sys.__stdout__, flush=True)  # now: a run that is cut off has no summary
        say(case)
