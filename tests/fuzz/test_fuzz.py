"""Two thousand drawn cases against everything that reads files and command lines; and the fuzzer's own eyes."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_mutations as mutate
from fuzz import GROWTH, Fuzz, memory


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    made = Fuzz(tmp_path_factory.mktemp("fuzz"))
    heavy = {"adapter", "model", "state", "command line", "recipe", "report", "study", "original llama"}  # ten times the others
    made.names = [name for name in made.names if name not in heavy] * 4 + sorted(heavy)
    return made


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_cases(fuzz):
    before = memory()
    for number in range(2000):
        fuzz.case(number)
    assert fuzz.failures == [] and memory() - before < GROWTH
    assert set(fuzz.done) == set(fuzz.names) and sum(fuzz.refused.values()) > 800  # neither all accepted nor all refused


@pytest.mark.parametrize("error", [TypeError("x"), ValueError("two\nlines"), RuntimeError("x")])
def test_what_is_no_line_is_a_failure(fuzz, monkeypatch, error):
    def fails(draw):
        raise error

    monkeypatch.setattr(fuzz, "targets", dict.fromkeys(fuzz.targets, (1, fails)))
    monkeypatch.setattr(fuzz, "failures", [])
    fuzz.case(0)
    assert len(fuzz.failures) == 1


def test_a_hang_is_a_failure(fuzz, monkeypatch):
    def hangs(draw):
        while True:
            pass

    monkeypatch.setattr("fuzz.SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "targets", dict.fromkeys(fuzz.targets, (1, hangs)))
    monkeypatch.setattr(fuzz, "failures", [])
    fuzz.case(0)
    assert len(fuzz.failures) == 1 and "over 0.1 s" in fuzz.failures[0][2]


def test_changes_are_drawn_from_the_number_alone():
    value = {"a": [1, {"b": None}], "c": "d"}
    made = [mutate.text_of(mutate.document(value, random.Random(n))) for n in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and value == {"a": [1, {"b": None}], "c": "d"}
