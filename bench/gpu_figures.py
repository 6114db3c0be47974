"""The twelve figures that a GPU is to show, each a ratio in one run, from what the pieces of `bench gpu` found.

Eight are of `bench gpu kernels`, in bfloat16, by graph replays where there are some; four of `bench gpu steps`. Of several cases that a
figure is of, the worst counts, and "case" says which. A figure whose cases are not there has the value null: it was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``at_least`` or ``at_most``: the target. ``worst`` of (value, case) pairs counts."""

    name: str
    call: str
    found: Callable[[list[dict]], Iterator[tuple[float, str]]]
    at_least: float | None = None
    at_most: float | None = None

    def told(self, cases: list[dict]) -> dict:
        worst = min if self.at_most is None else max
        value, case = worst(self.found(cases), default=(None, None))
        target = f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"
        met = None if value is None else value >= self.at_least if self.at_most is None else value <= self.at_most
        return {"figure": self.name, "value": value if value is None else round(value, 3), "target": target, "met": met, "case": case}


def _ops(pattern: str, over: str, inverse: bool = False) -> Callable[[list[dict]], Iterator[tuple[float, str]]]:
    """Our time over that of the rival ``over`` (its time over ours where ``inverse``), of bfloat16 cases whose "op shape" fits
    ``pattern``."""

    def found(cases: list[dict]) -> Iterator[tuple[float, str]]:
        for case in cases:
            rows = {row["provider"]: row for row in case.get("rows", ()) if row.get("dtype") == "bfloat16"}
            mine, theirs = rows.get("fastpeft"), rows.get(over)
            if mine and theirs and re.fullmatch(pattern, f"{mine['op']} {mine['shape']}"):
                clock = "graph_ms" if mine["graph_ms"] and theirs["graph_ms"] else "ms"
                ratio = mine[clock][1] / theirs[clock][1]
                yield (1 / ratio if inverse else ratio), f"{mine['op']} {mine['shape']}, {clock}"

    return found


def _steps(cases: list[dict]) -> dict[tuple[str, str, str], dict]:
    """Lines of whole steps by plan, rival and case; of a line that was told several times, the last."""
    lines = {}
    for case in cases:
        for row in case.get("rows", [case]):
            if "what" in row and "speedup" in row:
                name = row["case"].removeprefix(f"{row['what']}, ").removesuffix(", complete")
                lines[row.get("plan", ""), row["what"], name] = row
    return lines


def _faster(plan: str, mine: str, theirs: str) -> Callable[[list[dict]], Iterator[tuple[float, str]]]:
    """How many times the fastest rival whose name fits ``theirs`` our step takes its time, by case."""

    def found(cases: list[dict]) -> Iterator[tuple[float, str]]:
        lines = _steps(cases)
        for (p, what, case), row in lines.items():
            rivals = {w: r for (q, w, c), r in lines.items() if (q, c) == (p, case) and re.fullmatch(theirs, w)}
            if p == plan and what == mine and rivals:
                fastest = min(rivals, key=lambda w: rivals[w]["seconds"])
                yield rivals[fastest]["seconds"] / row["seconds"], f"{what} over {fastest}, {case}"

    return found


def _off_estimate(cases: list[dict]) -> Iterator[tuple[float, str]]:
    for (plan, what, case), row in _steps(cases).items():
        if row.get("estimate_bytes"):
            yield abs(row["peak_bytes"] / row["estimate_bytes"] - 1), " ".join(filter(None, (plan, what, case)))


NORMS = r"(layer|rms)_norm (all|dx) {phase} .*"
LORA = r"lora_linear fwd\+bwd \d+"
ATTENTION = r"attention {method} fwd\+bwd B4 H32 2048x2048 d128 causal"
FIGURES = (
    Figure("norms forward, of a copy's speed", "kernels", _ops(NORMS.format(phase="fwd"), "copy", inverse=True), at_least=0.90),
    Figure("norms backward, of a copy's speed", "kernels", _ops(NORMS.format(phase="bwd"), "copy", inverse=True), at_least=0.85),
    Figure("LoRA 4096, of the frozen pair's time", "kernels", _ops(LORA + r"x4096x4096 .*", "frozen linear"), at_most=1.10),
    Figure("LoRA 768, of the frozen pair's time", "kernels", _ops(LORA + r"x768x768 .*", "frozen linear"), at_most=1.25),
    Figure("prefix, of plain flash's time", "kernels", _ops(ATTENTION.format(method="prefix"), "plain flash"), at_most=1.08),
    Figure("IA3, of plain flash's time", "kernels", _ops(ATTENTION.format(method="ia3"), "plain flash"), at_most=1.08),
    Figure("Excitor, of plain flash's time", "kernels", _ops(r"excitor text fwd\+bwd B4 H32 2048 .*", "plain flash"), at_most=1.08),
    Figure("adapter, of a copy's speed", "kernels", _ops(r"norm_mm_adapter fwd\+bwd 16x.*", "copy", inverse=True), at_least=0.80),
    Figure(
        "MISS F/LoRA/LoRA graphed, times PEFT eager", "steps",
        _faster("F/LoRA/LoRA", "fastpeft, CUDA graphs", r"transformers \+ PEFT"), at_least=5.0,
    ),
    Figure("LLaMA, times PEFT eager", "steps", _faster("", "LoRA, CUDA graphs", "LoRA, PEFT"), at_least=1.5),
    Figure(
        "LLaMA, times PEFT compiled or with Liger", "steps",
        _faster("", "LoRA, CUDA graphs", "LoRA, PEFT, (torch.compile.*|Liger)"), at_least=1.15,
    ),
    Figure("peak memory, off the estimate", "steps", _off_estimate, at_most=0.10),
)  # fmt: skip


def figures(call: str, cases: list[dict]) -> list[dict]:
    """Those of one call, from what its pieces said."""
    return [figure.told(cases) for figure in FIGURES if figure.call == call]
