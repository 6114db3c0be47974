"""Charts of a training run: SVG paths, ticks and captions for report.html.j2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COLOURS = 8  # of curves, in style.css.j2
BUCKETS = 240  # of a curve: at most two points each, so that 100,000 steps draw as small as 480


def charts(rows: list[dict]) -> list[dict]:
    """Loss, throughput, memory and accuracy by step, of the rows of metrics.jsonl; a chart without data is left out."""
    evals = [{"step": row["step"]} | mapping(row.get("eval")) for row in rows if row.get("eval")]
    kinds = [(kind, curve(evals, kind, 100)) for kind in ("global", "open", "closed")]
    memory = curve(rows, "memory_bytes", 1)
    peak = max(memory[1], default=0)
    power = min(5, max(2, int(math.log10(peak) / 3))) if peak >= 1 else 2
    memory = (memory[0], [v / 1000**power for v in memory[1]])
    validated = curve(rows, "validation_loss", 1)
    losses = [("loss", curve(rows, "loss", 1))] + ([("validation loss", validated)] if len(validated[0]) > 1 else [])
    drawn = [
        line_chart("Loss", "", losses, smooth=True, zero=False, width=920, height=280),
        line_chart("Throughput", "samples/s", [("throughput", curve(rows, "samples_per_second", 1))], smooth=True),
        line_chart("Memory held after each step", f"{'..MGTP'[power]}B", [("memory", memory)]),
        line_chart("Accuracy during training", "%", [kind for kind in kinds if len(kind[1][0])]) if len(evals) > 1 else None,
    ]
    return [chart for chart in drawn if chart]


def routing(summary: dict) -> dict | None:
    """The weight of each layer's first expert, by modality (LaVIN's figure 4; the second's is the rest); None where nothing is routed."""
    series = []
    for modality, layers in mapping(summary.get("routing")).items():
        pairs = enumerate(layers if isinstance(layers, list) else [], 1)
        rows = [{"step": layer, "first": pair[0]} for layer, pair in pairs if isinstance(pair, list) and pair]
        series.append((str(modality), curve(rows, "first", 1)))
    return line_chart("Routing", "weight of the first expert", series, by="layer", width=920, height=280)


def curve(rows: list[dict], key: str, scale: float) -> tuple[list[float], list[float]]:
    """Steps and values of a field, finite ones only."""
    pairs = [(float(row["step"]), v * scale) for row in rows if (v := number(row.get(key))) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class _Axis:
    """Values [low, high] drawn on pixels [begin, end]; ``ticks`` reach around them, with so many ``decimals``."""

    low: float
    high: float
    begin: float
    end: float
    ticks: list[float]
    decimals: int

    def __call__(self, value):
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def vertical_axis(y: np.ndarray, zero: bool, height: int) -> _Axis:
    """The vertical axis; ``zero``: it starts at 0 in any case."""
    low, high = float(y.min()), float(y.max())
    if low > 0 and (zero or low < 0.5 * high or low == high):
        low = 0.0
    high = high if high > low else low + (abs(low) or 1)
    ticks, decimals = _ticks(low, high, height // 40)
    return _Axis(ticks[0], high + 0.02 * (high - low), height - 26, 26, ticks, decimals)


def _across(x: np.ndarray, width: int) -> _Axis:
    """The horizontal axis."""
    first, last = float(x.min()), float(x.max())
    first = 0.0 if 0 < first <= last / 2 or last <= 1 else min(first, last - 1)
    ticks, _ = _ticks(first, last, width // 110, whole=True)
    return _Axis(first, last, 52, width - 14, ticks, 0)


def line_chart(title: str, unit: str, series: list, *, smooth=False, zero=True, by="step", width=450, height=230) -> dict | None:
    """Paths, ticks and words of a line chart; None without data. ``zero``: the axis starts at 0 in any case."""
    series = [(name, np.array(x), np.array(y)) for name, (x, y) in series if len(x)]
    if not series:
        return None
    y_all = np.concatenate([y for *_, y in series])
    across, down = _across(np.concatenate([x for _, x, _ in series]), width), vertical_axis(y_all, zero, height)
    paths, window = _lines(series, across, down, smooth)
    ends = "; ".join(f"{name} {short(y[0])} at {by} {x[0]:,.0f}, {short(y[-1])} at {by} {x[-1]:,.0f}" for name, x, y in series)
    count = max(len(x) for _, x, _ in series)
    fixed = down.decimals < 5 and abs(down.high) < 1e6
    return {
        "id": title.split()[0].lower(), "title": title, "unit": unit, "width": width, "height": height, "paths": paths,
        "left": across.begin, "right": across.end, "bottom": down.begin, "names": [name for name, *_ in series] if len(series) > 1 else [],
        "window": window, "by": by, "bucket": round(count / BUCKETS) if count > 2 * BUCKETS else 1,
        "x_ticks": [(round(across(t), 1), f"{t:,.0f}") for t in across.ticks if across.low <= t <= across.high],
        "y_ticks": [(round(down(t), 1), f"{t:,.{down.decimals}f}" if fixed else f"{t:.3g}") for t in down.ticks if t <= down.high],
        "words": f"{ends}; lowest {short(y_all.min())}, highest {short(y_all.max())}",
    }  # fmt: skip


def _lines(series: list, across: _Axis, down: _Axis, smooth: bool) -> tuple[list[tuple[str, str, str]], int]:
    """(name, CSS class, path) of each curve, and the window of the running means drawn over long ones (0: none)."""
    paths, window = [], 0
    for i, (name, x, y) in enumerate(series):
        faint = smooth and len(y) >= 10
        look = " faint" if faint else " dot" if len(y) == 1 else ""
        paths.append((name, f"c{i % COLOURS}{look}", path(*_thin(across(x), down(y)))))
        if faint:
            window = max(5, len(y) // 25) | 1
            paths.append((name, f"c{i % COLOURS}", path(*_thin(across(x), down(_running_mean(y, window))))))
    return paths, window


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


def path(x: np.ndarray, y: np.ndarray) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return f"M{points}" if len(x) > 1 else f"M{points}h0"  # a dot, by its round cap


# from any JSON -----------------------------------------------------------------------------------------------------------------


def number(value) -> float | None:
    """A finite number one can draw, else None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # false for NaN
    return float(value) if good else None


def mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def short(value, unit: str = "") -> str:
    """Three digits, or all before the point; "" for what is no number."""
    if (value := number(value)) is None:
        return ""
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit
