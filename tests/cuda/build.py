"""Compile csrc's CUDA sources for the CPU, through cuda_runtime.h beside this file: python tests/cuda/build.py OUT.so

The library registers its kernels for CPU tensors. With FASTPEFT_LIBRARY=OUT.so every test of the row-wise ops runs on them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent


def main(out: Path) -> int:
    out.parent.mkdir(parents=True, exist_ok=True)
    cxx = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DFASTPEFT_EMULATED"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE}", f"-isystem{TORCH / 'include'}"]
    objects = {source: out.with_suffix(f".{source.stem}.o") for source in sorted(CSRC.glob("*.cu"))}
    jobs = [[cxx, *flags, "-x", "c++", "-c", str(source), "-o", str(made)] for source, made in objects.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(job.returncode for job in pool.map(subprocess.run, jobs)):
            return 1
    link = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    return subprocess.run([cxx, "-shared", "-o", str(out), *map(str, objects.values()), *link]).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
