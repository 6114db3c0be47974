"""Build: Python packages, and one C++/CUDA library on LibTorch's stable ABI (no Python symbols, loads without a GPU).

Beside it csrc/autograd, a module for this Python and exactly this torch: autograd has no stable ABI. Where it does not compile, or torch is
another, the same in Python serves.

It needs a C++ compiler, and torch in the environment that it is installed into (its headers and libraries; it is not imported, so a build
in isolation finds it too). Where one is missing, the install is pure Python, and says so: everything works, on PyTorch's own operators.

Environment:
    FASTPEFT_NO_EXT=1              pure Python, asked for
    CXX=g++                        the C++ compiler (default: the first of g++, clang++, c++)
    FASTPEFT_CUDA=auto|0|1|alone   compile csrc/*.cu (auto: where torch is a CUDA build and nvcc is found; 1 needs no GPU and no CUDA torch;
                                   alone: nothing else, a library to look at)
    FASTPEFT_CUDA_ARCHS=80;90;100  real architectures; PTX of the last one is added, which newer cards compile for themselves
    FASTPEFT_LABEL=cpu             a local version, 0.1.0+cpu, as `make wheel` names its wheels
    FASTPEFT_NVCC=/path/to/nvcc    another nvcc than PATH's. The library needs a driver for its CUDA: what is published is built with 12.8
                                   (any driver from 525 on); CUDA 13 asks for 580. Elsewhere ATen serves, and `fastpeft doctor` says why

The library says what it was made from (fastpeft_build): it is not made again from the same.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.command.build_py import build_py as _build_py
from setuptools.errors import CompileError

STABLE_ABI = "0x020a000000000000"  # 2.10: the oldest torch the binary must load in
COMPILERS = ("g++", "clang++", "c++")


class build_py(_build_py):
    """Ship the top-level kernels/*.py as fastpeft/kernels/*.py."""

    def run(self):
        super().run()
        if pure and os.environ.get("FASTPEFT_NO_EXT") != "1":
            print(f"fastpeft: warning: a pure Python install, on PyTorch's own operators: {pure}", file=sys.stderr, flush=True)

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "fastpeft.kernels":
            modules += [(package, p.stem, str(p)) for p in sorted(Path("kernels").glob("*.py"))]
        return modules


class build_ext(_build_ext):
    """Call g++ and nvcc directly: torch.utils.cpp_extension cannot build CUDA on a CPU torch."""

    def build_extension(self, ext):
        torch = find_torch()
        tmp, out = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        tmp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        if "autograd" not in ext.name:
            self.build_library(ext, torch, tmp, out)
        elif not cuda_alone():
            self.build_autograd(ext, torch, tmp, out)

    def build_autograd(self, ext, torch, tmp, out):
        cxx = find_compiler()
        made_from = build_stamp(cxx, None, "csrc/autograd")
        if not self.force and out.is_file() and made_from.encode() in out.read_bytes():
            print(f"fastpeft: {out.name} is up to date", flush=True)
            return
        flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-s", f"-DTORCH_EXTENSION_NAME={ext.name.split('.')[1]}"]
        flags += [f'-DFASTPEFT_BUILD="{made_from}"', *(f"-I{torch / folder}" for folder in ("include", "include/torch/csrc/api/include"))]
        flags += [f"-I{sysconfig.get_path('include')}", f"-L{torch / 'lib'}", "-Wl,--no-as-needed"]
        libraries = [f"-l{name}" for name in ("torch", "torch_cpu", "c10", "torch_python")]
        result = compiled([cxx, *flags, "-o", str(out), *ext.sources, *libraries], *ext.sources)
        if result.returncode:
            raise CompileError("csrc/autograd did not compile with this torch and Python; autograd in Python serves")

    def build_library(self, ext, torch, tmp, out):
        include = [f"-I{torch / 'include'}", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        cxx = find_compiler()
        nvcc = find_nvcc(torch)
        made_from = build_stamp(cxx, nvcc, "csrc")
        if not self.force and out.is_file() and made_from.encode() in out.read_bytes():
            print(f"fastpeft: {out.name} is up to date", flush=True)
            return
        stamp = tmp / "build.cpp"
        stamp.write_text(f'extern "C" __attribute__((visibility("default"))) const char* fastpeft_build() {{ return "{made_from}"; }}\n')
        jobs, objects, link = [], [], []
        for source in [*(() if cuda_alone() else ext.sources), str(stamp)]:
            objects.append(str(tmp / (Path(source).stem + ".cpp.o")))
            flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"]
            jobs.append([cxx, *flags, *include, "-c", source, "-o", objects[-1]])
        if nvcc:
            for source in sorted(Path("csrc").glob("*.cu")):
                objects.append(str(tmp / (source.stem + ".cu.o")))
                flags = ["-std=c++17", "-O3", *cuda_architectures(), "-t", "0", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
                jobs.append([nvcc, *flags, *include, "-c", str(source), "-o", objects[-1]])
            # the CUDA runtime goes inside: the library then loads on machines without CUDA
            link = [f"-L{static_cudart(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in pool.map(lambda job: compiled(job, job[-3]), jobs):
                if result.returncode:
                    raise RuntimeError(f"compilation failed: {' '.join(map(str, result.args))}\nwithout it: FASTPEFT_NO_EXT=1")
        # libtorch.so must stay in DT_NEEDED: through it the weak CUDA symbol is found on a GPU machine
        torch_libs = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        subprocess.check_call([cxx, "-shared", "-s", "-o", str(out), *objects, *torch_libs, "-Wl,--exclude-libs,ALL", *link])


def build_stamp(cxx, nvcc, folder):
    """What a library is made from: its CUDA (0.0: none), and a hash of sources, this file, compilers and flags."""
    said = [subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout for compiler in (cxx, nvcc) if compiler]
    cuda = re.search(r"release (\d+\.\d+)", said[1])[1] if nvcc else "0.0"
    files = [Path("setup.py"), *sorted(Path(folder).glob("*.*"))]
    told = [*said, STABLE_ABI, *(cuda_architectures() if nvcc else ()), *(file.read_text() for file in files)]
    return f"cuda {cuda} sources {hashlib.sha256(chr(0).join(told).encode()).hexdigest()}"


def compiled(command, source):
    """Run one compiler, said before, as a CUDA file takes a minute."""
    print(f"fastpeft: {Path(command[0]).name} {source}", flush=True)
    return subprocess.run(command)


def find_torch():
    """Folder of torch in the environment that is installed into, which pip's isolated build has not on sys.path; None: there is none."""
    places = [*sys.path, *(sysconfig.get_path(kind) for kind in ("platlib", "purelib"))]
    return next((torch for place in places if (torch := Path(place or ".") / "torch") and (torch / "include").is_dir()), None)


def find_compiler():
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, COMPILERS)), None)


def autograd_name(torch):
    """As fastpeft/_library.py looks for it."""
    version = re.search(r"^__version__\s*=\s*['\"](.+)['\"]$", (torch / "version.py").read_text(), re.MULTILINE)[1]
    return "_autograd_2_" + re.sub(r"\W", "_", version)


def built_for_cuda(torch):
    said = re.search(r"^cuda\b[^=]*=\s*(.+)$", (torch / "version.py").read_text(), re.MULTILINE)
    return said is not None and said[1].strip() != "None"


def why_pure():
    """'' or why csrc is not compiled."""
    if os.environ.get("FASTPEFT_NO_EXT") == "1":
        return "FASTPEFT_NO_EXT=1"
    if find_torch() is None:
        return "torch is not installed here; install it first, then fastpeft once more"
    if find_compiler() is None:
        return f"no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)}) on PATH"
    return ""


def cuda_alone():
    return os.environ.get("FASTPEFT_CUDA") == "alone"


def find_nvcc(torch):
    want = os.environ.get("FASTPEFT_CUDA", "auto")
    if want == "auto" and not built_for_cuda(torch):
        return None
    nvcc = os.environ.get("FASTPEFT_NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if want in ("1", "alone") and not nvcc:
        raise RuntimeError(f"FASTPEFT_CUDA={want} but nvcc was not found on PATH or in /usr/local/cuda/bin")
    return nvcc if want != "0" and any(Path("csrc").glob("*.cu")) else None


def cuda_architectures():
    archs = os.environ.get("FASTPEFT_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";")
    real = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*real, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def static_cudart(nvcc):
    """Folder of libcudart_static.a, from what nvcc itself says its root is."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    said = subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)
    top = Path(os.path.realpath(said.split("TOP=", 1)[1].splitlines()[0]))
    for folder in (top / "lib64", top / "lib", top / "targets/x86_64-linux/lib"):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise RuntimeError(f"libcudart_static.a not found under {top}; set FASTPEFT_CUDA=0 to build without CUDA")


def version():
    """fastpeft/__init__.py's, with FASTPEFT_LABEL as the local part."""
    number = re.search(r'^__version__ = "(.+)"$', Path("fastpeft/__init__.py").read_text(), re.MULTILINE)[1]
    label = os.environ.get("FASTPEFT_LABEL")
    return f"{number}+{label}" if label else number


def extensions():
    autograd = sorted(map(str, Path("csrc/autograd").glob("*.h")))
    name, main = f"fastpeft.{autograd_name(find_torch())}", "csrc/autograd/module.cpp"
    return [
        Extension("fastpeft._C", sources, depends=sorted(map(str, Path("csrc").glob("*.*"))), py_limited_api=True),
        Extension(name, [main], depends=autograd, optional=True),
    ]


sources = sorted(map(str, Path("csrc").glob("*.cpp")))
pure = why_pure() if sources else "csrc is not here"
setup(
    version=version(),
    cmdclass={"build_py": build_py, "build_ext": build_ext},
    ext_modules=[] if pure else extensions(),
    options={} if pure else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
