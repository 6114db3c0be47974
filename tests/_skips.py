"""Plugin that lists every skipped test with its reason; with ``--known-skips`` an unknown reason fails the session.

Reports reach the process that prints, pytest-xdist's controller too, which runs no test itself.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict

import pytest

# What may be skipped in `make test`, and why no other run of it is missing. A package that requirements.txt installs is no reason.
KNOWN = [
    r"needs a CUDA device",  # make gpu; make test-cuda runs those of the ops and of training on a lookalike
    r"needs tests/cuda/lookalike.py: .*",  # make test-cuda
    r"needs a second CUDA device",  # make test-cuda has two
    r"there is one",  # what a machine without a GPU is told
    r"make test-cuda compiles the CUDA sources for the CPU",
    r"the same in every mode",  # runs once, in make test-native
    r"the kernels' own choices",  # make test-triton
    r"make test-trainers has (trl|Lightning|kernels)(: .*)?",
    r"this peft has no (\w+Config|such start)",  # make test-oldest
    r"Triton's kernels multiply as they do on a GPU",  # make test-native and make test-composite
    r"PEFT is compared in the other modes",
    r"ATen cuts its sums by thread",  # of csrc, in make test-native
    r"draws another mask on another device",
    r"torch.compile cannot look into manual_seed; test_compiles_with_dropout has these",
    r"no params.json beside this checkout; the rows above are in this file",
    r"the papers' tables are not here",
    r"the real VQA-RAD isn't in .*",
]
if sys.platform != "linux":
    KNOWN.append(r"could not import '(bitsandbytes|torchao)[.\w]*'.*")  # requirements.txt has them for Linux alone


def pytest_addoption(parser):
    parser.addoption("--known-skips", action="store_true", help="fail on a reason to skip a test that tests/_skips.py does not know")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(config.getoption("known_skips")), "skips")


class Skips:
    def __init__(self, strict: bool):
        self.strict = strict
        self.tests: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # reason -> function -> cases

    def pytest_runtest_logreport(self, report):
        self._note(report)

    def pytest_collectreport(self, report):  # a module that skips itself
        self._note(report)

    def _note(self, report) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            function, _, case = report.nodeid.partition("[")
            cases = self.tests[reason.removeprefix("Skipped: ")][function]
            if case.removesuffix("]") not in cases:  # each worker collects
                cases.append(case.removesuffix("]"))

    @property
    def unknown(self) -> list[str]:
        return [reason for reason in self.tests if not any(re.fullmatch(known, reason, re.DOTALL) for known in KNOWN)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.strict and self.unknown and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        if self.tests:
            terminalreporter.section("skipped tests")
        for reason, functions in sorted(self.tests.items()):
            write(f"{sum(map(len, functions.values()))} skipped: {reason}")
            for function, cases in sorted(functions.items()):
                named = "" if cases == [""] else f" [{', '.join(sorted(cases))}]" if len(cases) <= 3 else f" [{len(cases)} cases]"
                write(f"    {function}{named}")
        for reason in self.unknown if self.strict else ():
            write(f"ERROR: not a known reason to skip a test: {reason}", red=True)
            write("    Let the test run (a package: name it in requirements.txt or the Makefile), or add the reason to tests/_skips.py.")
