"""Tables of a summary's free-text accuracies and text metrics; report.html.j2 lays them out."""

from __future__ import annotations

from fastpeft.report.charts import mapping, number, short

MEASURES = {
    "exact": "Exact", "contains": "Contains", "precision": "Token precision", "recall": "Token recall", "f1": "Token F1",
    "candidate": "Candidate", "yes_no": "Yes or no",
}  # fmt: skip
KINDS = ("open", "closed", "global")


def free_text(summary: dict) -> list[tuple[str, list[float | None]]]:
    """(measure, its open, closed and global accuracy) of each measure with a number."""
    found = mapping(mapping(summary.get("eval")).get("free_text"))
    rows = [(title, [number(mapping(found.get(name)).get(kind)) for kind in KINDS]) for name, title in MEASURES.items()]
    return [(title, cells) for title, cells in rows if any(cell is not None for cell in cells)]


def text_metrics(summary: dict) -> list[tuple[str, str, str]]:
    """(metric, its numbers, its setting or what it lacks) of each metric."""
    found = mapping(mapping(summary.get("eval")).get("metrics"))
    rows = []
    for name, value in found.items():
        if name == "missing":
            continue
        if number(value) is not None:
            rows.append((f"Mean {name}", short(value), "of a response, by the model's tokenizer"))
            continue
        numbers = {key: v for key, v in mapping(value).items() if key in ("score", "precision", "recall", "f1") and number(v) is not None}
        words = ", ".join(f"{v:.4f}" if key == "score" else f"{key} {v:.4f}" for key, v in numbers.items())
        setting = ", ".join(f"{key} {_said(v)}" for key, v in mapping(value).items() if key not in numbers)
        rows.append((str(name), words, setting))
    return rows + [(str(name), "", str(reason)) for name, reason in mapping(found.get("missing")).items()]


def sources(summary: dict) -> list[tuple[str, str, str]]:
    """(data set, its samples, its last loss) of a run that mixes several."""
    found = mapping(summary.get("sources"))
    return [
        (str(name), f"{number(mapping(of).get('samples')) or 0:,.0f}", short(mapping(of).get("loss_last"))) for name, of in found.items()
    ]


def _said(value) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
