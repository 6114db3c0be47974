"""Study runner: what is not finished runs, a process for each job, or for those that train side by side over one base; what is finished is
read; then table and figures.

Each job's folder holds its stages' runs and, once it is finished, result.json. So a study that was killed goes on where it stood: a
finished job is read, an unfinished stage resumes from its checkpoint. Every job takes frozen features from one folder by content, so
images that rows of one base share are encoded once.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fastpeft.documents import parse_json
from fastpeft.files import clear_drafts, locked, write_json
from fastpeft.options import split
from fastpeft.runs.options import RECIPE
from fastpeft.study.file import StudyFile, read_study
from fastpeft.study.jobs import Job, jobs_of
from fastpeft.study.made_data import make
from fastpeft.study.work import FAILED, RESULT, base_of, log_of, work

Say = Callable[[str], None]


def run_study(
    path: str | Path,
    out: str | Path,
    *,
    data: dict[str, str] | None = None,
    scale: str = "full",
    steps: int | None = None,
    side_by_side: int = 1,
    device: str | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run a study file, or go on with it, in ``out``; returns its results: title, rows, totals, failed (error by job), files.

    data: folders by the file's names of data sets. scale: "full" or "tiny". steps: of every stage, instead of the file's. side_by_side:
    jobs that run at once: those of one base and the same data in one process, a step of each in turn
    (:func:`fastpeft.runs.adapters.train_adapters`), others in processes of their own, whose memory adds up. A job that fails, and those
    that start from it, are named in the table, and the others run; another call tries them again. ValueError names what is wrong, before
    anything runs: in the file, a data set without a folder, a job that ``out`` holds with other options. A signal (Ctrl-C, SIGTERM, SIGHUP,
    SIGUSR1) lets the steps end, and is raised as :class:`fastpeft.train.interrupts.Interrupted`."""
    from fastpeft.study.page import write_results
    from fastpeft.train.interrupts import StopBetweenSteps

    study, out = read_study(path, scale), Path(out)
    shared = {name: value for name, value in (("device", device), ("steps", steps)) if value is not None}
    jobs = jobs_of(study, out, data or {}, **shared)
    check(study, jobs)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, what="fastpeft study"), StopBetweenSteps():
        for folder in (out, out / "figures"):
            clear_drafts(folder)
        for job in jobs:
            _begin(job)
        for folder, how in {folder: how for job in jobs for folder, how in job.made.items()}.items():
            make(folder, how)
        began = time.perf_counter()
        failed = run_jobs(jobs, out, say, side_by_side)
        results = [(job, read_result(job)) for job in jobs]
        return write_results(study, results, failed, out, time.perf_counter() - began)


