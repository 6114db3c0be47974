"""Accuracies of answers in sentences, against counts made by hand."""

from pathlib import Path

import pytest

from fastpeft.data import Instruction, Sample
from fastpeft.evaluate.free_text import Candidates, contains, first_yes_no, overlap, score_free_text
from fastpeft.evaluate.scoring import Scoring


def asked(answer: str, kind: str | None = "OPEN", content: str = "", n: int = 0) -> Instruction:
    facts = {"answer_type": kind, "content_type": content} if kind else {}
    return Instruction((("Question?", answer),), None, "vqa", str(n), n, Path("d.json"), facts=facts)


@pytest.mark.parametrize(
    "response, answer, inside",
    [
        ("Yes, there is a fracture.", "yes", True),
        ("The findings are normal.", "no", False),  # no substring counts
        ("It is in the Left Lung.", "left lung", True),
        ("left upper lung", "left lung", False),
        ("An X - Ray.", "x-ray", True),
        ("Maladie de Ménière", "meniere", True),
        ("", "yes", False),
        ("...", "...", True),
    ],
)
def test_contains_whole_words(response, answer, inside):
    assert contains(response, answer) is inside


def test_overlap_counts_each_word_as_often_as_both_have_it():
    assert overlap("the lung, the left lung", "left lung lung lung") == {"precision": 3 / 5, "recall": 3 / 4, "f1": 2 * 0.6 * 0.75 / 1.35}
    assert overlap("", "lung") == overlap("heart", "lung") == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    "response, word",
    [("No, not yes.", "no"), ("It is normal", None), ("Nothing; yes", "yes"), ("YES", "yes"), ("eyes", None), ("", None)],
)
def test_first_yes_or_no(response, word):
    assert first_yes_no(response) == word


def test_the_nearest_candidate():
    training = [asked("lung"), asked("left lung"), asked("right lung"), asked("CT", "OPEN", "Modality"), asked("yes", "CLOSED")]
    candidates = Candidates(training)
    assert candidates.nearest("This is the left lung.", asked("left lung")) == "left lung"  # both whole: the longer
    assert candidates.nearest("the lung on the left or right", asked("x")) == "left lung"  # equals: the first
    assert candidates.nearest("a lung", asked("x")) == "lung"
    assert candidates.nearest("nothing of it", asked("x")) is None
    assert candidates.nearest("yes, the lung", asked("yes", "CLOSED")) == "yes"
    assert candidates.nearest("A CT of the left lung", asked("CT", "OPEN", "Modality")) == "ct"  # of the same content type
    assert candidates.nearest("A CT of the left lung", asked("x", "OPEN", "Organ")) == "left lung"  # a type without answers: all open ones
    assert not Candidates([]) and Candidates([]).nearest("lung", asked("lung")) is None


TRAINING = [asked("left lung"), asked("liver"), asked("yes", "CLOSED"), asked("no", "CLOSED"), asked("left", "CLOSED")]
ASKED = [asked("liver"), asked("left lung"), asked("yes", "CLOSED"), asked("no", "CLOSED"), asked("left", "CLOSED"), asked("free", None)]
SAID = ["It shows the liver.", "liver", "Yes, there is a fracture.", "The lungs are normal.", "On the left side.", "free"]


def test_what_fills_the_accuracies():
    scores = score_free_text(SAID, ASKED, Candidates(TRAINING), sentences=True)
    assert scores["filled_by"] == {"open": "candidate", "closed": "yes_no, else candidate", "other": "exact"}
    assert (scores["open"], scores["closed"], scores["global"]) == (1 / 2, 2 / 3, 4 / 6)  # "normal" says no "no", and is in the denominator
    free = scores["free_text"]
    assert free["exact"] == {"open": 0.0, "closed": 0.0, "global": 1 / 6}
    assert free["contains"] == {"open": 1 / 2, "closed": 2 / 3, "global": 4 / 6}
    assert free["yes_no"] == {"open": None, "closed": 1 / 2, "global": 1 / 2}
    assert free["candidate"]["open"] == 1 / 2 and free["precision"]["open"] == pytest.approx((1 / 4 + 0) / 2)
    assert free["recall"]["open"] == 1 / 2 and free["f1"]["open"] == pytest.approx(0.4 / 2)


def test_a_model_that_answers_in_words_is_scored_exactly():
    scores = score_free_text(SAID, ASKED, Candidates(TRAINING), sentences=False)
    assert set(scores["filled_by"].values()) == {"exact"} and (scores["open"], scores["closed"], scores["global"]) == (0, 0, 1 / 6)


def test_without_training_answers_exact_fills_open():
    scores = score_free_text(SAID, ASKED, Candidates([]), sentences=True)
    assert scores["filled_by"]["open"] == "exact" and scores["free_text"]["candidate"]["global"] is None
    assert (scores["open"], scores["closed"]) == (0, 1 / 3)


def test_both_kinds_of_samples_score_alike():
    places = {"qid": "0", "language": "en", "question_pool": (), "entry": 0, "source": Path("d.json")}
    samples = [
        Sample(image=Path("a.png"), question="Q", answer=s.answer, answer_type=s.facts["answer_type"], content_type="", **places)
        for s in ASKED[:-1]
    ]
    for sentences in (True, False):
        one = score_free_text(SAID[:-1], samples, Candidates(TRAINING), sentences)
        assert one == score_free_text(SAID[:-1], ASKED[:-1], Candidates(TRAINING), sentences)


def test_bad_calls():
    with pytest.raises(ValueError, match="1 responses for 6 samples"):
        score_free_text(["yes"], ASKED, Candidates([]), sentences=True)


def test_held_out_answers_are_no_candidates():
    samples = [asked(f"answer {i}", n=i) for i in range(4)]
    assert list(Scoring(samples).apart_from(samples[:2]).training) == samples[2:]
    assert list(Scoring(samples).apart_from(samples).training) == samples
