"""Charts across runs: bars by group, and one value over another, for chart.html.j2."""

from __future__ import annotations

import math

import numpy as np

from fastpeft.report.charts import COLOURS, path, short, vertical_axis

BAR_COLOURS = 4


def bar_chart(title: str, unit: str, groups: list[str], series: list[tuple[str, list[float | None]]], width: int = 920, height: int = 300):
    """Bars side by side, from 0 up or down: ``series`` holds a value for each group (None: none). None without any value."""
    values = [value for _, bars in series for value in bars if value is not None]
    if not values:
        return None
    down, left, right = vertical_axis(np.array([0.0, *values]), True, height), 52.0, width - 14.0
    each = (right - left) / len(groups)
    thick, bars, ticks = each * 0.8 / len(series), [], []
    for g, group in enumerate(groups):
        ticks.append((round(left + each * (g + 0.5), 1), group))
        for s, (name, of_group) in enumerate(series):
            if (value := of_group[g]) is not None:
                x, y = left + each * (g + 0.1) + thick * s, down(value)
                words = f"{group}, {name}: {short(value)} {unit}"
                top, size = min(y, down(0.0)), abs(down(0.0) - y)
                bars.append((round(x, 1), round(top, 1), round(thick, 1), round(size, 1), f"rect{s % BAR_COLOURS}", words))
    told = "; ".join(bar[5] for bar in bars)
    keys = [(name, f"rect{s % BAR_COLOURS}") for s, (name, _) in enumerate(series)]
    return _chart(title, unit, width, height, down, ticks, told) | {"bars": bars, "bar_keys": keys, "right": right}


def scatter_chart(title: str, unit: str, by: str, points: list[tuple[str, float, float]], width: int = 920, height: int = 320):
    """Labelled points (name, x > 0, y) on a logarithmic x axis; None without any."""
    points = [(name, x, y) for name, x, y in points if x > 0]
    if not points:
        return None
    low = math.floor(math.log10(min(x for _, x, _ in points)) + 1e-9)
    high = max(low + 1, math.ceil(math.log10(max(x for _, x, _ in points)) - 1e-9))
    down, left, right = vertical_axis(np.array([0.0, *(y for *_, y in points)]), True, height), 52.0, width - 14.0

    def across(x: float) -> float:
        return left + (math.log10(x) - low) / (high - low) * (right - left - 120)  # room for the last label

    ticks = [(round(across(10.0**power), 1), f"{10.0**power:g}") for power in range(low, high + 1)]
    paths = [(name, f"c{i % COLOURS} dot", path(np.array([across(x)]), np.array([down(y)]))) for i, (name, x, y) in enumerate(points)]
    labels = [(round(across(x) + 7, 1), round(down(y) + 4, 1), name) for name, x, y in points]
    told = "; ".join(f"{name}: {short(y)} at {short(x)}" for name, x, y in points)
    return _chart(title, unit, width, height, down, ticks, told) | {"paths": paths, "labels": labels, "by": by, "right": right}


def _chart(title: str, unit: str, width: int, height: int, down, x_ticks: list, words: str) -> dict:
    return {
        "id": "-".join(title.lower().split()), "title": title, "unit": unit, "width": width, "height": height, "paths": [], "left": 52.0,
        "bottom": down.begin, "names": [], "window": 0, "by": "", "bucket": 1, "x_ticks": x_ticks,
        "y_ticks": [(round(down(t), 1), f"{t:,.{down.decimals}f}") for t in down.ticks if t <= down.high], "words": words,
    }  # fmt: skip
