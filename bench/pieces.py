"""Pieces of a run on a GPU: processes with a limit of time each, one log and one JSON file for all of them, written while they run.

A piece prints ``@case {json}`` for each thing it found, at once: what a piece that is cut off had found stays. Its time over, a piece gets
SIGINT, so that it can say where it was, and SIGKILL ten seconds later, as its whole process group.
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
from collections.abc import Iterable
from pathlib import Path

MARK, GRACE = "@case ", 10.0


def say(case: dict) -> None:
    """To whoever runs this piece; pytest's capture is passed by."""
    print(MARK + json.dumps(case), file=sys.__stdout__, flush=True)


class Report:
    """OUT/gpu-NAME.json and OUT/gpu-NAME.log."""

    def __init__(self, out: Path, name: str, about: dict):
        out.mkdir(parents=True, exist_ok=True)
        self.json, self.log = out / f"gpu-{name}.json", out / f"gpu-{name}.log"
        self.told = {"call": name, **about, "failed": [], "pieces": {}}
        self.log.write_text("")
        self.write()

    def write(self) -> None:
        beside = self.json.with_suffix(".tmp")
        beside.write_text(json.dumps(self.told, indent=1) + "\n")
        beside.replace(self.json)

    def run(self, name: str, command: list[str], seconds: float, environment: dict[str, str], cwd: Path) -> int:
        """Runs one piece; its exit status, 124 where its time was over."""
        piece = self.told["pieces"][name] = {"status": None, "seconds": 0.0, "cases": []}
        began = time.perf_counter()
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, **how)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        over = False
        with self.log.open("a") as log:
            log.write(f"== {name}: {' '.join(command)}\n")
            ends = began + seconds
            while True:
                try:
                    line = lines.get(timeout=max(0.0, ends - time.perf_counter()))
                except queue.Empty:
                    if not over:
                        over, ends = True, time.perf_counter() + GRACE
                        _signal(process, signal.SIGINT)
                        continue
                    break
                if line is None:
                    break
                before, mark, case = line.partition(MARK)  # pytest's dots stand before it
                if mark:
                    self._keep(name, piece, case, time.perf_counter() - began)
                if before:
                    log.write(before)
                    log.flush()
        _signal(process, signal.SIGKILL)  # whatever of its group is left
        status = process.wait()
        piece |= {"status": 124 if over else status, "seconds": round(time.perf_counter() - began, 1)}
        if piece["status"]:
            self.told["failed"].append(f"{name}: status {piece['status']}")
        self.write()
        return piece["status"]

    def _keep(self, name: str, piece: dict, line: str, at: float) -> None:
        try:
            case = json.loads(line)
        except ValueError:
            return
        piece["cases"].append(case | {"at": round(at, 1)})  # seconds since the piece began
        if case.get("failed"):
            self.told["failed"].append(f"{name}: {case.get('case', '')}: {case['failed']}")
        self.write()


def _read(stream: Iterable[str], lines: queue.SimpleQueue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
