"""What a study leaves: results.json, a table per scored data set (Markdown, CSV), its figures (SVG) and study.html with all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastpeft.files import write_json, write_text
from fastpeft.report.report import template
from fastpeft.study.figures import figures_of
from fastpeft.study.file import StudyFile
from fastpeft.study.jobs import Job
from fastpeft.study.table import DEFAULT, Table, table_of

Results = list[tuple[Job, dict[str, Any] | None]]


def write_results(study: StudyFile, results: Results, failed: dict[str, str], out: Path, seconds: float) -> dict[str, Any]:
    """Write the files; returns what `fastpeft study --json` prints."""
    done = [(job, result) for job, result in results if result is not None]
    scored = [*study.score_on] or [None]
    names = study.columns or DEFAULT
    tables = [
        table_of(study.title + (f", scored on {name}" if len(scored) > 1 else ""), names, results, failed, name, study.scale == "full")
        for name in scored
    ]
    saving = features_shared(done)
    notes = list(study.notes)
    if study.scale == "tiny":
        notes.insert(0, "At tiny scale: small models on small, drawn data; the numbers say nothing about the paper's.")
    if saving["computed"] or saving["loaded"]:
        notes.append(saving["told"])
    charts = figures_of(study.figures, done)
    files = []
    for name, table in zip(scored, tables):
        stem = "table" if len(scored) == 1 else f"table-{name}"
        files += [_write(out / f"{stem}.md", table.markdown() + "".join(f"\n{note}\n" for note in notes))]
        files += [_write(out / f"{stem}.csv", table.csv())]
    for chart in charts:
        stem = re.sub(r"[^a-z0-9]+", "-", chart["title"].lower()).strip("-")
        files.append(_write(out / "figures" / f"{stem}.svg", _template("figure.svg.j2").render(c=chart)))
    page = _template("study.html.j2").render(title=study.title, tables=[_shown(table) for table in tables], charts=charts, notes=notes)
    files.append(_write(out / "study.html", page))
    summary = {
        "title": study.title,
        "scale": study.scale,
        "rows": [_row(job, result, failed) for job, result in results],
        "failed": failed,
        "features": saving,
        "seconds": seconds,
        "out": str(out),
        "files": files,
        "notes": notes,
    }
    write_json(out / "results.json", summary)
    return summary


def features_shared(done: list[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """How many images (or questions) were encoded in all, and how many that one job had encoded another one loaded."""
    used = [result["features"] for _, result in done if result.get("features")]
    computed, loaded = sum(f["computed"] for f in used), sum(f["loaded"] for f in used)
    reused = sum(f["reused"] for f in used)
    told = f"Frozen features: encoded {computed:,} times in all; {loaded:,} were loaded that another row had encoded; "
    told += f"reused {reused:,} times."
    return {"computed": computed, "loaded": loaded, "reused": reused, "rows": len(used), "told": told}


def _row(job: Job, result: dict[str, Any] | None, failed: dict[str, str]) -> dict[str, Any]:
    about = {"row": job.row, "data": job.data, "seed": job.seed, "folder": job.folder}
    return about | ({"error": failed.get(job.name, "not run")} if result is None else {k: v for k, v in result.items() if k != "job"})


def _shown(table: Table) -> dict[str, Any]:
    return {"caption": table.caption, "head": table.head(), "lines": table.cells()}


def _template(name: str):
    return template(name, Path(__file__).parent)


def _write(path: Path, text: str) -> str:
    write_text(path, text)
    return str(path)
