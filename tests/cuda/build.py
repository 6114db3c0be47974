"""What stands in for a GPU in tests, compiled: python tests/cuda/build.py FOLDER

FOLDER/emulated.so: csrc's CUDA sources for the CPU, through cuda_runtime.h beside this file, and faulty.cu, whose faults the sanitizer must
find. The library registers its kernels for CPU tensors; with FASTPEFT_LIBRARY=FOLDER/emulated.so every test of the row-wise ops runs on
them. -fsanitize=thread is for its calls at each access to memory alone: what they call is sanitizer.cpp, not ThreadSanitizer.
FOLDER/lookalike.so: lookalike.cpp, which lookalike.py loads.
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
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # as in setup.py


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    cxx = os.environ.get("CXX", "g++")
    flags = ["-fPIC", "-fvisibility=hidden", f"-isystem{TORCH / 'include'}"]
    emulated = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fsanitize=thread", "-DFASTPEFT_EMULATED", *STABLE]
    emulated += [f"-I{HERE}", f"-I{CSRC}"]
    # the emulator first: what its objects have of the standard library is then linked, not what calls the sanitizer
    jobs = {HERE / f"{name}.cpp": ["-std=c++20", "-O2", "-Wall"] for name in ("emulator", "sanitizer")}
    jobs |= {source: [*emulated, "-x", "c++"] for source in [*sorted(CSRC.glob("*.cu")), HERE / "faulty.cu"]}
    jobs[HERE / "lookalike.cpp"] = ["-std=c++20", "-O0"]
    made = {source: folder / f"{source.stem}.o" for source in jobs}
    commands = [[cxx, *flags, *more, "-c", str(source), "-o", str(made[source])] for source, more in jobs.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(job.returncode for job in pool.map(subprocess.run, commands)):
            return 1
    link = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    for name in ("emulated", "lookalike"):
        objects = [str(made[source]) for source in jobs if (source.stem == "lookalike") == (name == "lookalike")]
        if subprocess.run([cxx, "-shared", "-Wl,--no-undefined", "-o", str(folder / f"{name}.so"), *objects, *link]).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
