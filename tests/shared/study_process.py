"""A study in a process that a test may kill: its jobs are forked from it, as it has the imports."""

import multiprocessing
from pathlib import Path

from fastpeft.study import runner


def study(path: str, out: str, **more) -> None:
    """`fastpeft study PATH --out OUT --scale tiny`, its jobs forked: this process has computed nothing yet."""
    runner.job_context = lambda: multiprocessing.get_context("fork")
    runner.run_study(path, out, scale="tiny", device="cpu", say=lambda line: None, **more)


def context():
    """Where such processes come from."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fastpeft.runs.train", "fastpeft.study.runner", "fastpeft.evaluate", "fastpeft.models.miss"])
    return server


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path
