"""Comparison page of several runs: what each cost and how it scored, side by side, and where their settings differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.files import write_text
from fastpeft.report.charts import curve, line_chart, mapping, number
from fastpeft.report.comparison_charts import bar_chart
from fastpeft.report.report import read_metrics, read_summary, settings_of, template, write_report

COLUMNS = (  # heading, where it is in a summary, and the filter that puts it into words
    ("Trained", ("parameters", "trainable"), "count"),
    ("of all", ("parameters", "percent"), "percentage"),
    ("Open", ("eval", "open"), "percent"),
    ("Closed", ("eval", "closed"), "percent"),
    ("All", ("eval", "global"), "percent"),
    ("Loss, last", ("loss_last",), "short"),
    ("Work per sample", ("flops_per_sample",), "flops"),
    ("Saved for backward", ("saved_bytes_per_step",), "bytes"),
    ("Peak memory", ("peak_memory_bytes",), "bytes"),
    ("Samples/s", ("steady_samples_per_second",), "short"),
    ("Time in steps", ("seconds",), "time"),
)


def write_reports(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """One run: its report.html again (at ``out``). Several: a page that compares them, ``out`` or comparison.html here. Returns its path;
    ValueError names a folder that holds no run."""
    if len(runs) == 1:
        return write_report(runs[0], out)
    page = Path(out or "comparison.html")
    write_text(page, comparison(list(map(Path, runs))))
    return page


def comparison(folders: Sequence[Path]) -> str:
    """The page. Runs are called by as much of their path as tells them apart."""
    names = _names(folders)
    summaries = [read_summary(folder) for folder in folders]
    losses = [(name, curve(read_metrics(folder / "metrics.jsonl"), "loss", 1)) for name, folder in zip(names, folders)]
    drawn = [line_chart("Loss", "", losses, smooth=True, zero=False, width=920, height=280), _accuracies(names, summaries)]
    values = [[_value(summary, place) for _, place, _ in COLUMNS] for summary in summaries]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] is not None for row in values)]
    plans = [str(summary.get("plan") or "") for summary in summaries]
    rows = [(name, plan, [(row[i], COLUMNS[i][2]) for i in shown]) for name, plan, row in zip(names, plans, values)]
    page = {"titles": [COLUMNS[i][0] for i in shown], "rows": rows, "charts": [chart for chart in drawn if chart]}
    return template("comparison.html.j2").render(page | _differences(names, summaries))


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.absolute().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-n:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({i})" for i, folder in enumerate(folders, 1)]  # a run beside itself


def _value(summary: dict[str, Any], place: tuple[str, ...]) -> float | None:
    for name in place:
        summary = mapping(summary).get(name)
    return number(summary)


def _accuracies(names: list[str], summaries: list[dict[str, Any]]) -> dict | None:
    kinds = ("open", "closed", "global")
    values = [(kind, [_value(s, ("eval", kind)) for s in summaries]) for kind in kinds]
    scored = [(kind, [None if v is None else 100 * v for v in row]) for kind, row in values if any(v is not None for v in row)]
    return bar_chart("Accuracy", "%", names, scored)


def _differences(names: list[str], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings as a table: those in which the runs differ, and those they share."""
    each = [dict(settings_of(summary)) for summary in summaries]
    keys = list(dict.fromkeys(key for one in each for key in one))
    rows = [(key, [one.get(key, "") for one in each]) for key in keys]
    return {
        "names": names,
        "differing": [(key, values) for key, values in rows if len(set(values)) > 1],
        "shared": [(key, values[0]) for key, values in rows if len(set(values)) == 1],
    }
