"""Skipped tests are listed with their reasons; --known-skips fails on a reason that is not in tests/_skips.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = Path(__file__).with_name("_skips.py")
CONFTEST = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("skips", {str(SKIPS)!r})
skips = importlib.util.module_from_spec(spec)
spec.loader.exec_module(skips)
pytest_addoption, pytest_configure = skips.pytest_addoption, skips.pytest_configure
"""
TESTS = """
import pytest
@pytest.mark.parametrize("n", range(6))
def test_gpu(n):
    if n:
        pytest.skip("needs a CUDA device")
@pytest.mark.parametrize("n", range(6))
def test_some(n):
    if n > 3:
        pytest.skip("{reason}")
@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False
"""


@pytest.fixture
def session(tmp_path):
    def run(reason, *options, whole_file=""):
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_cases.py").write_text(TESTS.replace("{reason}", reason))
        (tmp_path / "test_file.py").write_text(whole_file)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tmp_path), "--rootdir", str(tmp_path)]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not as a worker of this session
        done = subprocess.run(command, cwd=tmp_path, env=plain | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("workers", [[], ["-p", "xdist.plugin", "-n", "2"]], ids=["alone", "xdist"])
def test_an_unknown_reason_fails_the_session(session, workers):
    code, said = session("too warm today", "--known-skips", *workers)
    assert code == 1 and "ERROR: not a known reason to skip a test: too warm today" in said
    assert "2 skipped: too warm today\n    test_cases.py::test_some [4, 5]\n" in said
    assert "5 skipped: needs a CUDA device\n    test_cases.py::test_gpu [5 cases]\n" in said and "expected" not in said


def test_known_reasons_do_not(session):
    code, said = session("the real VQA-RAD isn't in /some/folder", "--known-skips")
    assert code == 0 and "2 skipped: the real VQA-RAD isn't in /some/folder" in said and "ERROR" not in said
    code, said = session("too warm today")
    assert code == 0 and "2 skipped: too warm today" in said  # a plain run lists and judges nothing


@pytest.mark.parametrize("workers", [[], ["-p", "xdist.plugin", "-n", "2"]], ids=["alone", "xdist"])
def test_a_module_that_skips_itself_counts(session, workers):
    missing = "import pytest\npytest.importorskip('no_such_package')\ndef test(): pass\n"
    code, said = session("there is one", "--known-skips", *workers, whole_file=missing)
    assert code == 1 and "1 skipped: could not import 'no_such_package': No module named 'no_such_package'\n    test_file.py\n" in said
