"""Study file: the YAML that says which runs a study has, and what its table shows.

    title: "MILE, table 1"
    recipe: ../mile.yaml                 # options of every row, those of `fastpeft train`; `options:` adds to them
    data: {slake: {}}                    # data sets by name; the folder here (data: DIR), or on the command line
    seeds: [0, 1, 2]
    rows:
      - {plan: F/LoRA/LoRA, rank: 4}                           # any option of `fastpeft train`
      - {name: full, plan: T/T/T}
      - {plan: T/T/T, from: full, data: instructions}          # goes on from another row's adapter
      - {plan: T/T/T, stages: [slake, {data: instructions, epochs: 10}]}
    score_on: [slake, vqa-rad]           # data sets whose test splits are asked (default: each row's own)
    columns: [rank, trainable, percent, open, closed, global]
    figures: [loss, percent]
    tiny:                                # what `--scale tiny` puts over the rest: options, others instead, data sets, a choice of rows
      {options: {steps: 40}, instead: {model: {miss: miss-tiny}}, data: {slake: {made: phantoms}}}

A row runs on every data set it names (``data: [a, b]``; default: all of them) and with every seed. A recipe's ``stages:`` are those of rows
that have none of their own, whose options stand over the last one's: what they name as data are data sets of the study. A stage with
another plan than the one before goes on from the merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fastpeft.documents import parse_yaml
from fastpeft.options import checked, fields
from fastpeft.runs.options import RECIPE, DataOptions, GenerationOptions, read_yaml

KEYS = ("title", "recipe", "options", "data", "seeds", "rows", "score_on", "generation", "columns", "figures", "tiny", "notes")
ROW_KEYS = ("name", "data", "from", "stages", "seeds", "paper")
TINY_KEYS = ("instead", "options", "data", "seeds", "score_on", "generation", "rows")
NOT_OF_A_ROW = ("data", "out", "resume", "seed", "feature_cache_dir", "init_adapter", "progress")  # the study says these


@dataclass(frozen=True)
class Row:
    """A row of the table before data sets and seeds: ``stages`` are (data set or None for the row's, options)."""

    name: str | None
    options: dict[str, Any]
    data: tuple[str, ...] | None = None
    starts_from: str | None = None
    stages: tuple[tuple[str | None, dict[str, Any]], ...] = ((None, {}),)
    seeds: tuple[int, ...] | None = None
    paper: dict[str, float] = field(default_factory=dict)

    def with_others(self, instead: Mapping[str, Mapping]) -> Row:
        """The same with other values of options in place of these: {option: {value: another}}."""
        stages = tuple((data, _with_others(options, instead)) for data, options in self.stages)
        return replace(self, options=_with_others(self.options, instead), stages=stages)


def _with_others(options: dict[str, Any], instead: Mapping[str, Mapping]) -> dict[str, Any]:
    return options | {name: others.get(options[name], options[name]) for name, others in instead.items() if name in options}


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it, its scale chosen. ``data``: options of reading by the data set's name; "made": drawn data."""

    path: Path
    title: str
    options: dict[str, Any]
    data: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    score_on: tuple[str, ...]
    generation: dict[str, Any]
    columns: tuple[str, ...] | None
    figures: tuple[str, ...]
    notes: tuple[str, ...]
    scale: str


def read_study(path: str | Path, scale: str = "full") -> StudyFile:
    """The study in a YAML file. ``scale``: "full", or "tiny", its ``tiny:`` block over the rest. ValueError names the file and what is
    wrong in it."""
    path = Path(path)
    content = _load(path)
    _known(content, KEYS, f"{path}")
    if scale not in ("full", "tiny"):
        raise ValueError(f"scale must be full or tiny, not {scale!r}")
    tiny = _mapping(content.get("tiny"), f"{path}: tiny") if scale == "tiny" else {}
    if scale == "tiny" and not tiny:
        raise ValueError(f"{path} has no tiny: block, so it runs at full scale alone")
    _known(tiny, TINY_KEYS, f"{path}: tiny")
    options = read_yaml(path.parent / _text(content["recipe"], f"{path}: recipe")) if content.get("recipe") else {}
    options |= _options(content.get("options"), f"{path}: options")
    over = _options(tiny.get("options"), f"{path}: tiny: options")
    if "stages" in over:
        raise ValueError(f"{path}: tiny: options: stages are a row's, or the recipe's: leave them out")
    stages = list(options.pop("stages", None) or ())
    rows = [_row(entry, f"{path}: row {at}", set(over), stages) for at, entry in enumerate(_list(content["rows"], f"{path}: rows"), 1)]
    instead = {k: _mapping(v, f"{path}: tiny: instead") for k, v in _mapping(tiny.get("instead"), f"{path}: tiny: instead").items()}
    _known(instead, [f.name for cls in RECIPE for f in fields(cls)], f"{path}: tiny: instead")
    rows = [row.with_others(instead) for row in rows]
    if kept := tiny.get("rows"):
        rows = _chosen(rows, _list(kept, f"{path}: tiny: rows"), f"{path}: tiny: rows")
    data = _data_sets(content, tiny, path)
    asked = _texts(tiny.get("score_on", content.get("score_on", [])), f"{path}: score_on")
    generation = _mapping(tiny.get("generation", content.get("generation")), f"{path}: generation")
    study = StudyFile(
        path=path,
        title=_text(content.get("title", path.stem), f"{path}: title"),
        options=_with_others(options, instead) | over,
        data=data,
        seeds=_seeds(tiny.get("seeds", content.get("seeds", [0])), f"{path}: seeds"),
        rows=tuple(rows),
        score_on=asked,
        generation=checked(generation, f"{path}: generation", GenerationOptions),
        columns=_texts(content["columns"], f"{path}: columns") if content.get("columns") else None,
        figures=_texts(content.get("figures", ["loss", "percent"]), f"{path}: figures"),
        notes=_texts(content.get("notes", []), f"{path}: notes"),
        scale=scale,
    )
    _check_names(study)
    return study


def _check_names(study: StudyFile) -> None:
    """ValueError for an option of generation or a data set that there is not."""
    _known(study.generation, [f.name for f in fields(GenerationOptions)], f"{study.path}: generation")
    for names in (study.score_on, *(row.data or () for row in study.rows), *((d for d, _ in row.stages if d) for row in study.rows)):
        if unknown := [name for name in names if name not in study.data]:
            raise ValueError(f"{study.path}: there is no data set {unknown[0]!r}; data has {', '.join(study.data)}")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content.get("rows"):
        raise ValueError(f"{path} is no study: it needs rows, such as 'rows: [{{plan: F/LoRA/LoRA}}]'")
    return content


def _data_sets(content: dict[str, Any], tiny: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    data = _mapping(content.get("data"), f"{path}: data") or {"data": {}}
    data = {str(name): _data(given, f"{path}: data: {name}") for name, given in data.items()}
    for name, given in _mapping(tiny.get("data"), f"{path}: tiny: data").items():
        if name not in data:
            raise ValueError(f"{path}: tiny: data: there is no data set {name!r}; data has {', '.join(data)}")
        data[name] = _data(given, f"{path}: tiny: data: {name}")
    return data


def data_folders(path: str | Path, given: list[str]) -> dict[str, str]:
    """Folders by data set, of NAME=DIR as the command line has them, or DIR alone for a study of one data set."""
    found = {}
    for entry in given:
        name, equals, folder = entry.partition("=")
        if not equals:
            names = list(read_study(path).data)
            if len(names) != 1:
                raise ValueError(f"--data {entry}: {path} has several data sets ({', '.join(names)}): write --data NAME={entry}")
            name, folder = names[0], entry
        if name in found:
            raise ValueError(f"--data {name} is there twice")
        found[name] = folder
    return found


def _row(entry: Any, where: str, over: set[str], of_recipe: list) -> Row:
    """``over``: options that the tiny block sets for all rows; a row's own are then left out. ``of_recipe``: the recipe's stages."""
    entry = _mapping(entry, where)
    options = _options({k: v for k, v in entry.items() if k not in ROW_KEYS}, where)
    kept = over - {"plan", "rank"}  # a tiny study has the same plans
    data = entry.get("data")
    paper = _mapping(entry.get("paper"), f"{where}: paper")
    return Row(
        name=None if entry.get("name") is None else _text(entry["name"], f"{where}: name"),
        options={k: v for k, v in options.items() if k not in kept},
        data=None if data is None else tuple(map(str, [data] if isinstance(data, str) else _list(data, f"{where}: data"))),
        starts_from=None if entry.get("from") is None else _text(entry["from"], f"{where}: from"),
        stages=_stages(entry, options, of_recipe, kept, f"{where}: stages"),
        seeds=None if entry.get("seeds") is None else _seeds(entry["seeds"], f"{where}: seeds"),
        paper={str(k): v for k, v in paper.items()},
    )


def _stages(entry: dict[str, Any], own: dict[str, Any], of_recipe: list, kept: set[str], where: str):
    """(data set or None, options without ``kept``) of each of a row's stages, or of the recipe's. ``own``: the row's options."""
    given, stages = _list(entry.get("stages", of_recipe or [{}]), where), []
    for at, stage in enumerate(given, 1):
        stage = {"data": stage} if isinstance(stage, str) else dict(_mapping(stage, where))
        if "stages" not in entry and at == len(given):  # the row is its last stage
            stage = {k: v for k, v in stage.items() if k not in own and not (k == "data" and "data" in entry)}
        name = stage.pop("data", None)
        stages.append((None if name is None else str(name), {k: v for k, v in _options(stage, where).items() if k not in kept}))
    return tuple(stages)


def _chosen(rows: list[Row], names: list, where: str) -> list[Row]:
    """The rows of these names, or of these numbers, counted from 1."""
    found = [row for at, row in enumerate(rows, 1) if row.name in names or at in names]
    known = {row.name for row in found} | set(range(1, len(rows) + 1))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{where}: there is no row {unknown[0]!r}")
    return found


def _options(given: Any, where: str) -> dict[str, Any]:
    found = checked(_mapping(given, where), where, *RECIPE)
    _known(found, [f.name for cls in RECIPE for f in fields(cls)], where)
    if own := [name for name in NOT_OF_A_ROW if name in found]:
        raise ValueError(f"{where}: {own[0]} is the study's to say; leave it out (data sets are named under data:, seeds under seeds:)")
    return found


def _data(given: Any, where: str) -> dict[str, Any]:
    """Options of reading, or {"made": kind, ...} of data that are drawn."""
    given = {"data": given} if isinstance(given, str) else _mapping(given, where)
    if "made" in given:
        return dict(given)
    names = {f.name for f in fields(DataOptions)}
    found = checked(given, where, *RECIPE)
    _known(found, sorted(names | {f.name for cls in RECIPE for f in fields(cls)}), where)
    return found


def _known(given: Mapping[str, Any], names, where: str) -> None:
    if unknown := [str(name) for name in given if name not in names]:
        raise ValueError(f"{where}: unknown {unknown[0]!r}; known: {', '.join(names)}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping, not {value!r}")
    return value


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, not {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, not {value!r} (YAML reads on, yes and numbers as other things: put it in quotes)")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(entry, where) for entry in _list(value, where))


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = _list(value, where)
    if not seeds or any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where} must be different whole numbers of 0 or more, such as [0, 1, 2]; not {value!r}")
    return tuple(seeds)
