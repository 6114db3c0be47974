"""Scores against counts made by hand."""

import json
from pathlib import Path

import pytest

from fastpeft.data import Sample
from fastpeft.evaluate import normalise_answer, score, write_predictions


def sample(answer: str, kind: str, n: int = 0) -> Sample:
    return Sample(Path(f"/data/imgs/{n}.jpg"), f"Question {n}?", answer, kind, str(n), "", "en", (), n, Path("t.json"), f"imgs/{n}.jpg")


ANSWERS = ["Yes", "no", "Yes", "left", "X-Ray", "Liver", "liver."]
SAMPLES = [sample(answer, "CLOSED" if n < 4 else "OPEN", n) for n, answer in enumerate(ANSWERS)]


@pytest.mark.parametrize(
    "text, same",
    [
        ("X-Ray", "x - ray"),
        ("Yes.", "yes"),
        ("  left \n lung", "Left lung"),
        ("right, lower lobe", "right , lower lobe"),
        ("patient's skin", "patient ' s skin"),
        ("T2/FLAIR (axial)", "t2 / flair ( axial )"),
        ("Ménière", "meniere"),
        ("3.5 cm", "3 . 5 cm"),
        ("a_b", "a _ b"),
    ],
)
def test_equal_answers(text, same):
    assert normalise_answer(text) == normalise_answer(same)


DIFFERENT = [("left lung", "the left lung"), ("lung", "lungs"), ("xray", "x-ray"), ("3.5", "35"), ("yes", "no"), ("a b", "ab")]


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_answers(one, other):
    assert normalise_answer(one) != normalise_answer(other)


def test_normalising_twice_changes_nothing():
    for text in ("X - Ray.", "a . . .", " Où ?", "...", "", "3 . 5 ."):
        assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


def test_score():
    predictions = ["yes", "yes", "Yes.", "right", "x - ray", "liver", "spleen"]
    assert score(predictions, SAMPLES) == {
        "open": 2 / 3,
        "closed": 2 / 4,
        "global": 4 / 7,
        "n_open": 3,
        "n_closed": 4,
        "n": 7,
        "majority_closed": 2 / 4,
        "majority": 2 / 7,  # "yes" and "liver", twice each
        "always_no_closed": 1 / 4,
    }


def test_absent_kinds_are_none_not_zero():
    closed = score(["yes", "no"], SAMPLES[:2])
    assert closed["open"] is None and closed["n_open"] == 0 and closed["closed"] == closed["global"] == 1
    opened = score(["x-ray"], SAMPLES[4:5])
    assert opened["closed"] is opened["majority_closed"] is opened["always_no_closed"] is None and opened["majority"] == 1
    nothing = score([], [])
    assert nothing["global"] is nothing["majority"] is None and nothing["n"] == 0


def test_bad_predictions():
    with pytest.raises(ValueError, match="1 predictions for 7 samples"):
        score(["yes"], SAMPLES)
    with pytest.raises(ValueError, match="predictions for"):
        score("yesyesy", SAMPLES)
    with pytest.raises(ValueError, match="prediction 1 is int, not text"):
        score(["yes", 3], SAMPLES[:2])


def test_write_predictions(tmp_path):
    path = tmp_path / "out" / "predictions.json"
    write_predictions(path, SAMPLES[:2], ["Yes", "où"])
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows[0] == {
        "qid": "0",
        "img_name": "imgs/0.jpg",
        "image": "/data/imgs/0.jpg",
        "question": "Question 0?",
        "answer": "Yes",
        "prediction": "Yes",
        "answer_type": "CLOSED",
        "correct": True,
    }
    assert rows[1]["prediction"] == "où" and rows[1]["correct"] is False
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "predictions.json"
    write_predictions(path, SAMPLES[:1], ["yes"])
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_predictions(path, SAMPLES[:2], ["yes", "no"])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="1 predictions for 2"):
        write_predictions(path, SAMPLES[:2], ["yes"])
    assert path.read_bytes() == before
