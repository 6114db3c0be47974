"""The table of a study: a line for each row, means and spread over its seeds, as Markdown and CSV.

Percentages follow the papers: ``percent`` of base + adapters (MILE), ``percent_of_base`` (LayerNorm), ``peft_percent`` of the base of the
parts that a method other than F and T adapts (LayerNorm, table 1). Spread is the standard deviation of a sample (n - 1).
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastpeft.study.jobs import Job

Result = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """title; value(job, result, scores) -> number, text or None. kind: how a number is written: "percent" of a fraction, "percents" of a
    number that is a percentage, "count", "gigabytes", "megabytes", "seconds" or "number". paper: the name of the paper's value beside it,
    in the table's unit."""

    title: str
    value: Callable[[Job, Result, dict], Any]
    kind: str = "text"
    paper: str = ""


def _score(name: str) -> Callable[[Job, Result, dict], Any]:
    return lambda job, result, scores: scores.get(name)


def _metric(metric: str, field: str | None = None) -> Callable[[Job, Result, dict], Any]:
    def value(job: Job, result: Result, scores: dict) -> Any:
        found = (scores.get("metrics") or {}).get(metric)
        return found.get(field) if field and isinstance(found, dict) else found if not isinstance(found, dict) else None

    return value


def _scienceqa(name: str) -> Callable[[Job, Result, dict], Any]:
    return lambda job, result, scores: (scores.get("scienceqa") or {}).get(name)


def _captions(name: str) -> Callable[[Job, Result, dict], Any]:
    return lambda job, result, scores: (scores.get("captions") or {}).get(name)


def _mmlu_of_base(job: Job, result: Result, scores: dict) -> float | None:
    return ((scores.get("mmlu") or {}).get("base") or {}).get("task_mean")


def _mmlu(name: str) -> Callable[[Job, Result, dict], Any]:
    return lambda job, result, scores: (scores.get("mmlu") or {}).get(name)


def adapted_parts(result: Result) -> dict[str, dict[str, Any]]:
    """Parameters of the parts that the plan neither freezes nor trains whole, by name."""
    treatments = dict(zip(result["parameters"]["parts"], result["plan"].split("/")))
    return {name: counts for name, counts in result["parameters"]["parts"].items() if treatments[name] not in ("F", "T")}


def _peft(job: Job, result: Result, scores: dict) -> int | None:
    return sum(part["trainable"] for part in adapted_parts(result).values()) or None


def _peft_percent(job: Job, result: Result, scores: dict) -> float | None:
    parts = adapted_parts(result).values()
    return 100 * sum(part["trainable"] for part in parts) / max(1, sum(part["base"] for part in parts)) if parts else None


def _peft_by_part(job: Job, result: Result, scores: dict) -> str | None:
    return ", ".join(f"{name} {part['trainable']:,}" for name, part in adapted_parts(result).items()) or None


