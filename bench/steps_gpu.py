"""Whole steps on a GPU, what matters most first, in one process: what `bench gpu steps` runs.

    python -m bench steps_gpu [--seconds 150] [--only WORD ...]

Imports and the libraries' first calls take longer than the steps do, so all sections share them. A section that leaves CUDA in a state in
which nothing runs any more is followed by a new process for those after it. Sections for which no time is left are told as left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable

import psutil
import torch

from bench import inside, steps, steps_llama
from bench.pieces import say

LEAST = 12.0  # seconds: a section with less than that is not begun
ROOM = 10.0  # seconds that torch.compile leaves for the steps it has compiled
MISS = ["--device", "cuda", "--dtype", "bf16", "--batch-size", "20", "--rounds", "3", "--lines"]
LLAMA = ["--device", "cuda", "--dtype", "bf16", "--size", "7b", "--tokens", "512", "--rounds", "3", "--lines"]
Sections = dict[str, tuple[Callable[[list[str]], int], list[str]]]


def sections(miss: list[str] = MISS, llama: list[str] = LLAMA) -> Sections:
    """By name, what runs with which options. Without PEFT, fastpeft's own alone."""
    peft = importlib.util.find_spec("peft") is not None
    rivals = ["peft", "sdpa", "fastpeft", "graphed"] if peft else ["fastpeft", "graphed", "off"]
    both = ["--dropout", "0", "0.1", "--rivals", *rivals]
    liger = ["liger"] * (importlib.util.find_spec("liger_kernel") is not None)
    lora = ["peft", "lora", "graphed", "readable", "peft16", *liger, "compile"] if peft else ["lora", "graphed", "readable"]
    found: Sections = {
        "miss F/LoRA/LoRA": (steps.main, ["--plans", "F/LoRA/LoRA", *miss, *both]),
        "llama": (steps_llama.main, [*llama, "--rivals", *lora]),
        "miss LoRA/LoRA/LoRA": (steps.main, ["--plans", "LoRA/LoRA/LoRA", *miss, *both]),
        "llama methods": (steps_llama.main, [*llama, "--rivals", "methods"]),
    }
    if peft:
        found["miss compile"] = (steps.main, ["--plans", "F/LoRA/LoRA", *miss, "--rivals", "peft", "layers"])
    return found


def run(found: Sections, seconds: float) -> tuple[int, list[str]]:
    """(1 where a section failed, those that are still to run, because CUDA does not any more)."""
    stop, status, left = time.perf_counter() + seconds, 0, list(found)
    for name, (main, options) in found.items():
        remain = stop - time.perf_counter()
        if remain < LEAST:
            say({"case": name, "left_out": f"{remain:.0f} s are left"})
            continue
        left.remove(name)
        try:
            wrong = main([*options, "--patience", str(max(1.0, min(60.0, remain - ROOM)))])
        except Exception as error:
            wrong = 1
            say({"case": name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
        status |= int(bool(wrong))
        say({"case": f"{name}, done", "seconds": round(remain - (stop - time.perf_counter()), 1), "status": wrong})
        if not cuda_works():
            return 1, left
    return status, []


def cuda_works() -> bool:
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
    except Exception:
        return False


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench steps_gpu", description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, default=150.0, help="for all")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help=f"of {', '.join(sections())}")
    args = parser.parse_args(argv)
    began, found = time.perf_counter(), sections()
    if unknown := sorted(set(args.only or ()) - found.keys()):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(found)}")
    with inside.meanwhile():
        if not torch.cuda.is_available():
            print("bench steps_gpu: torch sees no CUDA device here", file=sys.stderr)
            return 2
        say({"case": "imports", "seconds": round(time.time() - psutil.Process().create_time(), 1)})
        status, left = run({name: found[name] for name in args.only or found}, args.seconds)
    remain = args.seconds - (time.perf_counter() - began)
    if left and remain > LEAST:
        say({"case": "CUDA", "failed": "nothing runs any more: a new process goes on"})
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "bench", "steps_gpu", "--seconds", f"{remain:.0f}", "--only", *left])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
