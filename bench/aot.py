"""Compile every Triton kernel for GPUs that are not here, and hold its resources to recorded limits; and look at csrc's CUDA kernels, as
they were built: none may keep anything on a stack.

    python bench/aot.py [--arch 80 90 100] [--only lora] [--check bench/aot_limits.json | --write bench/aot_limits.json]

Each kernels/<op>.py yields (name, kernel, signature, constexprs, options) from ``aot_cases()``; options may hold "since", the first
architecture that a case is for. Arguments that are 1 at every launch of a case belong into its constexprs: Triton's launcher makes them
constants, and a stride that is not known to be 1 makes narrow loads. Registers, stack, shared memory, spills
and tensor-core instructions are read from the machine code. Counts differ between versions of Triton: limits hold for the version that
wrote them; with another one the kernels must still compile, and nothing else is checked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # @triton.jit must give a compilable function
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is unset, 3.10 changes the default

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
# sizes a launch has in multiples of 16 (channels, vocabulary, strides of them): what Triton's launcher would find out
DIVISIBLE = re.compile(r"stride_\w+|[NKCDV]")
RESOURCES = ("registers", "stack", "shared", "spills")


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def cases(module: str):
    sys.path.insert(0, str(ROOT))
    yield from getattr(importlib.import_module(f"fastpeft.kernels.{module}"), "aot_cases", tuple)()


def compile_one(kernel, signature: dict, constexprs: dict, options: dict, arch: int):
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # inside autotune or heuristics
    names = kernel.arg_names
    unknown = (set(signature) | set(constexprs)) - set(names)
    assert not unknown, f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}"
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = [i for i, n in enumerate(names) if types[n][0] == "*" or (types[n] == "i32" and DIVISIBLE.fullmatch(n))]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constexprs.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: value for name, value in options.items() if name != "since"}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([BIN / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for name, key in (("registers", "REG"), ("stack", "STACK"))}
    found["shared"] = compiled.metadata.shared
    found["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    found["tensor_cores"] = sorted(set(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|IMMA|UTC\w*MMA)\b", code)))
    return found


def work(job: tuple[str, str, int]) -> tuple[str, dict, float]:
    """One case on one architecture, found by name: kernels themselves do not travel between processes."""
    module, name, arch = job
    begin = time.perf_counter()
    case = next(case for case in cases(module) if case[0] == name)
    try:
        found = resources(compile_one(*case[1:], arch))
    except Exception as error:  # every compiler error is a result: all of them are reported, then the run fails
        found = {"error": f"{type(error).__name__}: {error}"}
    return f"{name}/sm_{arch}", found, time.perf_counter() - begin


def csrc_kernels(library: Path) -> tuple[int, list[str]]:
    """How many CUDA kernels csrc's library holds, over all its architectures, and those of them that spill."""
    said = subprocess.run([BIN / "cuobjdump", "-res-usage", library], capture_output=True, text=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", said)
    return len(usage), [f"csrc: {name} keeps {stack} bytes on a stack" for name, _, stack in usage if int(stack)]


def violations(found: dict[str, dict], limits: dict) -> list[str]:
    bad = []
    for key, got in found.items():
        limit = limits["kernels"].get(key)
        if limit is None:
            bad.append(f"{key}: no limit recorded; run python bench/aot.py --write bench/aot_limits.json")
            continue
        bad += [f"{key}: {r} {got[r]} > {limit[r]}" for r in RESOURCES if got[r] > limit[r]]
        if limit["tensor_cores"] and not got["tensor_cores"]:
            bad.append(f"{key}: no tensor-core instruction, where {', '.join(limit['tensor_cores'])} was used")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()

    chosen = [(m, case[0], case[4].get("since", 0)) for m in modules() for case in cases(m) if args.only in case[0]]
    jobs = [(module, name, arch) for module, name, since in chosen for arch in args.arch if arch >= since]
    found = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for key, got, seconds in pool.map(work, jobs):
            found[key] = got
            shown = got.get("error") or "  ".join(f"{k} {v if k != 'tensor_cores' else ' '.join(v) or '-'}" for k, v in got.items())
            print(f"{key:44s} {shown}  ({seconds:.1f} s)", flush=True)

    bad = [f"{key}: does not compile: {got['error'].splitlines()[0]}" for key, got in found.items() if "error" in got]
    if args.write and not bad:
        kept = json.loads(args.write.read_text())["kernels"] if args.only and args.write.exists() else {}
        text = json.dumps({"triton": triton.__version__, "kernels": dict(sorted((kept | found).items()))}, indent=1)
        # one kernel a line
        text = re.sub(r"\{\s+(\"registers[^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text)
        args.write.write_text(text + "\n")
    if args.check:
        limits = json.loads(args.check.read_text())
        if limits["triton"] == triton.__version__:
            bad += violations({key: got for key, got in found.items() if "error" not in got}, limits)
        else:
            print(f"limits are those of triton {limits['triton']}; with {triton.__version__} only compilation is checked")
    built = 0
    for library in sorted((ROOT / "fastpeft").glob("_C*.so")) if args.check else ():
        built, spilling = csrc_kernels(library)
        bad += spilling
    print("\n".join(bad) or f"{len(found)} compilations and {built} built CUDA kernels, all within limits")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
