"""A run's report: one HTML file that needs nothing else, from what training leaves in its folder.

    write_report("runs/a")                      # after training, which does so itself
    python -m fastpeft.train.report runs/a      # again, from the same files

Reads summary.json, and metrics.jsonl and predictions.json where they are; a piece whose data is missing is left out. This file turns
data into numbers, paths and words; report.html.j2 lays them out and escapes every string.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import io
import json
import math
import os
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fastpeft.data.images import load_image

BUCKETS = 240  # of a curve: at most two points each, so that 100,000 steps draw as small as 480
EXAMPLES = 12
THUMBNAIL = 200  # pixels, the longer side
LOOKS = 500  # images tried for the examples, where many are gone


def write_report(out: str | Path) -> Path:
    """Write ``out/report.html`` whole or not at all; returns its path.

    ValueError naming the file (and line): summary.json missing, or JSON that can't be read. A torn last line of metrics.jsonl, which
    a killed run leaves, is skipped.
    """
    out = Path(out)
    page = _page(out)
    path = out / "report.html"
    draft = out / f".report.html.{os.getpid()}"
    try:
        draft.write_bytes(page.encode("utf-8", "replace"))  # JSON may carry half of a surrogate pair
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


@functools.cache
def _template() -> jinja2.Template:
    house = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # summary.eval.open is nothing where there is no eval; the filters turn nothing into ""
        trim_blocks=True,
        lstrip_blocks=True,
    )
    house.filters |= {"si": _si, "short": _short, "count": _count, "percent": _percent, "points": _points, "time": _time, "text": _text}
    return house.get_template("report.html.j2")


def _page(out: Path) -> str:
    summary = _load(out / "summary.json", dict)
    rows = _metrics(out / "metrics.jsonl")
    predictions = _load(out / "predictions.json", list) if (out / "predictions.json").is_file() else []
    predictions = [p for p in predictions if isinstance(p, dict)]
    return _template().render(
        summary={key: _mapping(value) if key in ("eval", "parameters", "versions") else value for key, value in summary.items()},
        charts=_charts(rows),
        parts=_parts(summary),
        examples=_examples(predictions),
        right=sum(p.get("correct") is True for p in predictions),
        asked=len(predictions),
        notes=[note for note in summary.get("notes") or [] if isinstance(note, str)] if isinstance(summary.get("notes"), list) else [],
    )


# reading ------------------------------------------------------------------------------------------------------------------------


def _load(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder that `fastpeft train --out` wrote, after it has ended") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, not {type(value).__name__}")
    return value


def _metrics(path: Path) -> list[dict]:
    """Rows by rising step; of a step written twice the later one. ValueError names a bad line, unless it is the last."""
    if not path.is_file():
        return []
    rows: dict[float, dict] = {}
    lines = path.read_bytes().rstrip().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = _number(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if step is not None:
            rows[step] = row
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: not a JSON object with a step: {line[:60].decode('utf-8', 'replace')!r}")
    return [rows[step] for step in sorted(rows)]


def _number(value) -> float | None:
    """A finite number one can draw, else None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # false for NaN
    return float(value) if good else None


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def _text(value, limit: int = 300) -> str:
    text = value if isinstance(value, str) else "" if _number(value) is None else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# numbers as words: "" for what is no number -------------------------------------------------------------------------------------


def _si(value, unit: str = "") -> str:
    """1234567890, "B" -> "1.23 GB": three digits, powers of 1000."""
    if (value := _number(value)) is None:
        return ""
    power = min(5, int(math.log10(abs(value)) / 3)) if abs(value) >= 1 else 0
    return f"{_short(value / 1000**power)} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}".rstrip()


def _short(value, unit: str = "") -> str:
    if (value := _number(value)) is None:
        return ""
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def _count(value) -> str:
    return "" if _number(value) is None else f"{value:,.0f}"


def _percent(fraction) -> str:
    return "" if _number(fraction) is None else f"{100 * fraction:.1f} %"


def _points(fraction, other) -> str:
    return "" if _number(fraction) is None or _number(other) is None else f"{100 * (fraction - other):+.1f}"


def _time(seconds) -> str:
    if (seconds := _number(seconds)) is None or seconds < 60:
        return _short(seconds, " s")
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# by part ------------------------------------------------------------------------------------------------------------------------


def _parts(summary: dict) -> dict | None:
    """Cells of the table by part: words, and a bar as long as the part's share of its column."""
    counts, costs = _mapping(_mapping(summary.get("parameters")).get("parts")), _mapping(summary.get("parts"))
    measures = [
        ("Trained parameters", counts, "trainable", _count),
        ("Saved for backward", costs, "saved_bytes", lambda v: _si(v, "B")),
        ("Work per sample", costs, "flops_per_sample", lambda v: _si(v, "F")),
    ]
    names = list(dict.fromkeys([*counts, *costs]))
    columns = []
    for title, source, key, words in measures:
        values = [_number(_mapping(source.get(name)).get(key)) for name in names]
        total = sum(v for v in values if v and v > 0)
        if any(v is not None for v in values):
            shares = [max(0.0, v or 0) / total if total else 0.0 for v in values]
            columns.append((title, [(words(v), round(100 * s, 1)) for v, s in zip(values, shares)]))
    rows = [(_text(name, 40), [cells[i] for _, cells in columns]) for i, name in enumerate(names)]
    rows = [(name, cells) for name, cells in rows if name != "other" or any(share > 0 for _, share in cells)]
    return {"titles": [title for title, _ in columns], "rows": rows} if columns else None


