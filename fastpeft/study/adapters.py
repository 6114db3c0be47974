"""Rows of a study as adapters of one run (`fastpeft train --adapters FILE`): what they train differs, base and data are the same.

    rows:
      - {name: small, plan: F/LoRA/LoRA, rank: 4}
      - {name: large, plan: F/LoRA/LoRA, rank: 16, learning_rate: 5.0e-4}
    seeds: [0, 1]                     # four adapters: small-seed-0, small-seed-1, ...

A row's options stand over those of the command line, and these over the file's. What a study says of scores, table and figures is left to
`fastpeft study`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpeft.options import split
from fastpeft.runs.options import RECIPE
from fastpeft.study.file import Row, StudyFile, read_study
from fastpeft.study.jobs import names_of, slug

FILE, PAGE = "adapters.json", "comparison.html"
TOLD = ("plan", "steps", "samples", "loss_first", "loss_last", "eval", "seconds")


def adapters_of(path: str | Path, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of `fastpeft train` for each adapter, by its name, in a folder of its own in ``given["out"]``; ``given``: those of all.
    ValueError names what is wrong."""
    study = read_study(path)
    if "seed" in given:
        raise ValueError(f"--seed: seeds of several adapters are in {path}, such as 'seeds: [0, 1]'")
    data, found = given.get("data") or _data_of(study), {}
    for row in study.rows:
        name = _name(study, row)
        seeds = row.seeds or study.seeds
        for seed in seeds:
            whole = slug(name) + (f"-seed-{seed}" if len(seeds) > 1 else "")
            if whole in found:
                raise ValueError(f"{path}: two adapters are called {whole}: give their rows names")
            found[whole] = study.options | given | row.options | {"data": data, "seed": seed, "out": str(Path(given["out"]) / whole)}
            try:
                split(found[whole], *RECIPE)
            except ValueError as error:
                raise ValueError(f"{whole}: {error}") from None
    return found


def _name(study: StudyFile, row: Row) -> str:
    """ValueError for a row that is no single run on the data of all."""
    names = names_of(study, row)
    name = row.name or next(iter(names.values())).rpartition(" on ")[0] or next(iter(names.values()))
    if row.starts_from is not None or len(row.stages) > 1 or row.stages[0] != (None, {}):
        raise ValueError(f"{study.path}: row {name!r} goes on from another run: that takes `fastpeft study`")
    if row.data is not None and len(study.data) > 1:
        raise ValueError(f"{study.path}: row {name!r} has data of its own, and adapters of one run share theirs: that takes a study")
    return name


def _data_of(study: StudyFile) -> Any:
    """The data that the file names; ValueError where it does not name one."""
    folders = {name: reading.get("data") for name, reading in study.data.items()}
    if len(folders) != 1 or not (folder := next(iter(folders.values()))):
        raise ValueError(f"--data is missing: give a data folder ({study.path} names {', '.join(folders)})")
    return folder


def train_file(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Train the adapters of a file, each in ``given["out"]``/NAME; returns {"adapters": {name: summary}, "failed": {name: error}, "out"}
    and leaves adapters.json, with what became of each, and comparison.html there."""
    from fastpeft.files import locked, write_json, write_text
    from fastpeft.report.compare import comparison
    from fastpeft.runs.adapters import train_adapters

    out, runs = Path(given["out"]), adapters_of(path, given)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        together = train_adapters(runs, progress=given.get("progress", True))
        told = {name: {key: together.summaries[name][key] for key in TOLD} for name in runs if name in together.summaries}
        write_json(out / FILE, {"adapters": told, "failed": together.failed})
        if len(told) > 1:
            write_text(out / PAGE, comparison([out / name for name in told]))
    return {"adapters": {name: together.summaries[name] for name in told}, "failed": together.failed, "out": str(out)}


def shapes_of(path: str | Path, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `fastpeft estimate` needs to know of each adapter, by its name: ``given``, with what the file says of it in its place. Each
    seed is an adapter."""
    found = adapters_of(path, {"data": ".", "out": "."})
    return {name: dict(given) | {k: v for k, v in options.items() if k in given} for name, options in found.items()}
