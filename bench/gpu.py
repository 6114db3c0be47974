"""What needs a GPU, in three calls of at most 8 minutes, each useful alone: right, kernels, steps.

    python -m bench gpu [right] [kernels] [steps] [--minutes 7.5]

right: which backend serves each operator; csrc's kernels against their CPU twins in one process, where nothing is compiled; then every test
marked gpu, in many processes; and compute-sanitizer, where it is installed.
kernels: every operator against its peers, bfloat16 first. steps: whole steps of MISS and of a LLaMA-shaped stack (bench/steps_gpu.py).

Each call leaves two files in $OUT (or bench/results): gpu-CALL.json, written after every case, and gpu-CALL.log; tables of whole steps are
in the JSON too, and the figures that have a target (bench/gpu_figures.py). What matters most runs first, and what has no time left, or
comes after a signal, is left out and said. Exit status 1 where something failed, 2 without a GPU or a folder to write to, 128 and the
signal's number after SIGINT, SIGTERM or SIGHUP. It needs torch, triton, transformers and pytest, and what fastpeft imports; nothing is
installed. `make gpu` builds csrc where it is not up to date, then makes all three calls within 10 minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu_figures import figures
from bench.pieces import GRACE, Report, say

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = max(8, (os.cpu_count() or 1) - 2)  # compiling Triton's kernels is what the tests wait for
CALLS = {"right": 0.4, "kernels": 0.3, "steps": 0.3}  # and their shares of the time, where several are made
# the order in which operators are measured
OPS = ("lora_linear", "layer_norm", "rms_norm", "lora_products", "attention", "mm_adapter", "excitor_keys", "linear_cross_entropy")
IMPORTS = 25.0  # seconds, on a slow host
LEAST = 10.0  # seconds: a piece with less than that is not begun
NATIVE = (
    "bfloat16 and (test_norms or test_row_wise or test_attention_inputs) or test_norms_of_more_rows"  # of the twins: csrc's, rewritten last
)
SANITIZED = "test_norms and 768 and bfloat16 or test_passes_of_lora_linear and 33"  # of the twins
COMPILE = "from bench.gpu import compile_all; raise SystemExit(compile_all())"
BACKENDS = "from bench.gpu import tell_backends; raise SystemExit(tell_backends())"


def tell_backends() -> int:
    """Says which backend serves each operator on CUDA: ATen is a failure where a kernel of ours was meant."""
    import fastpeft.ops  # noqa: F401 - defines the operators
    from fastpeft._library import backend_of, has_kernel_of_ours

    bad = 0
    for name, served in backend_of().items():
        case = {"case": name, "backend": served["CUDA"]}
        if has_kernel_of_ours(name) and served["CUDA"].startswith("composite"):
            case["failed"], bad = f"runs on ATen: {served['CUDA']}", bad + 1
        say(case)
    return bool(bad)


def right(seconds: float) -> list[tuple[str, list[str], float]]:
    python = sys.executable
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    pytest = ["-m", "pytest", "-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "bench.pytest_cases"]
    pytest += ["--import-mode=importlib", "-m", "gpu and not slow"]
    twins = [python, *pytest, str(ROOT / "tests/ops/test_cuda_twins.py"), "-k"]
    native = [*twins[:-1], str(ROOT / "tests/ops/test_dropout.py"), "-k", NATIVE]
    workers = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    pieces = [("backends", [python, "-c", BACKENDS], 60.0), ("native", native, 75.0)]
    pieces.append(("tests", [python, *pytest, *workers, *marked], 360.0))
    if sanitizer := shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"):
        for tool in ("memcheck", "racecheck"):
            pieces.append((tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", *twins, SANITIZED], 120.0))
    return pieces


def compile_all() -> int:
    """Every bench that has kernels of Triton's, as short as it goes and all at once: what is compiled lies in Triton's cache afterwards.
    0: one that does not run is told here, and again by the piece that measures it."""
    ops = [sys.executable, "-m", "bench", "ops"]
    how = ["--device", "cuda", "--quick", "--seconds", "0", "--dtype", "bf16"]
    began = {name: subprocess.Popen([*ops, name, *how], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in OPS}
    for name, process in began.items():
        say({"case": name, "status": process.wait()})
    return 0


def kernels(seconds: float) -> list[tuple[str, list[str], float]]:
    found = [path.stem.removeprefix("bench_") for path in sorted((ROOT / "bench/ops").glob("bench_*.py"))]
    names = [*OPS, *(name for name in found if name not in OPS)]
    ops = [sys.executable, "-m", "bench", "ops", *names, "--device", "cuda", "--quick", "--lines", "--dtype"]
    compiled = ("compile", [sys.executable, "-c", COMPILE], 60.0)
    return [compiled, ("bfloat16", [*ops, "bf16"], 300.0), ("float32", [*ops, "fp32"], 180.0)]


def steps(seconds: float) -> list[tuple[str, list[str], float]]:
    return [("whole", [sys.executable, "-m", "bench", "steps_gpu", "--seconds", f"{max(LEAST, seconds - IMPORTS - GRACE):.0f}"], seconds)]


PIECES = {"right": right, "kernels": kernels, "steps": steps}


def make(report: Report, pieces: list[tuple[str, list[str], float]], stop: float) -> None:
    """The pieces of a call, until ``stop``."""
    call = report.told["call"]
    with report.ended_by_signals():
        for name, command, most in pieces:
            left = stop - time.perf_counter() - GRACE
            if left < LEAST or report.told["interrupted"]:
                continue
            # OUT is not handed on: pieces say what they found, and one process writes it
            environment = {"PYTHONPATH": str(ROOT), "OUT": os.devnull, "PYTHONUNBUFFERED": "1"}
            status = report.run(name, command, min(most, left), environment, ROOT)
            piece = report.told["pieces"][name]
            print(f"{call} {name}: status {status}, {piece['seconds']} s, {len(piece['cases'])} cases", flush=True)
            report.told["figures"] = figures(call, [case for piece in report.told["pieces"].values() for case in piece["cases"]])
            report.write()
    told = [f"{call}: not begun: {', '.join(report.told['left_out'])}"] * bool(report.told["left_out"])
    print("\n".join(report.told["failed"][:20] + told), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("calls", nargs="*", help=f"of {', '.join(CALLS)}; all by default")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all calls together")
    parser.add_argument("--since", type=float, metavar="SECONDS", help="when the minutes began, in seconds since 1970; default: now")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.calls) - CALLS.keys()):
        parser.error(f"no call {', '.join(unknown)}; there are {', '.join(CALLS)}")
    if not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench/results").resolve()
    passed = 0.0 if args.since is None else max(0.0, time.time() - args.since)
    calls, stop, status = args.calls or list(CALLS), time.perf_counter() + 60 * args.minutes - passed, 0
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    for i, call in enumerate(calls):
        share = CALLS[call] / sum(CALLS[other] for other in calls[i:])  # what an earlier call left over is the next one's
        seconds = (stop - time.perf_counter()) * share
        ends, pieces = time.perf_counter() + seconds, PIECES[call](seconds)
        try:
            report = Report(out, call, about, [name for name, *_ in pieces])
        except OSError as error:
            print(f"bench gpu: {out} cannot be written to ({error.strerror}): set OUT to a folder that can", file=sys.stderr)
            return 2
        make(report, pieces, ends)
        if interrupted := report.told["interrupted"]:
            return 128 + signal.Signals[interrupted]
        status |= int(bool(report.told["failed"]))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
