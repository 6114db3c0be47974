"""Jobs of a study: each row, data set and seed as one run of several stages, in an order in which what others start from comes first."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.study.file import Row, StudyFile


@dataclass(frozen=True)
class Job:
    """One trained adapter: ``row`` is its line of the table, ``stages`` the options of `fastpeft train` for each stage in turn.

    ``starts_from``: the job whose adapter the first stage goes on from. ``score_on``: options of reading by data set; {}: the last
    stage's own test split, scored as training scores it. ``made``: the data sets to draw, {folder: how}.
    ``memory``: compute what a step holds; ``similarity``: Excitor's by layer (a row's first seed does)."""

    row: str
    data: str
    seed: int
    folder: str
    stages: tuple[dict[str, Any], ...]
    starts_from: str | None = None
    score_on: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    memory: bool = False
    similarity: bool = False

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """What a finished job depends on, as JSON reads it back."""
        stages = [{k: v for k, v in stage.items() if k not in ("device", "num_workers")} for stage in self.stages]
        left_out = ("paper", "folder", "made", "memory") + (() if self.similarity else ("similarity",))
        kept = {k: v for k, v in asdict(self).items() if k not in left_out} | {"stages": stages}
        return json.loads(json.dumps(kept))


def jobs_of(study: StudyFile, out: Path, folders: dict[str, str], **shared: Any) -> list[Job]:
    """All jobs, in the order of the file but for what must come first. ``folders``: data folders from the command line; ``shared``:
    options of every stage (device, steps). ValueError: two rows of one name, a row to start from that is not there, a data set without a
    folder."""
    reading, made = _readings(study, out, folders)
    named = [(row, names_of(study, row)) for row in study.rows]
    every = [name for _, names in named for name in names.values()]
    if twice := [name for name in every if every.count(name) > 1]:
        raise ValueError(f"{study.path}: two rows are called {twice[0]!r}: give them names")
    jobs = []
    for row, names in named:
        for data, name in names.items():
            for seed in row.seeds or study.seeds:
                source = None if row.starts_from is None else _source(study, named, row, data, seed)
                stages = tuple(_stage(study, row, stage, data, seed, reading, shared) for stage in row.stages)
                used = {reading_of["data"] for reading_of in (*stages, *(reading[form] for form in study.score_on))}
                job = Job(
                    row=name,
                    data=data,
                    seed=seed,
                    folder=str(out / "rows" / slug(name) / f"seed-{seed}"),
                    stages=stages,
                    starts_from=source,
                    score_on={form: reading[form] for form in study.score_on},
                    generation=study.generation,
                    made={folder: how for folder, how in made.items() if folder in used},
                    paper=row.paper,
                    **(_looked_at(study) if seed == (row.seeds or study.seeds)[0] else {}),
                )
                jobs.append(job)
    return _ordered(jobs, study)


def _looked_at(study: StudyFile) -> dict[str, bool]:
    """What is computed of a row's first seed alone, where the study shows it."""
    return {"memory": study.columns is None or "memory" in study.columns, "similarity": "similarity" in study.figures}


def _readings(study: StudyFile, out: Path, folders: dict[str, str]) -> tuple[dict[str, dict], dict[str, dict]]:
    """(options of reading by data set, what is drawn by its folder)."""
    if unknown := sorted(set(folders) - set(study.data)):
        raise ValueError(f"{study.path} has no data set {unknown[0]!r}: it has {', '.join(study.data)}")
    reading, made = {}, {}
    needed = {*study.score_on, *(d for row in study.rows for d, _ in row.stages if d)}
    needed |= {d for row in study.rows for d in row.data or study.data if any(stage is None for stage, _ in row.stages)}
    for name, given in study.data.items():
        given = given | ({"data": folders[name]} if name in folders else {})
        if "made" in given and name not in folders:
            folder = str(out / "data" / name)
            made[folder] = given
            given = {"data": folder}
        given = {k: v for k, v in given.items() if k not in ("made", "images", "seed")}
        if name in needed and not given.get("data"):
            raise ValueError(f"{study.path}: where is {name}? Give its folder: --data {name}=DIR (or try --scale tiny)")
        reading[name] = given
    return reading, made


def names_of(study: StudyFile, row: Row) -> dict[str, str]:
    """The row's name for each data set that it runs on."""
    options = study.options | row.options | row.stages[-1][1]
    given = row.name or _plan_text(options.get("plan"))
    if row.name is None:
        given += f" r={options['rank']}" if options.get("rank") and "LoRA" in given else ""
        given += f" from {row.starts_from}" if row.starts_from else ""
    if row.data is None and all(stage is not None for stage, _ in row.stages):  # its stages say which
        return {row.stages[-1][0]: given}
    several = row.data or tuple(study.data)
    alone = row.data is None and len(study.data) == 1
    alone |= row.data is not None and len(row.data) == 1 and (row.name is not None or len(study.data) == 1)
    return {data: given if alone else f"{given} on {data}" for data in several}


def _plan_text(plan: Any) -> str:
    if isinstance(plan, dict):
        return "/".join(_plan_text(entry) if isinstance(entry, list) else _treatment(entry) for entry in plan.values())
    if isinstance(plan, list):
        return "+".join(map(_treatment, plan))
    return "the model's own plan" if plan is None else str(plan)


def _treatment(entry: Any) -> str:
    return "+".join(map(str, entry)) if isinstance(entry, dict) else str(entry)


def _stage(study: StudyFile, row: Row, stage: tuple[str | None, dict], data: str, seed: int, reading: dict, shared: dict) -> dict[str, Any]:
    form, options = stage
    return study.options | row.options | options | reading[form or data] | {"seed": seed} | shared


def _source(study: StudyFile, named: list[tuple[Row, dict[str, str]]], row: Row, data: str, seed: int) -> str:
    """The name of the job that a row starts from: of the same data set where that row runs on several, and of the same seed."""
    for other, names in named:
        if other is row or row.starts_from not in (other.name, *names.values()):
            continue
        if seed not in (other.seeds or study.seeds):
            raise ValueError(f"{study.path}: row {row.starts_from!r} does not run with seed {seed}, and a row starts from it")
        name = row.starts_from if row.starts_from in names.values() else names.get(data) or next(iter(names.values()))
        return f"{name}, seed {seed}"
    raise ValueError(f"{study.path}: there is no row {row.starts_from!r} to start from; name it (name: {row.starts_from})")


def _ordered(jobs: list[Job], study: StudyFile) -> list[Job]:
    by_name, placed, ordered = {job.name: job for job in jobs}, set(), []

    def place(job: Job, above: tuple[str, ...]) -> None:
        if job.name in above:
            raise ValueError(f"{study.path}: rows start from each other: {' <- '.join([*above, job.name])}")
        if job.name in placed:
            return
        if job.starts_from:
            place(by_name[job.starts_from], (*above, job.name))
        placed.add(job.name)
        ordered.append(job)

    for job in jobs:
        place(job, ())
    slugs: dict[str, str] = {}
    for job in jobs:
        if slugs.setdefault(job.folder, job.name) != job.name:
            raise ValueError(f"{study.path}: {job.name!r} and {slugs[job.folder]!r} would have one folder: give them names")
    return ordered


def folder_of(job: Job, other: str) -> Path:
    """The folder of another job of the same study, by its name."""
    row, _, seed = other.rpartition(", seed ")
    return Path(job.folder).parents[1] / slug(row) / f"seed-{seed}"


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", name).strip("-.") or "row"
