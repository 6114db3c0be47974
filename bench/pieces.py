"""Pieces of a run on a GPU: processes with a limit of time each, one log and one JSON file for all of them, written while they run.

A piece prints ``@case {json}`` for each thing it found, at once: what a piece that is cut off had found stays. Its time over, a piece gets
SIGINT, so that it can say where it was, and SIGKILL ten seconds later, as its whole process group. The run's own SIGINT, SIGTERM and SIGHUP
do the same to the piece that runs, and no other begins; after a SIGKILL the file says which piece ran (its status is null) and which had
not begun (``left_out``).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK, GRACE = "@case ", 10.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(case: dict) -> None:
    """To whoever runs this piece; pytest's capture is passed by."""
    print(MARK + json.dumps(case), file=sys.__stdout__, flush=True)


class Report:
    """OUT/gpu-NAME.json and OUT/gpu-NAME.log. ``pieces``: names of those that are to run. OSError where OUT cannot be written."""

    def __init__(self, out: Path, name: str, about: dict, pieces: Iterable[str]):
        out.mkdir(parents=True, exist_ok=True)
        self.json, self.log = out / f"gpu-{name}.json", out / f"gpu-{name}.log"
        self.told = {"call": name, **about, "interrupted": None, "failed": [], "left_out": list(pieces), "pieces": {}}
        self.log.write_text("")
        self._write()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def write(self) -> None:
        """What is known so far, in the place of what was; a disk that is full meanwhile ends no run."""
        try:
            self._write()
        except OSError as error:
            print(f"bench gpu: {self.json} is not up to date: {error}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        beside = self.json.with_suffix(".tmp")
        beside.write_text(json.dumps(self.told, indent=1) + "\n")
        beside.replace(self.json)

    @contextlib.contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """SIGNALS end the piece that runs, the first so that it can say where it was; ``told["interrupted"]`` then names the signal."""
        before = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame) -> None:
        self.told["interrupted"] = signal.Signals(number).name
        self._lines.put("")  # to whoever waits for a line: put() may be called at any moment

    def run(self, name: str, command: list[str], seconds: float, environment: dict[str, str], cwd: Path) -> int:
        """Runs one piece; its exit status, 124 where its time was over, 130 where this run was interrupted. A case that failed is in
        ``told["failed"]``."""
        self.told["left_out"].remove(name)
        piece = self.told["pieces"][name] = {"status": None, "seconds": 0.0, "cases": []}
        self.write()
        began = time.perf_counter()
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, **how)
        threading.Thread(target=_read, args=(process.stdout, self._lines), daemon=True).start()
        ended = 0
        with _log(self.log) as log:
            log(f"== {name}: {' '.join(command)}\n")
            ends = began + seconds
            while True:
                line = self._next(ends - time.perf_counter())
                before, mark, case = (line or "").partition(MARK)  # pytest's dots stand before it
                if mark:
                    self._keep(name, piece, case, time.perf_counter() - began)
                if before:
                    log(before)
                over = time.perf_counter() >= ends
                if line is None or (ended and over):
                    break
                if not ended and (over or self.told["interrupted"]):
                    ended, ends = 130 if self.told["interrupted"] else 124, time.perf_counter() + GRACE
                    _signal(process, signal.SIGINT)
        _signal(process, signal.SIGKILL)  # whatever of its group is left
        status = process.wait()
        piece |= {"status": ended or status, "seconds": round(time.perf_counter() - began, 1)}
        if piece["status"]:
            self.told["failed"].append(f"{name}: status {piece['status']}")
        self._lines = queue.SimpleQueue()  # a piece that was killed may still say something
        self.write()
        return piece["status"]

    def _next(self, seconds: float) -> str | None:
        """A line; "" where none comes within so many seconds or a signal did; None where the piece has closed its output."""
        try:
            return self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return ""

    def _keep(self, name: str, piece: dict, line: str, at: float) -> None:
        try:
            case = json.loads(line)
        except ValueError:
            return
        piece["cases"].append(case | {"at": round(at, 1)})  # seconds since the piece began
        if case.get("failed"):
            self.told["failed"].append(f"{name}: {case.get('case', '')}: {case['failed']}")
        self.write()


@contextlib.contextmanager
def _log(path: Path) -> Iterator:
    """A function that writes to the file's end at once, as long as the disk takes it."""
    with path.open("a") as file:

        def log(text: str) -> None:
            with contextlib.suppress(OSError):
                file.write(text)
                file.flush()

        yield log


def _read(stream: Iterable[str], lines: queue.SimpleQueue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
