"""python -m bench host [--seconds S]: what one call of an operator costs the host, forward and backward, at shapes where that is all.

Eight calls, each on the last one's output, and one backward through them: microseconds a call, of the thread's own time. Rivals are
interleaved in one run: PyTorch's own operators, our Functions in Python with products formed in Python, and csrc/autograd's. The middle of
all rounds and, as other work on the machine only adds, the least. Writes host_cpu.md to $OUT, or bench/results/.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from bench import timing
from fastpeft import _library, ops

CALLS, WIDTH, ROWS, RANK = 8, 16, (4, 8), 4
RIVALS = ("PyTorch", "Python", "C++")


@contextmanager
def rival(name: str) -> Iterator[None]:
    lora_linear = importlib.import_module("fastpeft.ops.lora_linear")
    if name != "Python":
        yield
        return
    with (
        mock.patch.object(_library, "autograd", None),
        mock.patch.object(lora_linear, "_forward", lora_linear._fwd),
        mock.patch.object(lora_linear, "_backward", lora_linear._bwd),
    ):
        yield


def cases() -> dict[str, tuple[Callable, Callable, list[torch.Tensor]]]:
    """{operator: (PyTorch's form, ours, the trained tensors)}."""
    weight, bias, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((WIDTH,), (WIDTH,), (RANK, WIDTH), (WIDTH, RANK)))
    W, b = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    return {
        "lora_linear": (
            lambda x: F.linear(x, W, b) + 0.5 * F.linear(F.linear(x, A), B),
            lambda x: ops.lora_linear(x, W, b, A, B, 0.5),
            [A, B],
        ),
        "layer_norm then lora_linear": (
            lambda x: F.linear(y := F.layer_norm(x, (WIDTH,), weight, bias), W, b) + 0.5 * F.linear(F.linear(y, A), B),
            lambda x: ops.lora_linear(ops.layer_norm(x, weight, bias), W, b, A, B, 0.5),
            [weight, bias, A, B],
        ),
        "layer_norm": (lambda x: F.layer_norm(x, (WIDTH,), weight, bias), lambda x: ops.layer_norm(x, weight, bias), [weight, bias]),
        "rms_norm": (lambda x: F.rms_norm(x, (WIDTH,), weight, 1e-6), lambda x: ops.rms_norm(x, weight), [weight]),
    }


def step(op: Callable, x: torch.Tensor, trained: list[torch.Tensor], dy: torch.Tensor) -> None:
    y = x
    for _ in range(CALLS):
        y = op(y)
    torch.autograd.grad(y, [x, *trained], dy)


def measured(seconds: float) -> list[dict]:
    x, dy = torch.randn(*ROWS, WIDTH, requires_grad=True), torch.randn(*ROWS, WIDTH)
    rows = []
    for name, (plain, ours, trained) in cases().items():
        times: dict[str, list[float]] = {r: [] for r in RIVALS}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not times["C++"]:
            for r in RIVALS:
                with rival(r):
                    op = plain if r == "PyTorch" else ours
                    step(op, x, trained, dy)
                    begin = time.thread_time()
                    for _ in range(10):
                        step(op, x, trained, dy)
                    times[r].append((time.thread_time() - begin) / 10 / CALLS * 1e6)
        rows.append({"operator": name} | {r: (statistics.median(t), min(t)) for r, t in times.items()})
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for all rivals of one operator together")
    args = parser.parse_args(argv)
    if _library.autograd is None:
        parser.error(f"there is nothing to compare: csrc/autograd: {_library.autograd_missing}")
    torch.set_num_threads(1)
    lines = [
        "# Host time of a call, forward and backward",
        "",
        f"`python -m bench host --seconds {args.seconds:g}`, {', '.join(f'{k} {v}' for k, v in timing.environment().items())}. Input "
        f"{[*ROWS, WIDTH]}, rank {RANK}, float32, one thread; microseconds a call in a chain of {CALLS}, middle and least of all rounds, "
        "interleaved. All gradients but the frozen weight's.",
        "",
        "| operator | PyTorch | fastpeft in Python | csrc/autograd | of Python's |",
        "|---|---|---|---|---|",
    ]
    for row in measured(args.seconds):
        cells = [f"{row[r][0]:.1f}, {row[r][1]:.1f}" for r in RIVALS]
        shares = [f"{c / p:.2f}" for c, p in zip(row["C++"], row["Python"])]
        lines.append(f"| {row['operator']} | {' | '.join(cells)} | {', '.join(shares)} |")
        print(lines[-1], flush=True)
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "host_cpu.md").write_text("\n".join(lines) + "\n")
    return 0
