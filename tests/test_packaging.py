"""What a wheel holds, and what a checkout must never shadow: see fastpeft/kernels/__init__.py."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from fastpeft import _library

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))

USE = """
import torch, fastpeft as fp
model = fp.build("miss-tiny", pretrained=False)
fp.adapt(model, "F/LoRA/IA3", r=2)
ids = torch.tensor([[4, 9, 3]])
model(input_ids=ids, pixel_values=torch.randn(1, 3, 64, 64), labels=ids).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""


def python(code: str, cwd: Path, **env: str) -> str:
    """What ``code`` prints in a fresh process; fails with its stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_checkout_has_no_package_called_kernels():
    assert KERNELS and not (ROOT / "kernels" / "__init__.py").exists()
    assert not list(ROOT.glob("tests/**/__init__.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_the_package_transformers_looks_for_wins_over_the_checkout(tmp_path):
    """Hugging Face's `kernels`, wherever it stands on the path, even behind the checkout's root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mine = False\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.mine)"
    assert python(code, ROOT) == "False"


def test_transformers_imports_under_pytest():
    import transformers.modeling_utils

    assert transformers.modeling_utils.PreTrainedModel
    loaded = sys.modules.get("kernels")
    assert loaded is None or not str(loaded.__file__).startswith(str(ROOT))


def test_every_kernel_is_found_as_part_of_fastpeft():
    for name in KERNELS:
        assert Path(importlib.util.find_spec(f"fastpeft.kernels.{name[:-3]}").origin) == ROOT / "kernels" / name


def test_the_package_runs_without_triton():
    """Nothing imports triton before a kernel runs; without it, CUDA tensors are served by ATen, and that is said."""
    code = "import sys; sys.modules['triton'] = None\nimport fastpeft.cli" + USE
    code += "from fastpeft._library import backend_of; print(backend_of()['lora_linears_fwd']['CUDA'])"
    assert python(code, ROOT, FASTPEFT_BACKEND="") == "composite (triton is not installed)"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the build reads, so that it leaves nothing in this checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("csrc", "fastpeft", "kernels", "tests", "bench"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore) if (ROOT / name).is_dir() else None
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder) if (ROOT / name).is_file() else (folder / name).write_text("absent\n")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The pure-Python wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out), str(checkout)]
    done = subprocess.run(command, env=os.environ | {"FASTPEFT_NO_EXT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl") and not any(name.endswith(".so") for name in names)
    assert {name.split("/")[0] for name in names} == {"fastpeft", wheel.name.split("-py3")[0] + ".dist-info"}
    assert {f"fastpeft/kernels/{name}" for name in [*KERNELS, "__init__.py"]} <= set(names)
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "fastpeft").rglob("*") if path.is_file() and path.suffix in (".py", ".j2")}
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "fastpeft" / "assets").rglob("*") if path.is_file()}
    assert here | {name for name in assets if not name.endswith(".pyc")} <= set(names)
    points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "fastpeft = fastpeft.cli:main" in zipfile.ZipFile(wheel).read(points).decode()


@pytest.mark.slow
def test_a_pure_python_install_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = USE + "from fastpeft._library import backend_of; import fastpeft.kernels.lora_linear as k, os\n"
    code += "print(fp.__file__, k.__file__, backend_of()['layer_norm_fwd']['CPU'], sep=os.linesep)"
    package, kernel, backend = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"), FASTPEFT_BACKEND="").splitlines()
    assert package == str(tmp_path / "site" / "fastpeft" / "__init__.py")
    assert kernel == str(tmp_path / "site" / "fastpeft" / "kernels" / "lora_linear.py")
    assert backend.startswith("composite (csrc was not built")


@pytest.mark.slow
def test_what_an_install_from_source_compiles(checkout, tmp_path):
    """In an environment that has torch, csrc, although pip's isolated build does not see torch; without torch or without a compiler,
    nothing, and the build says why."""
    venv.create(tmp_path / "env", with_pip=True)
    packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    pip = [str(tmp_path / "env" / "bin" / "pip"), "--disable-pip-version-check", "install", "-v", "--no-deps", "--force-reinstall"]

    def install(**env: str) -> str:
        done = subprocess.run([*pip, str(checkout)], env=os.environ | env, capture_output=True, text=True)
        if "No matching distribution found for setuptools" in done.stdout + done.stderr:
            pytest.skip("pip's isolated build needs a package index for setuptools")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "torch is not installed here" in install()
    assert not list(packages.glob("fastpeft/_C*"))
    (packages / "torch").symlink_to(Path(torch.__file__).parent)
    assert "no C++ compiler (nowhere-to-be-found)" in install(CXX="nowhere-to-be-found")
    assert not list(packages.glob("fastpeft/_C*"))
    said = install(FASTPEFT_CUDA="auto")
    suffixes = (".cpp", ".cu") if torch.version.cuda else (".cpp",)
    compiled = [str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    assert sorted(re.findall(r"csrc/(\S+)", said)) == sorted(compiled)
    assert list(packages.glob("fastpeft/_C.abi3.so")) and "warning: a pure Python install" not in said
    assert list(packages.glob(f"fastpeft/{_library.autograd_name(torch.__version__)}.*.so"))


@pytest.mark.slow
def test_a_source_distribution_can_be_built_from(checkout, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    name = python(code, checkout).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {member.partition("/")[2] for member in archive.getnames()}
    wanted = {f"kernels/{name}" for name in KERNELS} | {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert wanted | {"setup.py", "pyproject.toml", "fastpeft/report/report.html.j2"} <= held


def test_what_csrc_is_compiled_for(monkeypatch):
    """Machine code for each architecture, and PTX of the last one for cards that are newer than all of them."""
    monkeypatch.setattr("setuptools.setup", lambda **how: None)
    monkeypatch.chdir(ROOT)
    built = runpy.run_path("setup.py")["cuda_architectures"]
    monkeypatch.delenv("FASTPEFT_CUDA_ARCHS", raising=False)
    real = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]
    assert built() == [*real, "-gencode=arch=compute_100,code=compute_100"]
    monkeypatch.setenv("FASTPEFT_CUDA_ARCHS", "86,90")
    assert [flag.rpartition("code=")[2] for flag in built()] == ["sm_86", "sm_90", "compute_90"]
