"""HTML report of a run: one self-contained file, from the files in the run's folder.

    write_report("runs/a")                      # after training, which does so itself
    fastpeft report runs/a                      # again, from the same files

Reads summary.json, and metrics.jsonl and predictions.json where they are; a piece whose data is missing is left out. This file turns
data into numbers, paths and words; report.html.j2 lays them out and escapes every string.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2

from fastpeft.data.images import load_image
from fastpeft.documents import parse_json
from fastpeft.files import write_text
from fastpeft.report.charts import charts, mapping, number, routing, short
from fastpeft.report.scores import free_text, sources, text_metrics

EXAMPLES = 12
THUMBNAIL = 200  # pixels, the longer side
LOOKS = 500  # images tried for the examples, where many are gone


def write_report(out: str | Path, page: str | Path | None = None) -> Path:
    """Write the report of the run in ``out`` to ``page`` (``out/report.html``), whole or not at all; returns its path.

    ValueError naming the file (and line): summary.json missing, or JSON that can't be read. A torn last line of metrics.jsonl, which
    a killed run leaves, is skipped.
    """
    out = Path(out)
    page = out / "report.html" if page is None else Path(page)
    write_text(page, _page(out))
    return page


@functools.cache
def template(name: str = "report.html.j2", folder: Path | None = None) -> jinja2.Template:
    """A page's template, of ``folder`` or of this room, with this room's filters."""
    house = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*filter(None, [folder]), Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # summary.eval.open is nothing where there is no eval; the filters turn nothing into ""
        trim_blocks=True,
        lstrip_blocks=True,
    )
    house.filters |= {"si": _si, "short": short, "count": _count, "percent": _percent, "points": _points, "time": _time, "text": _text}
    return house.get_template(name)


def _page(out: Path) -> str:
    summary = read_summary(out)
    rows = read_metrics(out / "metrics.jsonl")
    predictions = _load(out / "predictions.json", list) if (out / "predictions.json").is_file() else []
    predictions = [p for p in predictions if isinstance(p, dict)]
    parts = mapping(summary.get("parts"))
    return template().render(
        window=_window(summary),
        answers=_answers(predictions),
        settings=settings_of(summary),
        backward=mapping(parts.get("backward")).get("flops_per_sample"),
        other=mapping(parts.get("other")).get("flops_per_sample"),
        summary={key: mapping(value) if key in ("eval", "parameters", "versions", "estimate") else value for key, value in summary.items()},
        charts=charts(rows),
        routing=routing(summary),
        parts=_parts(summary),
        free_text=free_text(summary),
        filled=_text(mapping(mapping(summary.get("eval")).get("filled_by")).get("open")),
        text_metrics=text_metrics(summary),
        sources=sources(summary),
        examples=_examples(predictions),
        right=sum(p.get("correct") is True for p in predictions),
        asked=len(predictions),
        notes=[note for note in summary.get("notes") or [] if isinstance(note, str)] if isinstance(summary.get("notes"), list) else [],
    )


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json of the run in ``out``. ValueError where there is none, or it can't be read."""
    return _load(out / "summary.json", dict)


# reading ------------------------------------------------------------------------------------------------------------------------


def _load(path: Path, kind: type) -> Any:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder that `fastpeft train --out` wrote, after it has ended") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, not {type(value).__name__}")
    return value