# charts -------------------------------------------------------------------------------------------------------------------------


def _charts(rows: list[dict]) -> list[dict]:
    evals = [{"step": row["step"]} | _mapping(row.get("eval")) for row in rows if row.get("eval")]
    kinds = [(kind, _curve(evals, kind, 100)) for kind in ("global", "open", "closed")]
    memory = _curve(rows, "memory_bytes", 1)
    peak = max(memory[1], default=0)
    power = min(5, max(2, int(math.log10(peak) / 3))) if peak >= 1 else 2
    memory = (memory[0], [v / 1000**power for v in memory[1]])
    charts = [
        _chart("Loss", "", [("loss", _curve(rows, "loss", 1))], smooth=True, zero=False, width=920, height=280),
        _chart("Throughput", "samples/s", [("throughput", _curve(rows, "samples_per_second", 1))], smooth=True),
        _chart("Memory held after each step", f"{'..MGTP'[power]}B", [("memory", memory)]),
        _chart("Accuracy during training", "%", [kind for kind in kinds if len(kind[1][0])]) if len(evals) > 1 else None,
    ]
    return [chart for chart in charts if chart]


def _curve(rows: list[dict], key: str, scale: float) -> tuple[list[float], list[float]]:
    """Steps and values of a field, finite ones only."""
    pairs = [(float(row["step"]), v * scale) for row in rows if (v := _number(row.get(key))) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _chart(title: str, unit: str, series: list, *, smooth=False, zero=True, width=450, height=230) -> dict | None:
    """Paths, ticks and words of a line chart; None without data. ``zero``: the axis starts at 0 in any case."""
    series = [(name, np.array(x), np.array(y)) for name, (x, y) in series if len(x)]
    if not series:
        return None
    x_all, y_all = np.concatenate([x for _, x, _ in series]), np.concatenate([y for *_, y in series])
    low, high = float(y_all.min()), float(y_all.max())
    if low > 0 and (zero or low < 0.5 * high or low == high):
        low = 0.0
    high = high if high > low else low + (abs(low) or 1)
    y_ticks, decimals = _ticks(low, high, height // 40)
    first, last = float(x_all.min()), float(x_all.max())
    first = 0.0 if 0 < first <= last / 2 or last <= 1 else min(first, last - 1)
    x_ticks, _ = _ticks(first, last, width // 110, whole=True)
    left, right, top, bottom = 52, width - 14, 26, height - 26
    low, high = y_ticks[0], high + 0.02 * (high - low)

    def across(x):
        return left + (x - first) / (last - first) * (right - left)

    def down(y):
        return bottom - (y - low) / (high - low) * (bottom - top)

    paths, window = [], 0
    for i, (name, x, y) in enumerate(series):
        faint = smooth and len(y) >= 10
        look = " faint" if faint else " dot" if len(y) == 1 else ""
        paths.append((name, f"c{i}{look}", _path(*_thin(across(x), down(y)))))
        if faint:
            window = max(5, len(y) // 25) | 1
            paths.append((name, f"c{i}", _path(*_thin(across(x), down(_running_mean(y, window))))))
    ends = "; ".join(f"{name} {_short(y[0])} at step {x[0]:,.0f}, {_short(y[-1])} at step {x[-1]:,.0f}" for name, x, y in series)
    count = max(len(x) for _, x, _ in series)
    fixed = decimals < 5 and abs(high) < 1e6
    return {
        "id": title.split()[0].lower(), "title": title, "unit": unit, "width": width, "height": height, "paths": paths,
        "left": left, "right": right, "bottom": bottom, "names": [name for name, *_ in series] if len(series) > 1 else [],
        "window": window, "bucket": round(count / BUCKETS) if count > 2 * BUCKETS else 1,
        "x_ticks": [(round(across(t), 1), f"{t:,.0f}") for t in x_ticks if first <= t <= last],
        "y_ticks": [(round(down(t), 1), f"{t:,.{decimals}f}" if fixed else f"{t:.3g}") for t in y_ticks if t <= high],
        "words": f"{ends}; lowest {_short(y_all.min())}, highest {_short(y_all.max())}",
    }  # fmt: skip


def _ticks(low: float, high: float, count: int, whole: bool = False) -> tuple[list[float], int]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten that reach around [low, high], and the decimals they need."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(begin, end + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` steps around each, fewer at the ends."""
    sums, at = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y))
    begin, end = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(y))
    return (sums[end] - sums[begin]) / (end - begin)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each bucket, in order: no spike is lost."""
    if len(y) <= 2 * BUCKETS:
        return x, y
    buckets = np.array_split(np.arange(len(y)), BUCKETS)
    keep = np.unique([at for b in buckets for at in (b[y[b].argmin()], b[y[b].argmax()])])
    return x[keep], y[keep]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return f"M{points}" if len(x) > 1 else f"M{points}h0"  # a dot, by its round cap


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.train.report", description="Write OUT/report.html again from a run's files.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that a training run wrote")
    try:
        print(write_report(parser.parse_args(argv).out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
