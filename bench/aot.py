"""Compile every Triton kernel for GPUs that are not here, and hold its resources to recorded limits; and look at csrc's CUDA kernels, as
they were built: none may keep anything on a stack.

    python bench/aot.py [--arch 80 86 90 100 120] [--only lora] [--check FILE | --write FILE] [--library FILE]

Each kernels/<op>.py yields (name, kernel, signature, constexprs, options) from ``aot_cases(shared)``, as it would launch on a card whose
blocks may have so many bytes of shared memory. Arguments that are 1
at every launch of a case belong into its constexprs: Triton's launcher makes them constants, and a stride that is not known to be 1 makes
narrow loads. Registers, stack, shared memory, spills and tensor-core instructions are read from the machine code.

On sm_90 no kernel may use wgmma in more than four warps: one that had two such products in a loop, with operands loaded outside the
pipeline, was wrong by up to 14 times on an H200 under Triton 3.6, though right interpreted (suspected:
one warp group writes what the other still reads).

sm_80, sm_90 and sm_100 are compiled to the end. sm_86 (whose shared memory sm_89 has too) is lowered as sm_80: where a case launches there
as on sm_80, sm_80's numbers count, else it is compiled. sm_120 is lowered until its shared memory is known. Counts differ between versions
of Triton: the file has limits for each version that `make aot` runs, and "spills" says of every case that spills why it may. Under another
version compilation, shared memory and wgmma are checked, and what spills is told.
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
ARCHS = (80, 86, 90, 100, 120)
LOWERED = 120  # from here on to LLVM's IR only
# sizes a launch has in multiples of 16 (channels, vocabulary, strides of them): what Triton's launcher would find out
DIVISIBLE = re.compile(r"stride_\w+|[NKCDV]|HALF")
RESOURCES = ("registers", "stack", "shared", "spills")


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def cases(module: str, arch: int):
    """The module's cases on that architecture."""
    sys.path.insert(0, str(ROOT))
    shared = importlib.import_module("fastpeft.kernels.card").SHARED[arch]
    return getattr(importlib.import_module(f"fastpeft.kernels.{module}"), "aot_cases", lambda shared: ())(shared)


class Lowered(Exception):
    """The shared memory of a kernel whose compilation ends here."""


def end_before_ptx(*args):
    """Triton's hook on its stages. Without arguments it is asked for a key of what it does, and a hash."""
    if not args:
        return "end before ptx", "end before ptx"

    def stop(source, metadata):
        raise Lowered(metadata["shared"])

    args[1]["ptx"] = stop


def compile_one(kernel, signature: dict, constexprs: dict, options: dict, arch: int):
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # inside autotune or heuristics
    names = kernel.arg_names
    unknown = (set(signature) | set(constexprs)) - set(names)
    assert not unknown, f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}"
    types = {name: signature.get(name, "constexpr") for name in names}
    specialised = [not param.do_not_specialize for param in kernel.params]
    aligned = [i for i, n in enumerate(names) if types[n][0] == "*" or (types[n] == "i32" and DIVISIBLE.fullmatch(n) and specialised[i])]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constexprs.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
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
    case = next(case for case in cases(module, arch) if case[0] == name)
    triton.knobs.runtime.add_stages_inspection_hook = end_before_ptx if arch >= LOWERED else None
    try:
        found = resources(compile_one(*case[1:], arch))
        found |= {"warps": case[4].get("num_warps", 4)} if "HGMMA" in found["tensor_cores"] else {}
    except Lowered as ended:
        found = {"shared": ended.args[0]}
    except Exception as error:  # every compiler error is a result: all of them are reported, then the run fails
        found = {"error": f"{type(error).__name__}: {error}"}
    return f"{name}/sm_{arch}", found, time.perf_counter() - begin


def jobs_of(archs: list[int], only: str) -> tuple[list[tuple[str, str, int]], list[str]]:
    """What to compile, and the names of cases that launch on sm_86 as on sm_80."""
    jobs, as_on_80 = [], []
    for module in modules():
        on_80 = {case[0]: case[3:] for case in cases(module, 80)} if {80, 86} <= set(archs) else {}
        for arch in archs:
            for name, _, _, *how in cases(module, arch):
                if only not in name:
                    continue
                if arch == 86 and on_80.get(name) == tuple(how):
                    as_on_80.append(name)
                else:
                    jobs.append((module, name, arch))
    return jobs, as_on_80


