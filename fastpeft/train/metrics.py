"""Metrics of a run, a row per step: metrics.jsonl, the progress bar, and what the run adds up."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from fastpeft.cost.profile import memory_bytes, peak_memory_bytes
from fastpeft.documents import parse_json
from fastpeft.files import open_append, write_text
from fastpeft.progress import progress_bar


class MetricsLog(contextlib.ExitStack):
    """Writers of one process's steps; to be entered. ``done``: the run's totals, which :meth:`log` adds to. ``out`` None: no files."""

    def __init__(self, out: Path | None, done: dict[str, Any], device: torch.device, total_steps: int, *, progress: bool):
        super().__init__()
        self.out, self.done, self.device, self.total_steps = out, done, device, total_steps
        self.first_step: int | None = None  # of this process: it fills caches, and may be the one that is measured
        self.progress = progress

    def __enter__(self) -> MetricsLog:
        super().__enter__()
        self.file = self.enter_context(open_append(self.out / "metrics.jsonl")) if self.out else None
        shown = {"desc": "training", "unit": "step", "disable": not self.progress}
        self.bar = self.enter_context(progress_bar(total=self.total_steps, initial=self.done["step"], **shown))
        return self

    def log(self, row: dict[str, float], seconds: float) -> None:
        """A step's ``row`` (step, loss, learning_rate, grad_norm, samples), and the ``seconds`` since the step before: its own time and the
        wait for its data."""
        done = self.done
        self.first_step = self.first_step or row["step"]
        done["seconds"] += seconds
        if row["step"] - self.first_step >= min(3, (self.total_steps - self.first_step + 1) // 2):
            done["steady_samples"] += row["samples"]
            done["steady_seconds"] += seconds
        done["peak_memory_bytes"] = max(done["peak_memory_bytes"], peak_memory_bytes(self.device))
        row |= {"seconds": seconds, "samples_per_second": row["samples"] / max(seconds, 1e-9), "memory_bytes": memory_bytes(self.device)}
        shown = {"loss": "skipped" if row["loss"] is None else f"{row['loss']:.3f}"}
        shown |= {"samples/s": f"{row['samples_per_second']:.1f}", "GB": f"{row['memory_bytes'] / 1e9:.2f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def keep_lines(path: Path, last_step: int) -> int:
    """Drop metrics past ``last_step`` (and a torn last line): a resumed run writes them again. Returns how many of the steps up to there
    have no line."""
    if not path.is_file():
        return last_step
    kept, steps = [], set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            step = parse_json(line)["step"]
            if type(step) is int and 0 < step <= last_step and step not in steps:
                kept.append(line)
                steps.add(step)
    write_text(path, "".join(line + "\n" for line in kept))
    return last_step - len(steps)


def step_tracer(out: Path | None, steps: int):
    """torch.profiler over this process's steps 2 to 4 of ``steps``, written as a Chrome trace to ``out/trace.json``; None: nothing."""
    if out is None:
        return contextlib.nullcontext()
    from torch.profiler import profile, schedule

    return profile(
        schedule=schedule(wait=0, warmup=int(steps > 1), active=3, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(out / "trace.json")),
        profile_memory=True,
    )
