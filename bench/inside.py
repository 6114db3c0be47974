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
import os
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

PATIENCE = 20.0  # seconds: for an estimate that is still to come
WARM, BLOCK = 2, 3  # steps before timing; steps between two waits for a GPU, which else works on while the host prepares the next
LONG = 0.1  # seconds: such a step gains nothing by that
TOP = 12  # kernels that are named


class Runner(Protocol):
    shared_bytes: int  # of its weights, those that were there before it was made

    def enter(self, case: str) -> dict[str, Any]:
        """Gets ready for ``case``: one step's loss, grad_norm, flops, saved_bytes, weight_bytes (of the whole batch), and maybe a note; of
        one without dropout, where it has some."""

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
    """A rival that runs, and its lines by case. ``held``: bytes of its own between two steps."""

    rival: Rival
    runner: Runner
    held: int
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
    comparison = _Comparison(samples, rounds, torch.device(device), tolerance, tell, least, {row.case: row for row in reversed(baselines)})
    first, *others = cases
    with _few_to_collect() if comparison.on_gpu else contextlib.nullcontext():
        seats = [seat for rival in rivals if (seat := comparison.seated(rival, first)) is not None]
        for case, seat in product(others, seats):
            if seat.rival.name not in comparison.failed:
                comparison.further(seat, case)
        comparison.complete(seats)
    rows = [row for seat in seats for row in seat.rows.values()]
    for row in rows:  # the baseline's seconds are known now
        comparison.against_baseline(row)
    return rows, comparison.failed


@dataclass
class _Comparison:
    """A run of rivals; fields as :func:`run`'s arguments, baselines by case."""

    samples: int
    rounds: int
    device: torch.device
    tolerance: float
    tell: Callable[[dict], None]
    least: bool
    baselines: dict[str, CaseRow]
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            _get_workspaces(self.device)

    def seated(self, rival: Rival, case: str) -> _Seat | None:
        """The rival with its line of the first case; None, told, where it has none."""
        with self._told(rival), patient(rival.patience):
            before = self._settled()
            seat = _Seat(rival, rival.make(**rival.options), 0)
            self._settled()  # copies made on the way
            self._line(seat, case, before, seat.runner.shared_bytes)
            seat.held = self._settled() - before + seat.runner.shared_bytes
            return seat
        return None

    def further(self, seat: _Seat, case: str) -> None:
        with self._told(seat.rival), patient(seat.rival.patience):
            self._line(seat, case, self._settled(), seat.held)

    @contextlib.contextmanager
    def _told(self, rival: Rival, what: str = "") -> Iterator[None]:
        """Whatever goes wrong in a rival is its result."""
        try:
            yield
        except Exception as error:
            self.failed.setdefault(rival.name, f"{what}{_said(error)}")
            self.tell({"case": rival.name, "failed": f"{what}{_said(error)}"})

    def _line(self, seat: _Seat, case: str, before: int, held: int) -> None:
        """Its line in a case: one step that is compared with the baseline's, then those that are timed. ``before``: bytes in all, of which
        ``held`` are its own."""
        reset_peak(self.device)
        told = seat.runner.enter(case)
        told["flops_per_sample"] = told.pop("flops") / self.samples
        row = CaseRow(seat.rival.name, **told, case=case)
        if seat.rival.same and case in self.baselines:
            check(row, self.baselines[case], self.tolerance)
        self._time(seat, row, self.rounds if self.on_gpu else 1)
        row.peak_bytes = peak_memory_bytes(self.device) - before + held if self.on_gpu else 0
        seat.rows[case] = row
        self.tell(row.to_dict() | {"case": f"{row.what}, {case}"})

    def _time(self, seat: _Seat, row: CaseRow, rounds: int) -> None:
        step, block = seat.runner.step, 1
        if self.on_gpu:
            for _ in range(WARM):
                step()
            block = BLOCK if _timed(step, 1, self.device) < LONG else 1
        row.seconds_all += [_timed(step, block, self.device) for _ in range(rounds)]
        found = torch.tensor(row.seconds_all, dtype=torch.float64)
        row.seconds = (found.min() if self.least else found.quantile(0.5)).item()
        self.against_baseline(row)

    def against_baseline(self, row: CaseRow) -> None:
        baseline = self.baselines.setdefault(row.case, row)
        row.samples_per_second, row.speedup = self.samples / row.seconds, baseline.seconds / row.seconds
        row.flops_ratio = baseline.flops_per_sample / row.flops_per_sample

    def complete(self, seats: list[_Seat]) -> None:
        """On a GPU what a trace shows, and steps timed once more: a clock that has changed meanwhile shows. On the CPU the other rounds, by
        turns, as other work comes and goes on its cores."""
        if self.on_gpu:
            for seat in seats:
                with self._told(seat.rival, "traced: "):
                    self._trace(seat)
            return
        for _, seat in product(range(self.rounds - 1), seats):
            if seat.rival.name not in self.failed:
                self._time(seat, list(seat.rows.values())[-1], 1)

    def _trace(self, seat: _Seat) -> None:
        *others, last = seat.rows
        for case in (last, *others):  # it is in the last, or was on its way from there
            row = seat.rows[case]
            if case != last or seat.rival.name in self.failed:
                seat.runner.enter(case)
            self._time(seat, row, max(1, self.rounds // 2))
            vars(row).update(traced(seat.runner.step, self.device))
            row.busy = row.gpu_seconds / row.seconds
            self.tell(row.to_dict() | {"case": f"{row.what}, {case}, complete"})

    def _settled(self) -> int:
        """Bytes held now, on a GPU with nothing waiting to be freed."""
        if not self.on_gpu:
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        return memory_bytes(self.device)


@contextlib.contextmanager
def _few_to_collect() -> Iterator[None]:
    """What is imported by now is nothing that garbage collection looks at: it else takes a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _get_workspaces(device: torch.device) -> None:
    """Libraries keep theirs from the first product on: nobody's peak then has them."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype, device=device)
        torch.nn.functional.linear(x @ x, x, x[0])


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


_beside: list[Executor] = []


@contextlib.contextmanager
def meanwhile() -> Iterator[Executor]:
    """For :func:`estimated`: a process beside the rivals', forked while CUDA is not there yet, so that it has imported everything. Inside
    another ``meanwhile``, that one's."""
    if _beside:
        yield _beside[0]
        return
    how = "spawn" if torch.cuda.is_initialized() else "fork"
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(how), initializer=_be_modest)
    _beside.append(pool)
    try:
        if how == "fork":
            pool.submit(int)  # now
        yield pool
    finally:
        _beside.clear()
        pool.shutdown(wait=False, cancel_futures=True)


def _be_modest() -> None:
    torch.set_num_threads(1)
    os.nice(10)


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