def check(study: StudyFile, jobs: list[Job]) -> None:
    """ValueError for options that no run takes, before any of them runs."""
    from fastpeft.models import resolve
    from fastpeft.plan import plan_for
    from fastpeft.study.figures import FIGURES
    from fastpeft.study.table import check_columns

    check_columns(study.columns or ())
    if unknown := [name for name in study.figures if name not in FIGURES]:
        raise ValueError(f"{study.path}: there is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    for job in jobs:
        for options in job.stages:
            try:
                run, *_ = split(options, *RECIPE)
                family = resolve(run.model, run.image_encoder).family
                plan_for(family.parts, run.plan or family.plan, **run.lora)
            except ValueError as error:
                raise ValueError(f"{study.path}: row {job.row}: {error}") from None


def run_jobs(jobs: list[Job], out: Path, say: Say, side_by_side: int = 1) -> dict[str, str]:
    """Run what has no result yet, in order, so many at once; returns the error of each job that has none in the end."""
    from fastpeft.train.interrupts import Interrupted

    context, failed, numbers = job_context(), {}, {job.name: f"[{at}/{len(jobs)}]" for at, job in enumerate(jobs, 1)}
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            for job in list(waiting):
                busy = [other for entry in running.values() for other in entry[0]]
                if len(busy) >= side_by_side:
                    break
                if job not in waiting or job.starts_from in {other.name for other in (*waiting, *busy)}:
                    continue  # its source comes first
                waiting.remove(job)
                if done := _left_out(job, failed):
                    say(f"{numbers[job.name]} {job.name}: {done}")
                    continue
                group = [job, *_alike(job, waiting, side_by_side - len(busy) - 1)]
                waiting = [other for other in waiting if other not in group]
                process = _start(context, group, out / "features")
                running[process.sentinel] = (group, process, time.perf_counter())
            for sentinel in wait(list(running)) if running else ():
                group, process, began = running.pop(sentinel)
                for job in group:
                    told = _outcome(job, group, process, failed)
                    say(f"{numbers[job.name]} {job.name}: {told} ({time.perf_counter() - began:.0f} s)")
    except KeyboardInterrupt as error:
        names = ", ".join(_stopped(running)) or "between rows"
        number = getattr(error, "number", signal.SIGINT)
        raise Interrupted(f"stopped in {names}; the same command goes on from there", number) from None
    return failed


def _left_out(job: Job, failed: dict[str, str]) -> str:
    """Why a job is not run, '' where it is; one that starts from a failed one counts as failed."""
    if read_result(job) is not None:
        return "finished before"
    if job.starts_from not in failed:
        return ""
    failed[job.name] = f"it starts from {job.starts_from}, which failed"
    return f"left out, {failed[job.name]}"


def _outcome(job: Job, group: list[Job], process, failed: dict[str, str]) -> str:
    """What became of a job whose process has ended; entered in ``failed`` where it has no result."""
    if error := _error_of(job, group, process):
        failed[job.name] = error
        return f"failed: {error}"
    return _told(read_result(job))


def _stopped(running: dict) -> list[str]:
    """End all processes, which save checkpoints between steps; the names of their jobs."""
    for _, process, _ in running.values():
        process.terminate()
    for _, process, _ in running.values():
        process.join()
    return [job.name for group, *_ in running.values() for job in group]


def _alike(job: Job, waiting: list[Job], most: int) -> list[Job]:
    """So many of the waiting jobs that can train over one base with ``job``, in one run."""
    if most < 1 or (base := base_of(job)) is None:
        return []
    return [other for other in waiting if read_result(other) is None and base_of(other) == base][:most]


def job_context():
    """How a job's process starts: from a server that has the imports, once and not once a job. It computes nothing, so that its children
    may use CUDA; where there is no such server, afresh."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastpeft.runs.train", "fastpeft.runs.evaluate", "fastpeft.report.report"])
    return context


def _start(context, group: list[Job], features: Path):
    """The jobs in a process of their own."""
    for job in group:
        (Path(job.folder) / FAILED).unlink(missing_ok=True)
    process = context.Process(target=work, args=(group, str(features)))
    process.start()
    return process


def _error_of(job: Job, group: list[Job], process) -> str | None:
    """The error of a job whose process has ended, or None."""
    process.join()
    if read_result(job) is not None:
        return None
    failure = Path(job.folder) / FAILED
    if failure.is_file():
        return _read(failure)["error"]
    ended = f"killed by signal {-process.exitcode} (out of memory?)" if process.exitcode < 0 else f"ended with code {process.exitcode}"
    return f"its process was {ended}; see {log_of(group)}"


def read_result(job: Job) -> dict[str, Any] | None:
    """The job's result, None where it is not finished."""
    path = Path(job.folder) / RESULT
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    """A file of a job. ValueError where it is not what a study wrote."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: delete {path.parent}, and the same command runs that row again")
    return value


def _begin(job: Job) -> None:
    """Note what the job is. ValueError where its folder holds another."""
    path, mine = Path(job.folder) / "job.json", job.identity()
    if path.is_file():
        theirs = _read(path)
        if theirs != mine:
            changed = ", ".join(_differences(theirs, mine)) or "its stages"
            raise ValueError(f"{job.folder} holds {job.name} with another {changed}: delete that folder, or choose another --out")
        return
    write_json(path, mine)


def _differences(theirs: dict, mine: dict) -> list[str]:
    found = [name for name in mine if name != "stages" and theirs.get(name) != mine[name]]
    for was, now in zip(theirs.get("stages", ()), mine["stages"]):
        found += [f"{name} ({was.get(name)}, now {now.get(name)})" for name in {**was, **now} if was.get(name) != now.get(name)]
    return found


def _told(result: dict[str, Any]) -> str:
    scored = next(iter(result["scores"].values()), {}) or {}
    shown = [f"{name} {scored[name]:.1%}" for name in ("open", "closed", "global") if scored.get(name) is not None]
    return ", ".join([f"loss {result['loss_last']:.3f}", *shown])