def read_metrics(path: Path) -> list[dict]:
    """Rows by rising step; of a step written twice the later one. ValueError names a bad line, unless it is the last."""
    if not path.is_file():
        return []
    rows: dict[float, dict] = {}
    lines = path.read_bytes().rstrip().split(b"\n")
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            step = number(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if step is not None:
            rows[step] = row
        elif at < len(lines):
            raise ValueError(f"{path}, line {at}: not a JSON object with a step: {line[:60].decode('utf-8', 'replace')!r}")
    return [rows[step] for step in sorted(rows)]


def _text(value, limit: int = 300) -> str:
    text = value if isinstance(value, str) else "" if number(value) is None else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# numbers as words: "" for what is no number -------------------------------------------------------------------------------------


def _si(value, unit: str = "") -> str:
    """1234567890, "B" -> "1.23 GB": three digits, powers of 1000."""
    if (value := number(value)) is None:
        return ""
    power = min(5, int(math.log10(abs(value)) / 3)) if abs(value) >= 1 else 0
    return f"{short(value / 1000**power)} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}".rstrip()


def _count(value) -> str:
    return "" if number(value) is None else f"{value:,.0f}"


def _percent(fraction) -> str:
    return "" if number(fraction) is None else f"{100 * fraction:.1f} %"


def _points(fraction, other) -> str:
    return "" if number(fraction) is None or number(other) is None else f"{100 * (fraction - other):+.1f}"


def _time(seconds) -> str:
    if (seconds := number(seconds)) is None or seconds < 60:
        return short(seconds, " s")
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# words for the page -----------------------------------------------------------------------------------------------------------


def _window(summary: dict) -> dict[str, str]:
    """Which steps the first and the last loss are means of."""
    steps = number(summary.get("loss_window")) or 1
    return {end: f"the {end} {steps:.0f} steps" if steps > 1 else f"the {end} step" for end in ("first", "last")}


def _answers(predictions: list[dict], most: int = 6) -> list[tuple[str, float, float, float]]:
    """The answers given most: (answer, share of all given, share of the data's, share right); [] where there is nothing to count."""
    rows = [(_text(p.get("prediction"), 60), _text(p.get("answer"), 60), p.get("correct") is True) for p in predictions]
    given, true = Counter(row[0].casefold() for row in rows), Counter(row[1].casefold() for row in rows)
    if not rows or len(given) > 0.8 * len(rows):  # sentences, each its own
        return []
    right = Counter(row[0].casefold() for row in rows if row[2])
    return [(a, n / len(rows), true[a] / len(rows), right[a] / n) for a, n in given.most_common(most)]


def settings_of(summary: dict) -> list[tuple[str, str]]:
    """What reproduces the run, beside its command: names and values."""
    config, of = mapping(summary.get("config")), []
    for one in summary.get("data") or [] if isinstance(summary.get("data"), list) else []:
        of.append(("Data", _text(mapping(one).get("path"))))
    counts = {what: _count(summary.get(f"samples_to_{what}")) for what in ("train", "score")}
    of += [("Samples", ", ".join(f"{count} to {what}" for what, count in counts.items() if count))]
    of += [("Model", _text(summary.get("model"))), ("Plan", _text(summary.get("plan")))]
    for part, methods in mapping(summary.get("treatments")).items():
        for method in methods if isinstance(methods, list) else []:
            for name, given in mapping(method).items():
                told = ", ".join(f"{key} {value}" for key, value in mapping(given).items() if value not in (None, [], ()))
                of += [(f"{name} of {part}", _text(told))] if told else []
    names = {"learning_rate": "Learning rate", "base_learning_rate": "of the base's weights", "min_learning_rate": "at the end"}
    names |= {"warmup": "Warm-up", "weight_decay": "Weight decay", "beta1": "AdamW's first beta", "beta2": "AdamW's second beta"}
    names |= {"max_grad_norm": "Gradient norm at most", "batch_size": "Batch size", "gradient_accumulation": "Batches per step"}
    names |= {"questions_per_image": "Questions per image", "seed": "Seed"}
    of += [(words, _text(config.get(name, summary.get(name)))) for name, words in names.items()]
    of += [("Precision", _text(summary.get("dtype"))), ("Device", _text(summary.get("device")))]
    return [(_text(name, 60), value) for name, value in of if value]


# by part ------------------------------------------------------------------------------------------------------------------------


def _parts(summary: dict) -> dict | None:
    """Cells of the table by part: words, and a bar as long as the part's share of its column."""
    counts, costs = mapping(mapping(summary.get("parameters")).get("parts")), mapping(summary.get("parts"))
    measures = [
        ("Trained parameters", counts, "trainable", _count),
        ("Saved for backward", costs, "saved_bytes", lambda v: _si(v, "B")),
        ("Work per sample, forward", costs, "flops_per_sample", lambda v: _si(v, "F")),
    ]
    names = [name for name in dict.fromkeys([*counts, *costs]) if name not in ("backward", "other")]  # no parts
    columns = []
    for title, source, key, words in measures:
        values = [number(mapping(source.get(name)).get(key)) for name in names]
        total = sum(v for v in values if v and v > 0)
        if any(v is not None for v in values):
            shares = [max(0.0, v or 0) / total if total else 0.0 for v in values]
            columns.append((title, [(words(v), round(100 * s, 1)) for v, s in zip(values, shares)]))
    rows = [(_text(name, 40), [cells[i] for _, cells in columns]) for i, name in enumerate(names)]
    return {"titles": [title for title, _ in columns], "rows": rows} if columns else None


# examples -----------------------------------------------------------------------------------------------------------------------


def _examples(predictions: list[dict]) -> list[dict]:
    """Up to EXAMPLES with an image that can be read: right and wrong, open and closed in turn, each image once; the same for the same
    predictions, in any order."""

    def shuffled(row: dict) -> bytes:
        return hashlib.sha256(f"{row.get('qid')}\0{row.get('question')}".encode("utf-8", "replace")).digest()

    groups: dict[tuple, list[dict]] = {}
    for row in sorted(predictions, key=shuffled):
        if isinstance(row.get("image"), str):
            groups.setdefault((row.get("correct") is True, _text(row.get("answer_type"))), []).append(row)
    chosen, seen = [], set()
    for row in (row for turn in zip_longest(*(groups[key] for key in sorted(groups, reverse=True))) for row in turn if row):
        if len(chosen) == EXAMPLES or len(seen) == LOOKS:
            break
        if row["image"] not in seen:
            seen.add(row["image"])
            try:
                picture = _thumbnail(row["image"])
            except (ValueError, OSError):
                continue
            fields = {key: _text(row.get(key)) for key in ("img_name", "question", "answer", "prediction", "answer_type")}
            chosen.append(fields | {"picture": picture, "correct": row.get("correct") is True})
    return sorted(chosen, key=lambda e: not e["correct"])


def _thumbnail(path: str) -> str:
    image = load_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
