"""Accuracy of answers: exact match after `normalise_answer`, for open and closed questions, with majority baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastpeft.data.samples import Instruction, Sample, normalise_answer
from fastpeft.files import write_json

__all__ = ["normalise_answer", "score", "score_responses", "write_predictions"]


def _correct(predictions: Sequence[str], samples: Sequence[Sample]) -> list[bool]:
    if isinstance(predictions, str) or len(predictions) != len(samples):
        raise ValueError(f"{len(predictions)} predictions for {len(samples)} samples: give one text for each, in a list")
    wrong = next((i for i, p in enumerate(predictions) if not isinstance(p, str)), None)
    if wrong is not None:
        raise ValueError(f"prediction {wrong} is {type(predictions[wrong]).__name__}, not text")
    return [normalise_answer(p) == normalise_answer(s.answer) for p, s in zip(predictions, samples)]


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _commonest(answers: Sequence[str]) -> float | None:
    return Counter(answers).most_common(1)[0][1] / len(answers) if answers else None


def score(predictions: Sequence[str], samples: Sequence[Sample]) -> dict:
    """Accuracies as fractions of 1, None where there are no such questions.

    open, closed, global: exact match after `normalise_answer`, by the samples' answer_type and over all; n_open, n_closed, n:
    how many.
    majority_closed, majority: the score of always giving the most frequent answer of the closed questions, or of all.
    always_no_closed: the score of answering "no" to every closed question. A model that uses the image scores above all three.

    ValueError unless there is one text per sample.
    """
    hits = _correct(predictions, samples)
    closed = [s.answer_type == "CLOSED" for s in samples]
    answers = [normalise_answer(s.answer) for s in samples]
    closed_answers = [a for a, c in zip(answers, closed) if c]
    return {
        "open": _share([h for h, c in zip(hits, closed) if not c]),
        "closed": _share([h for h, c in zip(hits, closed) if c]),
        "global": _share(hits),
        "n_open": len(hits) - len(closed_answers),
        "n_closed": len(closed_answers),
        "n": len(hits),
        "majority_closed": _commonest(closed_answers),
        "majority": _commonest(answers),
        "always_no_closed": _share([a == "no" for a in closed_answers]),
    }


def score_responses(responses: Sequence[str], samples: Sequence[Instruction]) -> dict:
    """Exact match after `normalise_answer`, as fractions of 1 (None where there are no such samples).

    global, n: over all samples; open, closed, n_open, n_closed: over those whose data say which they are; majority: the score of always
    giving the most frequent answer. For free text an exact match says little: read the predictions, too.

    ValueError unless there is one text per sample.
    """
    hits = _correct(responses, samples)
    kinds = [sample.facts.get("answer_type") for sample in samples]
    by_kind = {kind: [h for h, k in zip(hits, kinds) if k == kind.upper()] for kind in ("open", "closed")}
    closed = [normalise_answer(s.answer) for s, k in zip(samples, kinds) if k == "CLOSED"]
    return {
        **{kind: _share(found) for kind, found in by_kind.items()},
        "global": _share(hits),
        **{f"n_{kind}": len(found) for kind, found in by_kind.items()},
        "n": len(hits),
        "majority_closed": _commonest(closed),
        "majority": _commonest([normalise_answer(sample.answer) for sample in samples]),
        "always_no_closed": _share([answer == "no" for answer in closed]),
    }


def write_predictions(path, samples: Sequence[Sample], predictions: Sequence[str]) -> None:
    """A JSON list of qid, img_name (as the data set has it), image (the file's absolute path), question, answer, prediction,
    answer_type, correct of each sample.

    The file appears whole or not at all. ValueError unless there is one text per sample.
    """
    rows = [
        {
            "qid": sample.qid,
            "img_name": sample.image_name or sample.image.name,
            "image": str(sample.image.absolute()),
            "question": sample.question,
            "answer": sample.answer,
            "prediction": prediction,
            "answer_type": sample.answer_type,
            "correct": hit,
        }
        for sample, prediction, hit in zip(samples, predictions, _correct(predictions, samples))
    ]
    write_json(path, rows)