COLUMNS: dict[str, Column] = {
    "rank": Column("r", lambda job, result, scores: job.stages[-1].get("rank")),
    "data": Column("Data", lambda job, result, scores: job.data),
    "from": Column("From", lambda job, result, scores: job.starts_from and job.starts_from.rpartition(", seed ")[0]),
    "stages": Column("Stages", lambda job, result, scores: len(job.stages)),
    "model": Column("Model", lambda job, result, scores: result["model"]),
    "trainable": Column("Trainable", lambda job, result, scores: result["parameters"]["trainable"], "count", "trainable"),
    "percent": Column("#Params, %", lambda job, result, scores: result["parameters"]["percent"], "percents", "percent"),
    "percent_of_base": Column(
        "#Params of base, %", lambda job, result, scores: result["parameters"]["percent_of_base"], "percents", "percent"
    ),
    "peft": Column("PEFT params", _peft, "count", "peft"),
    "peft_percent": Column("#PEFT params, %", _peft_percent, "percents", "peft_percent"),
    "peft_by_part": Column("PEFT params by part", _peft_by_part),
    "adapter_bytes": Column("Adapter, MB", lambda job, result, scores: result["adapter_bytes"], "megabytes"),
    "memory": Column("Memory computed, GB", lambda job, result, scores: (result["memory"] or {}).get("peak_bytes"), "gigabytes", "memory"),
    "memory_measured": Column("Memory measured, GB", lambda job, result, scores: result["peak_memory_bytes"], "gigabytes"),
    "seconds": Column("Time, s", lambda job, result, scores: result["seconds"], "seconds"),
    "loss": Column("Loss", lambda job, result, scores: result["loss_last"], "number"),
    "open": Column("Open, %", _score("open"), "percent", "open"),
    "closed": Column("Closed, %", _score("closed"), "percent", "closed"),
    "global": Column("Global, %", _score("global"), "percent", "global"),
    "bertscore_precision": Column("BERTScore P, %", _metric("BERTScore", "precision"), "percent"),
    "bertscore_recall": Column("BERTScore R, %", _metric("BERTScore", "recall"), "percent", "bertscore_recall"),
    "bertscore_f1": Column("BERTScore F1, %", _metric("BERTScore", "f1"), "percent"),
    "meteor": Column("METEOR, %", _metric("METEOR", "score"), "percent", "meteor"),
    "rouge_recall": Column("ROUGE-L R, %", _metric("ROUGE-L", "recall"), "percent", "rouge_recall"),
    "rouge_precision": Column("ROUGE-L P, %", _metric("ROUGE-L", "precision"), "percent", "rouge_precision"),
    "rouge_f1": Column("ROUGE-L F1, %", _metric("ROUGE-L", "f1"), "percent", "rouge_f1"),
    "tokens": Column("Mean tokens", _metric("tokens"), "number", "tokens"),
}
COLUMNS |= {
    "bleu_4": Column("BLEU-4, %", _captions("BLEU-4"), "percent", "bleu_4"),
    "cider": Column("CIDEr, x 100", _captions("CIDEr"), "percent", "cider"),
    "mmlu": Column("MMLU, %", _mmlu("task_mean"), "percent", "mmlu"),
    "mmlu_base": Column("MMLU of the base, %", _mmlu_of_base, "percent"),
    "mmlu_change": Column("relative change, %", _mmlu("relative_change"), "percent", "mmlu_change"),
    "mmlu_wins": Column("tasks won", _mmlu("wins"), "count"),
    "mmlu_ties": Column("tied", _mmlu("ties"), "count"),
    "mmlu_losses": Column("lost", _mmlu("losses"), "count"),
}
SCIENCEQA = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
COLUMNS |= {name: Column(f"{name}, %", _scienceqa(name), "percent", name) for name in SCIENCEQA}
DEFAULT = (
    "rank",
    "trainable",
    "percent",
    "peft_by_part",
    "adapter_bytes",
    "memory",
    "memory_measured",
    "seconds",
    "open",
    "closed",
    "global",
)
CLOCK = ("memory_measured", "seconds")  # what another run of the same study may have otherwise


def check_columns(names) -> None:
    """ValueError for a column there is not."""
    if unknown := [name for name in names if name not in COLUMNS]:
        raise ValueError(f"there is no column {unknown[0]!r}; there are {', '.join(COLUMNS)}")


@dataclass(frozen=True)
class Cell:
    """mean and spread of a number over seeds (spread None of one), or a text; paper: what the paper has there."""

    kind: str
    mean: Any
    spread: float | None = None
    paper: Any = None

    @property
    def text(self) -> str:
        """As the table shows it."""
        if self.mean is None:
            return "-"
        if self.kind == "text":
            return str(self.mean)
        scale, digits = {"percent": (100, 2), "percents": (1, 3), "count": (1, 0), "gigabytes": (1e-9, 2), "megabytes": (1e-6, 2)}.get(
            self.kind, (1, 1 if self.kind == "seconds" else 3)
        )
        if self.kind == "percents" and 0 < self.mean < 0.01:
            digits = 5
        shown = f"{self.mean * scale:,.{digits}f}"
        return (
            shown
            if self.spread is None or self.kind in ("count", "percents", "megabytes")
            else f"{shown} ± {self.spread * scale:.{digits}f}"
        )


