"""Whole training steps of several rivals, one after another in this process: on a GPU, and wherever peak memory is not the process's.

On a GPU starting a process takes longer than the steps do, and the allocator knows what each rival holds. ``cases`` are what a rival is
measured in (rates of dropout, layouts of a batch): ``enter(case)`` of its runner gets it there and says what one step computes, ``step()``
is timed. The first rival that runs is the baseline. Every rival tells its line as soon as there is one, and again when it is complete; what
fails is told and stops no other.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import torch
from torch import nn

import fastpeft as fp
from bench.frame import Rival, Row, check
from fastpeft.cost.profile import memory_bytes, peak_memory_bytes, reset_peak

PATIENCE = 60.0  # seconds: for an estimate that is still to come
WARM, BLOCK = 2, 3  # steps before timing; steps between two waits for a GPU, which else works on while the host prepares the next
TOP = 12  # kernels that are named


class Runner(Protocol):
    shared_bytes: int  # of its weights, those that were there before it was made

    def enter(self, case: str) -> dict[str, Any]:
        """Gets ready for ``case``: one step's loss, grad_norm, flops, saved_bytes, weight_bytes (of the whole batch), and maybe a note.
        Without loss and grad_norm where steps are random."""

    def step(self) -> None:
        """Forward, backward and update; nothing is read from the device."""


@dataclass
class CaseRow(Row):
    """A rival's line in one case. On a GPU: ``busy`` is the share of a step in which it computed (``gpu_seconds``, traced, over
    ``seconds``, not traced); ``launches`` those of the host, a graph being one; ``kernels`` what ran, copies too; ``waits`` of the host;
    ``peak_bytes`` of its tensors alone; ``top`` the kernels that took longest: [name, calls, seconds]."""

    case: str = ""
    busy: float | None = None
    gpu_seconds: float | None = None
    launches: int | None = None
    kernels: int | None = None
    waits: int | None = None
    estimate_bytes: int | None = None
    top: list[tuple[str, int, float]] = field(default_factory=list)


@dataclass
class _Seat:
    """A rival that runs, and its lines by case."""

    rival: Rival
    runner: Runner
    rows: dict[str, CaseRow] = field(default_factory=dict)


def run(
    rivals: list[Rival],
    cases: tuple[str, ...],
    *,
    samples: int,
    rounds: int,
    device: str,
    tolerance: float,
    tell: Callable[[dict], None] = lambda case: None,
    least: bool = False,
    baselines: Sequence[CaseRow] = (),
) -> tuple[list[CaseRow], dict[str, str]]:
    """(lines, {name: why it has none or not all}). ``rounds``: blocks of steps that are timed, of which the median counts, or the
    ``least``; ``tolerance``: relative, of losses, ten times as much of gradients' lengths; ``baselines``: of an earlier run."""
    at, seats, failed = torch.device(device), [], {}
    baselines = {row.case: row for row in reversed(baselines)}
    on_gpu = at.type == "cuda"
    if on_gpu:
        gc.collect()
        gc.freeze()  # what is imported stays: collecting then takes no time
    for rival in rivals:
        seat = None
        try:
            with patient(rival.patience):
                before = _settled(at)
                seat = _Seat(rival, rival.make(**rival.options))
                _settled(at)  # copies made on the way
                for case in cases:
                    _enter(seat, case, baselines, samples, tolerance, at)
                    _time(seat, case, rounds if on_gpu else 1, at, before, least)
                    _compare(seat.rows[case], baselines, samples)
                    tell(seat.rows[case].to_dict() | {"case": f"{rival.name}, {case}"})
        except Exception as error:  # whatever goes wrong in a rival is its result
            failed[rival.name] = _said(error)
            tell({"case": rival.name, "failed": failed[rival.name]})
        if seat is not None and any(row.seconds for row in seat.rows.values()):
            seats.append(seat)
    if not on_gpu:  # by turns, as other work comes and goes on its cores
        for _, seat in product(range(rounds - 1), [seat for seat in seats if seat.rival.name not in failed]):
            _time(seat, cases[-1], 1, at, 0, least)
            _compare(seat.rows[cases[-1]], baselines, samples)
    else:
        for seat in seats:
            try:
                _complete(seat, baselines, samples, rounds, at, tell)
            except Exception as error:
                failed.setdefault(seat.rival.name, f"traced: {_said(error)}")
                tell({"case": f"{seat.rival.name}, traced", "failed": _said(error)})
        gc.unfreeze()
    return [row for seat in seats for row in seat.rows.values() if row.seconds], failed


def _settled(device: torch.device) -> int:
    """Bytes held now, on a GPU with nothing waiting to be freed."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return memory_bytes(device)


def _enter(seat: _Seat, case: str, baselines: dict[str, CaseRow], samples: int, tolerance: float, device: torch.device) -> None:
    """Its line, of one step that is compared with the baseline's."""
    reset_peak(device)
    told = seat.runner.enter(case)
    told["flops_per_sample"] = told.pop("flops") / samples
    compared = "loss" in told
    row = CaseRow(seat.rival.name, **{"loss": float("nan"), "grad_norm": float("nan")} | told, case=case)
    if seat.rival.same and compared and case in baselines:
        check(row, baselines[case], tolerance)
    seat.rows[case] = row