def csrc_kernels(library: Path) -> tuple[int, list[str]]:
    """How many CUDA kernels csrc's library holds, over all its architectures, and those of them that spill."""
    said = subprocess.run([BIN / "cuobjdump", "-res-usage", library], capture_output=True, text=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", said)
    return len(usage), [f"csrc: {name} keeps {stack} bytes on a stack" for name, _, stack in usage if int(stack)]


def too_large(found: dict[str, dict], as_on_80: list[str]) -> list[str]:
    """Cases that cannot be launched: a block of theirs takes more shared memory than the card has for one."""
    from fastpeft.kernels.card import SHARED

    taken = [(key, int(key.rpartition("_")[2]), got["shared"]) for key, got in found.items() if "shared" in got]
    taken += [(f"{name}/sm_86", 86, found[f"{name}/sm_80"].get("shared", 0)) for name in as_on_80]
    told = "{}: {} bytes of shared memory, where a block may have {}"
    return [told.format(key, took, SHARED[arch]) for key, arch, took in taken if took > SHARED[arch]]


def wrong_on_a_card(found: dict[str, dict]) -> list[str]:
    """Cases with wgmma in several warp groups."""
    told = "{}: wgmma in {} warps, several warp groups: two such products in a loop were wrong on an H200"
    return [told.format(key, got["warps"]) for key, got in found.items() if got.get("warps", 4) > 4]


def violations(found: dict[str, dict], limits: dict[str, dict], excused: dict[str, str]) -> list[str]:
    """Cases above their limits, and those that spill without a reason on record (``excused``: part of a name -> why)."""
    bad = []
    for key, got in found.items():
        if "registers" not in got:
            continue
        limit = limits.get(key)
        if got["spills"] and not any(part in key for part in excused):
            bad.append(f'{key}: {got["spills"]} spills; mend it, or give a reason under "spills" in the file of limits')
        if limit is None:
            bad.append(f"{key}: no limit recorded; run python bench/aot.py --write bench/aot_limits.json")
            continue
        bad += [f"{key}: {r} {got[r]} > {limit[r]}" for r in RESOURCES if got[r] > limit[r]]
        if limit["tensor_cores"] and not got["tensor_cores"]:
            bad.append(f"{key}: no tensor-core instruction, where {', '.join(limit['tensor_cores'])} was used")
    return bad


def write(file: Path, found: dict[str, dict], add: bool) -> None:
    """This version's limits into the file, a kernel a line; ``add``: to those that are there."""
    told = json.loads(file.read_text()) if file.exists() else {"spills": {}, "triton": {}}
    kept = told["triton"].get(triton.__version__, {}) if add else {}
    found = {key: {name: of for name, of in got.items() if name != "warps"} for key, got in found.items() if "registers" in got}
    told["triton"][triton.__version__] = dict(sorted((kept | found).items()))
    text = json.dumps(told | {"triton": dict(sorted(told["triton"].items()))}, indent=1)
    file.write_text(re.sub(r"\{\s+(\"registers[^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--library", type=Path, metavar="FILE", help="csrc as it was built with nvcc: its CUDA kernels are looked at too")
    args = parser.parse_args()

    jobs, as_on_80 = jobs_of(args.arch, args.only)
    found = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for key, got, seconds in pool.map(work, jobs):
            found[key] = got
            shown = got.get("error") or "  ".join(f"{k} {v if k != 'tensor_cores' else ' '.join(v) or '-'}" for k, v in got.items())
            print(f"{key:44s} {shown}  ({seconds:.1f} s)", flush=True)

    bad = [f"{key}: does not compile: {got['error'].splitlines()[0]}" for key, got in found.items() if "error" in got]
    bad += too_large(found, as_on_80) + wrong_on_a_card(found)
    if args.write and not bad:
        write(args.write, found, add=bool(args.only))
    if args.check:
        told = json.loads(args.check.read_text())
        if limits := told["triton"].get(triton.__version__):
            bad += violations(found, limits, told["spills"])
        else:
            spills = [f"{key} ({got['spills']})" for key, got in found.items() if got.get("spills")]
            print(f"limits are those of triton {', '.join(told['triton'])}; under {triton.__version__} none is held to. Spilling:", *spills)
    built, spilling = csrc_kernels(args.library) if args.library else (0, [])
    if args.library and not built:
        bad.append(f"{args.library} holds no CUDA kernel: build it with FASTPEFT_CUDA=1")
    bad += spilling
    told = f"{len(found)} compilations ({len(as_on_80)} more on sm_86 as on sm_80) and {built} built CUDA kernels, all within limits"
    print(f"triton {triton.__version__}:", "\n".join(bad) or told)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