@dataclass(frozen=True)
class Table:
    """names: of columns; heads: their titles; lines: (row's name, parts' treatments, cells by column, note)."""

    caption: str
    parts: tuple[str, ...]
    names: tuple[str, ...]
    lines: list[tuple[str, tuple[str, ...], dict[str, Cell], str]]

    def _paper(self) -> list[str]:
        """Columns beside which the paper has values."""
        return [n for n in self.names if any(cells[n].paper is not None for *_, cells, _ in self.lines if n in cells)]

    def head(self) -> list[str]:
        """Titles of the columns, the paper's values beside ours."""
        beside = self._paper()
        titles = [t for n in self.names for t in (COLUMNS[n].title, *([f"{COLUMNS[n].title}, paper"] if n in beside else []))]
        return ["Row", *self.parts, *titles]

    def cells(self) -> list[list[str]]:
        """The table as text, without its head; a row that failed says why in its first cell."""
        beside, found = self._paper(), []
        for name, plan, cells, note in self.lines:
            line = [name + (f" ({note})" if note else ""), *(plan or [""] * len(self.parts))]
            for n in self.names:
                cell = cells.get(n)
                line.append(cell.text if cell else "")
                if n in beside:
                    line.append("" if cell is None or cell.paper is None else f"{cell.paper:,}")
            found.append(line)
        return found

    def markdown(self) -> str:
        rows = [self.head(), ["---"] * len(self.head()), *([c.replace("|", "\\|") for c in line] for line in self.cells())]
        return f"{self.caption}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    def csv(self) -> str:
        """A line per row: numbers as they are, a column of spreads where there are several seeds, a column of the paper's values."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        spread = [n for n in self.names if any(cells[n].spread is not None for *_, cells, _ in self.lines if n in cells)]
        paper = self._paper()
        more = [f"{n}_spread" for n in spread] + [f"{n}_paper" for n in paper]
        writer.writerow(["row", *self.parts, *self.names, *more, "note"])
        for name, plan, cells, note in self.lines:
            line = [cells[n].mean if n in cells else None for n in self.names]
            line += [cells[n].spread if n in cells else None for n in spread] + [cells[n].paper if n in cells else None for n in paper]
            writer.writerow([name, *(plan or [""] * len(self.parts)), *line, note])
        return file.getvalue()


def table_of(caption: str, names: tuple[str, ...], results: list[tuple[Job, Result | None]], failed: dict[str, str], scored: str | None,
             paper: bool) -> Table:  # fmt: skip
    """``scored``: the data set whose scores it shows (None: each row's own). ``paper``: with the papers' values beside ours."""
    by_row: dict[str, list[tuple[Job, Result | None]]] = {}
    for job, result in results:
        by_row.setdefault(job.row, []).append((job, result))
    found = {tuple(result["parameters"]["parts"]) for _, result in results if result is not None}
    parts = found.pop() if len(found) == 1 else ("plan",)  # models of different parts: the plan as it is written
    lines = []
    for row, runs in by_row.items():
        done = [(job, result) for job, result in runs if result is not None]
        errors = [failed.get(job.name, "not run") for job, result in runs if result is None]
        note = (
            f"failed: {errors[0]}" if errors and not done else f"{len(errors)} of {len(runs)} seeds failed: {errors[0]}" if errors else ""
        )
        plan: tuple[str, ...] = ()
        if done:
            plan = (done[0][1]["plan"],) if parts == ("plan",) else tuple(done[0][1]["plan"].split("/"))
        cells = {name: _cell(COLUMNS[name], done, scored, paper) for name in names} if done else {}
        lines.append((row, plan, cells, note))
    return Table(caption, parts, names, lines)


def _cell(column: Column, done: list[tuple[Job, Result]], scored: str | None, paper: bool) -> Cell:
    values = []
    for job, result in done:
        scores = result["scores"].get(scored) if scored else next(iter(result["scores"].values()), {})
        values.append(column.value(job, result, scores or {}))
    beside = done[0][0].paper.get(column.paper) if paper and column.paper else None
    if column.kind == "text":
        return Cell("text", values[0], None, beside)
    numbers = [value for value in values if value is not None]
    mean = None if not numbers else numbers[0] if len(set(numbers)) == 1 else statistics.fmean(numbers)
    return Cell(column.kind, mean, statistics.stdev(numbers) if len(numbers) > 1 else None, beside)
