"""Whole training steps of several rivals, interleaved in one run: each rival in a process of its own, so that its peak memory is its own.

A rival is a function that makes a runner, and what it is told. A runner has ``measure()``, which runs one step and says what it computes
and costs, and ``step()``, which is timed. The first rival is the baseline: those that claim to compute the same must have its loss and the
length of its gradient before anything is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import psutil
import torch

from fastpeft.cost.profile import peak_memory_bytes, reset_peak

LONG = 5.0  # seconds: a step that takes longer needs no warm-up beyond the measured one


class Runner(Protocol):
    def measure(self) -> dict[str, Any]:
        """One step's loss, grad_norm, flops, saved_bytes, weight_bytes (all of the whole batch) and, maybe, a note."""

    def step(self) -> None:
        """Forward, backward and update."""


@dataclass(frozen=True)
class Rival:
    """``make(**options)`` runs in the rival's process, so both must pickle. ``same``: it computes what the baseline computes.
    ``patience``: seconds until it must have measured itself; it is left out, with the reason, if it has not, or if it fails."""

    name: str
    make: Callable[..., Runner]
    options: dict[str, Any]
    same: bool = True
    patience: float = 900.0


@dataclass
class Row:
    """One rival's line. Bytes and FLOPs are exact; ``seconds`` is the median of its steps, ``seconds_all`` each of them."""

    what: str
    loss: float
    grad_norm: float
    flops_per_sample: float
    saved_bytes: int
    weight_bytes: int
    note: str = ""
    peak_bytes: int = 0  # of the process: weights, libraries and all
    seconds: float = 0.0
    seconds_all: list[float] = field(default_factory=list)
    samples_per_second: float = 0.0
    speedup: float = 0.0  # over the baseline
    flops_ratio: float = 0.0  # the baseline's FLOPs over ours

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Worker:
    """A rival's process, as seen from here."""

    def __init__(self, rival: Rival, device: str, threads: int):
        self.rival = rival
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, rival, device, threads), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str, patience: float | None = None) -> Any:
        """Its answer; RuntimeError with the reason where it failed, ended or took longer than ``patience`` seconds."""
        try:
            self.pipe.send(what)
            if not self.pipe.poll(patience):
                raise RuntimeError(f"took longer than {patience:.0f} s")
            good, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            raise RuntimeError(f"its process ended with {self.process.exitcode} (-9: out of memory)") from None
        if not good:
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe, rival: Rival, device: str, threads: int) -> None:
    """The rival's process: makes the runner at the first question, then answers."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # PEFT's and transformers' about themselves
    device, runner = torch.device(device), None
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            if question == "measure":
                runner = rival.make(**rival.options)
                began = time.perf_counter()
                answer = runner.measure() | {"seconds": time.perf_counter() - began}
                _forget_peak(device)
            elif question == "step":
                answer = _timed(runner.step, device)
            elif question == "trim":
                answer = _trim()
            else:
                answer = peak_memory_bytes(device)
            pipe.send((True, answer))
        except Exception as error:  # whatever goes wrong in a rival is its result
            pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def _timed(step: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _forget_peak(device: torch.device) -> None:
    """Leave what making the rival took (copies, conversions) out of its peak, where the system lets us."""
    reset_peak(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _trim() -> None:
    """Give freed memory back: glibc keeps blocks below 32 MB for itself, gigabytes after a large step."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def run(rivals: list[Rival], *, samples: int, rounds: int, device: str = "cpu", tolerance: float = 1e-4, memory: float | None = None):
    """(rows, {name: why it was left out}). ``memory``: bytes a step may want; with less than that free, idle rivals give theirs back.

    ValueError where a rival's loss or gradient is not the baseline's: nothing is timed then.
    """
    workers: list[Worker] = []
    rows, left_out, long = {}, {}, {}
    try:
        for rival in rivals:
            worker = Worker(rival, device, torch.get_num_threads())
            workers.append(worker)
            try:
                told = worker.ask("measure", rival.patience)
            except RuntimeError as error:
                left_out[rival.name] = str(error)
                worker.end()
                workers.remove(worker)
                if rival is rivals[0]:
                    raise ValueError(f"the baseline, {rival.name}, does not run: {error}") from None
                continue
            long[rival.name] = told.pop("seconds") > LONG
            told["flops_per_sample"] = told.pop("flops") / samples
            rows[rival.name] = row = Row(rival.name, **told)
            if rival.same:
                check(row, rows[rivals[0].name], tolerance)
            worker.ask("trim")
        for round_ in range(-1, rounds):  # -1: warm-up
            for worker in workers[max(0, round_) % len(workers) :] + workers[: max(0, round_) % len(workers)]:
                if round_ < 0 and long[worker.rival.name]:
                    continue
                if memory is not None and psutil.virtual_memory().available < memory:
                    for other in workers:
                        other.ask("trim")
                seconds = worker.ask("step")
                if round_ >= 0:
                    rows[worker.rival.name].seconds_all.append(seconds)
        for worker in workers:
            rows[worker.rival.name].peak_bytes = worker.ask("peak")
    finally:
        for worker in workers:
            worker.end()
    baseline = rows[rivals[0].name]
    for row in rows.values():
        row.seconds = torch.tensor(row.seconds_all, dtype=torch.float64).quantile(0.5).item()
        row.samples_per_second = samples / row.seconds
    for row in rows.values():
        row.speedup = baseline.seconds / row.seconds
        row.flops_ratio = baseline.flops_per_sample / row.flops_per_sample
    return list(rows.values()), left_out


def check(row: Row, baseline: Row, tolerance: float) -> None:
    """ValueError where a row's loss or length of the gradient is not the baseline's."""
    for name, wanted in (("loss", baseline.loss), ("grad_norm", baseline.grad_norm)):
        got, allowed = getattr(row, name), tolerance * (1 if name == "loss" else 10)
        if not abs(got - wanted) <= allowed * abs(wanted):
            raise ValueError(f"{row.what}: {name} {got} against {wanted} of {baseline.what}: not the same computation, nothing is timed")


def about_machine() -> dict[str, Any]:
    """What every result is told with."""
    return {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(rows: list[Row]) -> str:
    """A table of one plan's rivals."""
    head = "| | GF/sample | kept for backward, MB | peak memory, GB | s/step | samples/s | speed-up | FLOPs, fewer by | |\n|" + "---|" * 9
    lines = [
        f"| {r.what} | {r.flops_per_sample / 1e9:.4g} | {r.saved_bytes / 1e6:,.0f} | {r.peak_bytes / 1e9:.2f} | {r.seconds:.3g} |"
        f" {r.samples_per_second:.3g} | {r.speedup:.2f}x | {r.flops_ratio:.2f}x | {r.note} |"
        for r in rows
    ]
    return "\n".join([head, *lines])
