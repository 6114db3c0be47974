"""Figures across a study's runs, as charts of fastpeft.report: loss curves, accuracy over what is trained, data sets side by side,
Excitor's gates, similarities and MMLU, LaVIN's routing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpeft.report.charts import curve, line_chart, mapping
from fastpeft.report.comparison_charts import bar_chart, scatter_chart
from fastpeft.report.report import read_metrics
from fastpeft.study.jobs import Job

Done = list[tuple[Job, dict[str, Any]]]


def _first_seeds(done: Done) -> Done:
    """The first seed of each row."""
    found: dict[str, tuple[Job, dict]] = {}
    for job, result in done:
        found.setdefault(job.row, (job, result))
    return list(found.values())


def _score(done: Done, row: str, name: str) -> float | None:
    """A row's mean score over its seeds, in percent, of its first data set."""
    values = [next(iter(result["scores"].values()), {}) for job, result in done if job.row == row]
    values = [100 * v[name] for v in values if (v or {}).get(name) is not None]
    return statistics.fmean(values) if values else None


def loss(done: Done) -> list[dict | None]:
    """Loss of each row's first seed by step, its stages one after another (MILE's figure 3, LayerNorm's figure 3)."""
    series = []
    for job, _ in _first_seeds(done):
        rows, last = [], 0.0
        for at in range(1, len(job.stages) + 1):
            stage = read_metrics(Path(job.folder) / f"stage-{at}" / "metrics.jsonl")
            rows += [row | {"step": last + row["step"]} for row in stage]
            last = rows[-1]["step"] if rows else last
        series.append((job.row, curve(rows, "loss", 1)))
    return [line_chart("Loss of all rows", "", series, smooth=True, zero=False, width=920, height=360)]


def percent(done: Done) -> list[dict | None]:
    """Accuracy over the percentage trained, each row a point."""
    points = []
    for job, result in _first_seeds(done):
        y = _score(done, job.row, "global")
        if y is not None:
            points.append((job.row, result["parameters"]["percent"], y))
    return [scatter_chart("Accuracy over trained parameters", "global, %", "percent of base + adapters, logarithmic", points)]


def data(done: Done) -> list[dict | None]:
    """Accuracy of the same plan on each data set it was trained on (MILE's figure 2)."""
    rows = {job.row: job for job, _ in done}
    forms = list(dict.fromkeys(job.data for job in rows.values()))
    plans: dict[str, dict[str, str]] = {}
    for row, job in rows.items():
        plans.setdefault(row.removesuffix(f" on {job.data}"), {})[job.data] = row
    both = {plan: by for plan, by in plans.items() if len(by) > 1}
    series = [(form, [_score(done, by[form], "global") if form in by else None for by in both.values()]) for form in forms]
    return [bar_chart("Accuracy by training data", "global, %", list(both), series)] if both else []


def gates(done: Done) -> list[dict | None]:
    """Mean size of Excitor's gates by layer."""
    series = []
    for job, result in _first_seeds(done):
        rows = [{"step": int(layer) + 1, "gate": value} for layer, value in mapping(result.get("gates")).items()]
        series.append((job.row, curve(rows, "gate", 1)))
    return [line_chart("Gates of Excitor", "mean of |g|", series, by="layer", width=920, height=280)]


def similarity(done: Done) -> list[dict | None]:
    """Scores of attention with and without Excitor's by layer, of a batch of questions: S, g S_extra, and the change of the softmax."""
    found = []
    for job, result in _first_seeds(done):
        layers = mapping(result.get("similarity"))
        series = []
        for key, name in (("base", "|S|"), ("extra", "|g S extra|"), ("change", "change of attention")):
            series.append((name, curve([{"step": int(layer) + 1, key: v[key]} for layer, v in layers.items()], key, 1)))
        found.append(line_chart(f"Similarity by layer, {job.row}", "mean", series, by="layer", width=920, height=280))
    return found


def routing(done: Done) -> list[dict | None]:
    """The weight of each layer's first expert, by modality (LaVIN's figure 4)."""
    found = []
    for job, result in _first_seeds(done):
        series = []
        for modality, layers in mapping(result.get("routing")).items():
            rows = [{"step": layer, "first": pair[0]} for layer, pair in enumerate(layers, 1)]
            series.append((modality, curve(rows, "first", 1)))
        found.append(line_chart(f"Routing, {job.row}", "weight of the first expert", series, by="layer", width=920, height=280))
    return found


def mmlu(done: Done) -> list[dict | None]:
    """Change of MMLU's mean against the base, relative, and the tasks that are won and lost (Excitor's figure 5)."""
    rows, changes, won, lost = [], [], [], []
    for job, result in _first_seeds(done):
        scored = next((scores["mmlu"] for scores in result["scores"].values() if mapping(scores.get("mmlu")).get("base")), None)
        if scored is not None:
            rows.append(job.row)
            changes.append(None if scored["relative_change"] is None else 100 * scored["relative_change"])
            won.append(float(scored["wins"]))
            lost.append(float(scored["losses"]))
    if not rows:
        return []
    change = bar_chart("MMLU against the base", "relative change of the tasks' mean, %", rows, [("change", changes)])
    return [change, bar_chart("MMLU against the base, by task", "tasks of 57", rows, [("won", won), ("lost", lost)])]


FIGURES: dict[str, Callable[[Done], list[dict | None]]] = {
    "loss": loss,
    "percent": percent,
    "data": data,
    "gates": gates,
    "similarity": similarity,
    "routing": routing,
    "mmlu": mmlu,
}


def figures_of(names: tuple[str, ...], done: Done) -> list[dict]:
    """The charts that have data, each with an id of its own."""
    charts = [chart for name in names for chart in FIGURES[name](done) if chart]
    return [chart | {"id": f"figure-{at}"} for at, chart in enumerate(charts, 1)]
