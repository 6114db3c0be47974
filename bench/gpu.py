"""Everything that needs a GPU, within 10 minutes: tests, every op, LLaMA-shaped and MISS's steps. `make gpu` builds csrc, then runs this.

    python -m bench gpu [--minutes 9.5]

Each piece is a process of its own with a limit of time: one that fails, or lacks a package, costs the others nothing. What a piece prints
goes to gpu-PIECE.txt, the summary to gpu.json, figures to their own JSON files, all in $OUT (or bench/results). Exit status 1 where a piece
failed, 2 without a GPU. It needs torch, triton, transformers and pytest, and what fastpeft itself imports; nothing is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--import-mode=importlib", "-m", "gpu"]


def pieces(out: Path) -> dict[str, tuple[list[str], float]]:
    """name: (arguments of python, seconds it may take), the most telling first."""
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    rivals = ["peft", "sdpa", "fastpeft", "off"] if importlib.util.find_spec("peft") else ["fastpeft", "off", "frozen"]
    steps = ["--plans", "F/LoRA/LoRA", "LoRA/LoRA/LoRA", "--batch-size", "20", "--rivals", *rivals, "--rounds", "5"]
    return {
        "doctor": (["-m", "fastpeft", "doctor"], 60),
        "tests": ([*PYTEST, *marked], 240),
        "ops": (["-m", "bench", "ops", "--device", "cuda", "--quick"], 180),
        "llama": (["bench/steps_llama.py", "--device", "cuda", "--dtype", "bf16", "--size", "7b", "--tokens", "512"], 120),
        "miss": (["-m", "bench", "steps", *steps, "--device", "cuda", "--dtype", "bf16", "--out", str(out / "steps_miss_cuda.json")], 150),
    }


def run(name: str, arguments: list[str], seconds: float, out: Path) -> dict:
    began, file = time.perf_counter(), out / f"gpu-{name}.txt"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(out)}
    with file.open("w") as log:
        try:
            status = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    return {"status": status, "seconds": round(time.perf_counter() - began, 1), "tail": file.read_text()[-2000:]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; pieces that do not fit any more are left out")
    parser.add_argument("pieces", nargs="*", help="of them; all by default")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench/results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    stop, found = time.perf_counter() + 60 * args.minutes, {}
    known = pieces(out)
    if unknown := sorted(set(args.pieces) - known.keys()):
        parser.error(f"no piece called {', '.join(unknown)}; there are {', '.join(known)}")
    for name, (arguments, seconds) in known.items():
        left = stop - time.perf_counter()
        if (args.pieces and name not in args.pieces) or left < 10:
            continue
        found[name] = run(name, arguments, min(seconds, left), out)
        print(f"{name}: status {found[name]['status']}, {found[name]['seconds']} s\n{found[name]['tail'][-600:]}", flush=True)
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "pieces": found}
        (out / "gpu.json").write_text(json.dumps(about, indent=1) + "\n")  # after each: a run cut off leaves what it had
    return int(any(piece["status"] for piece in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
