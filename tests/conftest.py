"""For every test: the interpreter's bfloat16 repaired, fixed seeds, uninitialised memory full of NaN, and a list of what was skipped."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if "FASTPEFT_TESTS_WITHOUT_TORCHAO" not in os.environ:  # an old peft fails on a new torchao: make test-oldest goes without
    sys.path.append(f"{sys.prefix}/torchao")  # the Makefile puts it there: for the tests alone, before transformers looks for it


def _load(path: Path):
    """A module beside this file: tests are no package, on purpose (pyproject.toml)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load(Path(__file__).with_name("_bf16_interp.py")).install()  # before any kernel runs

_skips = _load(Path(__file__).with_name("_skips.py"))
pytest_addoption, pytest_configure = _skips.pytest_addoption, _skips.pytest_configure

BACKEND = os.environ.get("FASTPEFT_BACKEND") or "native"


def pytest_report_header() -> str:
    return f"fastpeft: backend {BACKEND}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What is imported by now stays: no collection of garbage looks at it again, nor copies its pages in a forked process."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind calls what triton made leaked


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """A short run waits for the disk a third of its time. Here nothing need last: tests/crash/crash_disk.py sees what is synced when."""
    fsync, os.fsync = os.fsync, lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None
    yield
    os.fsync = fsync


@pytest.fixture(scope="session")
def miss():
    """The smallest MISS and what to do with it: tests/_miss.py."""
    return _load(Path(__file__).with_name("_miss.py"))


@pytest.fixture(scope="session")
def products():
    """A mode that notes ATen's products: tests/_products.py."""
    return _load(Path(__file__).with_name("_products.py")).Products


@pytest.fixture(scope="session")
def runs():
    """Short training runs: tests/_runs.py."""
    return _load(Path(__file__).with_name("_runs.py"))


@pytest.fixture(scope="session")
def ranks():
    """A function on several ranks at once: tests/_ranks.py."""
    return _load(Path(__file__).with_name("_ranks.py"))


@pytest.fixture(scope="session")
def phantoms(runs, tmp_path_factory):
    """A folder of phantoms in Slake's layout: 50 training and 20 test questions."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads wait for each other: on two busy cores they take twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def methods_restored():
    """Methods that a test registers are gone after it."""
    from fastpeft.methods import METHODS
    from fastpeft.methods.base import ADAPTER_MODULES, is_adapter

    names, modules = dict(METHODS), list(ADAPTER_MODULES)
    yield
    METHODS.clear()
    METHODS.update(names)
    ADAPTER_MODULES[:] = modules
    is_adapter.cache_clear()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison():
    """ATen fills what empty() returns with NaN, C++ callers included: an element nobody wrote cannot pass for a zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