def _time(seat: _Seat, case: str, rounds: int, device: torch.device, before: int, least: bool) -> None:
    row, step = seat.rows[case], seat.runner.step
    block = BLOCK if device.type == "cuda" else 1
    for _ in range(WARM if device.type == "cuda" else 0):
        step()
    row.seconds_all += [_timed(step, block, device) for _ in range(rounds)]
    row.seconds = min(row.seconds_all) if least else torch.tensor(row.seconds_all, dtype=torch.float64).quantile(0.5).item()
    if device.type == "cuda":
        row.peak_bytes = peak_memory_bytes(device) - before + seat.runner.shared_bytes


def _timed(step: Callable[[], None], block: int, device: torch.device) -> float:
    """Seconds of a step, over ``block`` of them. On the CPU its time in this thread: others may run beside it."""
    if device.type == "cpu":
        began = time.thread_time()
        step()
        return time.thread_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(block):
        step()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / block


def _compare(row: CaseRow, baselines: dict[str, CaseRow], samples: int) -> None:
    baseline = baselines.setdefault(row.case, row)
    row.samples_per_second, row.speedup = samples / row.seconds, baseline.seconds / row.seconds
    row.flops_ratio = baseline.flops_per_sample / row.flops_per_sample


def _complete(seat: _Seat, baselines: dict, samples: int, rounds: int, device: torch.device, tell: Callable[[dict], None]) -> None:
    """What a trace shows, and steps timed once more: a clock that has changed meanwhile shows."""
    timed, last = [case for case in seat.rows if seat.rows[case].seconds], list(seat.rows)[-1]
    for case in reversed(timed):
        row = seat.rows[case]
        if case != last:
            seat.runner.enter(case)
        peak = row.peak_bytes
        _time(seat, case, max(1, rounds // 2), device, 0, least=False)
        row.peak_bytes = peak
        _compare(row, baselines, samples)
        vars(row).update(traced(seat.runner.step, device))
        row.busy = row.gpu_seconds / row.seconds
        tell(row.to_dict() | {"case": f"{seat.rival.name}, {case}, complete"})


def traced(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Of one step: gpu_seconds, kernels, launches, waits, top; see :class:`CaseRow`."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize(device)
    return told_of(trace.events())


LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "cuMemcpy", "cuMemset")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def told_of(events) -> dict[str, Any]:
    """What :func:`traced` says, of a profile's events; the wait that ends it is not counted."""
    cuda = torch.autograd.DeviceType.CUDA
    ran = [e for e in events if e.device_type == cuda and not getattr(e, "is_user_annotation", False)]
    host = [e.name for e in events if e.device_type != cuda]
    calls, seconds = Counter(), Counter()
    for event in ran:
        calls[event.name] += 1
        seconds[event.name] += (event.time_range.end - event.time_range.start) / 1e6
    waits = sum(name.startswith(WAITS) for name in host)
    return {
        "gpu_seconds": _covered([(e.time_range.start, e.time_range.end) for e in ran]) / 1e6,
        "kernels": len(ran),
        "launches": sum(name.startswith(LAUNCHES) for name in host),
        "waits": max(0, waits - 1),
        "top": [(name[:90], calls[name], round(took, 6)) for name, took in seconds.most_common(TOP)],
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length that spans cover together: kernels of two streams may run at once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@contextlib.contextmanager
def meanwhile() -> Iterator[Executor]:
    """For :func:`estimated`: a process beside the rivals'."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def estimated(make: Callable[[], nn.Module], plan: str, **how) -> int:
    """The peak that ``fastpeft.estimate`` gives for a step of the model that ``make`` makes, on the meta device."""
    e = fp.estimate(make(), plan, **how)
    return e.peak_bytes - e.process_bytes


def with_estimates(rows: list[CaseRow], guesses: dict[tuple[str, str] | str, Future]) -> list[CaseRow]:
    """``rows`` with what was estimated, by name and case or for every case of a name; what failed is in the note."""
    for row in rows:
        found = guesses.get((row.what, row.case), guesses.get(row.what))
        if found is not None:
            try:
                row.estimate_bytes = found.result(PATIENCE)
            except Exception as error:  # whatever goes wrong in it is not the rival's
                row.note = f"{row.note} no estimate: {_said(error)}".strip()
    return rows


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """TimeoutError inside where it takes longer: between two lines of Python, as far as compilers written in it go."""

    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def markdown(rows: list[CaseRow]) -> str:
    """A table of the rivals' cases."""
    head = "| | case | ms/step | speed-up | GPU busy | launches | kernels | waits | peak, GB | estimate | kept, MB | FLOPs, fewer by | |"
    lines = [
        f"| {r.what} | {r.case} | {1e3 * r.seconds:.2f} | {r.speedup:.2f}x | {_or_not(r.busy, '.0%')} | {_or_not(r.launches, 'd')} |"
        f" {_or_not(r.kernels, 'd')} | {_or_not(r.waits, 'd')} | {r.peak_bytes / 1e9:.2f} | {_estimate(r)} | {r.saved_bytes / 1e6:,.0f} |"
        f" {r.flops_ratio:.2f}x | {r.note} |"
        for r in rows
    ]
    return "\n".join([head, "|" + "---|" * 13, *lines])


def _or_not(value, form: str) -> str:
    return "" if value is None else format(value, form)


def _estimate(row: CaseRow) -> str:
    return "" if row.estimate_bytes is None else f"{row.estimate_bytes / 1e9:.2f} ({row.peak_bytes / row.estimate_bytes - 1:+.0%})"
