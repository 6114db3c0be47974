"""ScienceQA's letters and columns, against counts made by hand."""

import dataclasses
from pathlib import Path

import pytest

from fastpeft.data import Instruction
from fastpeft.evaluate.scienceqa import COLUMNS, parse_answer, score_scienceqa


def raises(text: str):
    return pytest.raises(ValueError, match=text)


@pytest.mark.parametrize(
    "text, index",
    [
        ("The answer is B.", 1),
        ("The answer is B", 1),
        ("the answer is (C).", 2),
        ("Maps have arrows. The answer is A. BECAUSE: The answer is B.", 0),  # the first
        ("Options: (A) x (B) y\nResponse:The answer is C. BECAUSE: x", 2),
        ("The answer is: B.", 1),
        ("B", 1),
        (" (B) Utah", 1),
        ("C. Iowa", 2),
        ("The answer is D.", None),  # three choices
        ("The answer is Bermuda.", None),
        ("A", 0),
        ("Apples", None),
        ("the answer is b.", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_letters(text, index):
    assert parse_answer(text, 3) == index


def problem(subject="natural science", grade="grade1", text=False, image=False, answer=0) -> Instruction:
    facts = {"subject": subject, "grade": grade, "topic": "", "choices": ["a", "b"], "answer": answer}
    facts |= {"has_text": text, "has_image": image}
    return Instruction((("Q", "The answer is A."),), None, "scienceqa", "7", "7", Path("problems.json"), facts=facts)


def test_columns():
    samples = [
        problem(),  # right
        problem("social science", "grade6", text=True),  # wrong
        problem("language science", "grade7", image=True, answer=1),  # right
        problem("natural science", "grade12", text=True, image=True),  # right
        problem("natural science", "grade8", text=True),  # no letter
    ]
    responses = ["The answer is A.", "The answer is B.", "The answer is B.", "A", "?"]
    scores = score_scienceqa(responses, samples)
    assert tuple(scores)[: len(COLUMNS)] == COLUMNS
    assert scores["NAT"] == pytest.approx(2 / 3) and scores["SOC"] == 0 and scores["LAN"] == 1
    assert scores["TXT"] == pytest.approx(1 / 3) and scores["IMG"] == 1 and scores["NO"] == 1
    assert scores["G1-6"] == 0.5 and scores["G7-12"] == pytest.approx(2 / 3) and scores["Avg"] == 0.6
    assert scores["n"] == {"NAT": 3, "SOC": 1, "LAN": 1, "TXT": 3, "IMG": 2, "NO": 1, "G1-6": 2, "G7-12": 3, "Avg": 5}
    assert scores["unparsed"] == 1


def test_empty_columns_and_bad_calls():
    scores = score_scienceqa(["The answer is A."], [problem()])
    assert scores["SOC"] is None and scores["G7-12"] is None and scores["Avg"] == 1
    with raises("2 responses for 1 samples"):
        score_scienceqa(["a", "b"], [problem()])
    with raises("sample 7 is of alpaca, not of load_scienceqa"):
        score_scienceqa(["a"], [Instruction((("Q", "A"),), None, "alpaca", "7", 0, Path("a.json"))])


def test_unparsed_responses_count_as_wrong_or_are_drawn():
    """A draw depends on the seed and the problem alone, and is right about once in as many as there are choices."""
    problems = [dataclasses.replace(problem(answer=i % 2), qid=str(i)) for i in range(300)]
    wrong = score_scienceqa([""] * 300, problems)
    assert (wrong["Avg"], wrong["unparsed"], wrong["unparsed_are"]) == (0.0, 300, "wrong")
    drawn = score_scienceqa([""] * 300, problems, draw_unparsed=1)
    choices = len(problems[0].facts["choices"])
    assert abs(drawn["Avg"] - 1 / choices) < 0.1 and drawn["unparsed"] == 300 and drawn["unparsed_are"] == "drawn with seed 1"
    assert score_scienceqa([""] * 300, problems, draw_unparsed=1) == drawn
    backwards = score_scienceqa([""] * 300, problems[::-1], draw_unparsed=1)
    assert backwards["Avg"] == drawn["Avg"]
    known = [f"The answer is {'AB'[p.facts['answer']]}." for p in problems]
    assert score_scienceqa(known, problems, draw_unparsed=1)["Avg"] == 1.0
