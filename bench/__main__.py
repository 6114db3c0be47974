"""python -m bench [ops] [names ...] [--device cpu|cuda] [--quick] [--seconds S] [--verify]: every bench/ops/bench_<op>.py, or those named.

Prints a Markdown table and writes JSON to $OUT, or bench/results/. --verify runs the ops' tests first: no speed figure on a red test.
`python -m bench steps ...` measures whole training steps (bench/steps.py), `python -m bench convergence ...` whole trainings;
`python -m bench gpu` runs all that needs a GPU, in three calls; `python -m bench steps_gpu` the whole steps among it.
`python -m bench mixed ...` compares what LaVIN reaches on fastpeft and written straightforwardly (bench/mixed.py).
`python -m bench shared ...` measures steps whose samples share an image (bench/shared.py).
`python -m bench adapters ...` measures several adapters in one run against runs of their own (bench/adapters.py).
`python -m bench host` measures what a call costs the host (bench/host.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import timing
from bench.pieces import say

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def found() -> dict[str, Path]:
    return {path.stem.removeprefix("bench_"): path for path in sorted((ROOT / "bench/ops").glob("bench_*.py"))}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verified(names: list[str]) -> bool:
    tests = [path for name in names if (path := ROOT / f"tests/ops/test_{name}.py").exists()]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *map(str, tests)], cwd=ROOT).returncode == 0


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["steps"], ["convergence"], ["mixed"], ["shared"], ["adapters"], ["host"], ["gpu"], ["steps_gpu"]):
        return importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
    return ops(argv[1:] if argv[:1] == ["ops"] else argv)


def ops(argv: list[str]) -> int:
    benches = found()
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(benches)}; all by default")
    parser.add_argument("--device", default=timing.Settings.device, choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for all rivals of one case together")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, a fifth of the time")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--dtype", choices=DTYPES, help="one alone; fp32 and bf16 by default")
    parser.add_argument("--lines", action="store_true", help="tell each case as a line of JSON at once, and write no file")
    parser.add_argument("--verify", action="store_true", help="run the ops' tests first")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(benches):
        parser.error(f"no bench called {', '.join(sorted(unknown))}; there are {', '.join(benches)}")
    names = args.names or list(benches)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.verify and not verified(names):
        print("tests are red: nothing is measured", file=sys.stderr)
        return 1

    settings, rows, failed = timing.Settings(args.device, args.seconds, args.quick, lines=args.lines), [], []
    settings.dtypes = [DTYPES[args.dtype]] if args.dtype else settings.dtypes
    for name in names:
        begin = time.perf_counter()
        try:
            with torch.cuda.stream(torch.cuda.Stream()) if args.device == "cuda" else contextlib.nullcontext():  # see timing.captured
                rows += load(benches[name]).run(settings)
        except Exception as error:  # one broken bench must not cost the others their figures; the exit status tells
            failed.append(f"{name}: {type(error).__name__}: {error}")
            if args.lines:
                say({"case": name, "failed": failed[-1]})
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)

    environment = timing.environment()
    print(", ".join(f"{key} {value}" for key, value in environment.items()) + "\n\n" + timing.markdown(rows))
    print("\n".join(failed), file=sys.stderr)
    if args.lines:
        say({"case": "environment", **environment})
        return bool(failed)
    folder = Path(os.environ.get("OUT") or ROOT / "bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment, "rows": [dataclasses.asdict(row) for row in rows], "failed": failed}
    (folder / f"ops-{args.device}.json").write_text(json.dumps(report, indent=1) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
