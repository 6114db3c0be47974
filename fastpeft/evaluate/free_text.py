"""Accuracy of answers in sentences: exact, contains, token precision/recall/F1, nearest training answer, first yes or no.

LLaVA-Med's own evaluation differs for closed questions: it tests substrings ("normal" counts as "no", and as right for "no"), and leaves
a yes/no answer that is wrong out of the denominator. Neither is copied: words are whole, and every question counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from fastpeft.data.samples import Instruction, Sample, normalise_answer

_WORD = re.compile(r"[^\W_]+")
OVERLAP = ("precision", "recall", "f1")


def words(text: str) -> list[str]:
    """The words of a text in the form of `normalise_answer`, punctuation dropped."""
    return _WORD.findall(normalise_answer(text))


def question_type(sample: Sample | Instruction) -> tuple[str | None, str | None]:
    """(answer type "OPEN" or "CLOSED", content type such as "Organ"), each None where the data do not say."""
    facts = sample.facts if isinstance(sample, Instruction) else vars(sample)
    return facts.get("answer_type") or None, facts.get("content_type") or None


def exact(response: str, answer: str) -> bool:
    """Equality after `normalise_answer`."""
    return normalise_answer(response) == normalise_answer(answer)


def contains(response: str, answer: str) -> bool:
    """True if the answer's words stand in the response, whole and in a row. An answer without words is compared as it is."""
    said, wanted = words(response), words(answer)
    if not wanted:
        return exact(response, answer)
    return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def overlap(response: str, answer: str) -> dict[str, float]:
    """Precision, recall and F1 of the response's words against the answer's, each word counted as often as it occurs in both."""
    said, wanted = Counter(words(response)), Counter(words(answer))
    if not said or not wanted:
        return dict.fromkeys(OVERLAP, float(exact(response, answer)))
    shared = sum((said & wanted).values())
    precision, recall = shared / sum(said.values()), shared / sum(wanted.values())
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall) if shared else 0.0}


def first_yes_no(response: str) -> str | None:
    """The first whole word that is yes or no; None where neither is there."""
    return next((word for word in words(response) if word in ("yes", "no")), None)


class Candidates:
    """The answers of training samples, by type of question."""

    def __init__(self, training: Sequence[Sample | Instruction]):
        self._typed = [(*question_type(sample), normalise_answer(sample.answer)) for sample in training]

    def __bool__(self) -> bool:
        return bool(self._typed)

    @cached_property
    def _by_type(self) -> dict[tuple[str | None, str | None], dict[str, frozenset[str]]]:
        groups: dict[tuple[str | None, str | None], dict[str, frozenset[str]]] = {}
        for kind, content, answer in self._typed:
            for key in {(kind, content), (kind, None), (None, content), (None, None)}:
                if answer not in groups.setdefault(key, {}):
                    groups[key][answer] = frozenset(words(answer))
        return groups

    def of(self, sample: Sample | Instruction) -> dict[str, frozenset[str]]:
        """{answer: its words} of the training questions of the sample's type: of both its types, else of its answer type, else all."""
        kind, content = question_type(sample)
        groups = self._by_type
        return next((groups[key] for key in ((kind, content), (kind, None), (None, None)) if key in groups), {})

    def nearest(self, response: str, sample: Sample | Instruction) -> str | None:
        """The candidate with the largest share of its words in the response; of equals the one with most words there, then the first of
        the training split. A response that equals a candidate is that one. None where no candidate shares a word with it."""
        candidates, said = self.of(sample), normalise_answer(response)
        if said in candidates:
            return said
        spoken, best, score = set(words(response)), None, (0.0, 0)
        for answer, parts in candidates.items():
            shared = len(parts & spoken)
            if shared and (shared / len(parts), shared) > score:
                best, score = answer, (shared / len(parts), shared)
        return best


def judge(response: str, sample: Sample | Instruction, candidates: Candidates) -> dict[str, float | bool | None]:
    """Every measure of one response. candidate: None without training answers; yes_no: None where the answer is neither yes nor no."""
    answer = normalise_answer(sample.answer)
    return {
        "exact": exact(response, answer),
        "contains": contains(response, answer),
        **overlap(response, answer),
        "candidate": candidates.nearest(response, sample) == answer if candidates else None,
        "yes_no": first_yes_no(response) == answer if answer in ("yes", "no") else None,
    }


MEASURES = ("exact", "contains", *OVERLAP, "candidate", "yes_no")
EXACT = {"open": "exact", "closed": "exact", "other": "exact"}
SENTENCES = {"open": "candidate", "closed": "yes_no, else candidate", "other": "exact"}  # other: the data do not say which they are


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def score_free_text(
    responses: Sequence[str], samples: Sequence[Sample | Instruction], candidates: Candidates, sentences: bool
) -> dict[str, dict]:
    """{"open", "closed", "global": the accuracies that count; "filled_by": the measures they are; "free_text": every measure}.

    free_text: {measure: {"open", "closed", "global"}}, fractions of 1, None where it has no such samples; ``yes_no`` is over closed
    questions whose answer is yes or no. sentences: the model answers in sentences, so that ``candidate`` fills open, and ``yes_no``
    closed, or ``candidate`` where the answer is neither; without training answers ``exact`` stands in for ``candidate``. Else ``exact``
    fills all. ValueError unless there is one text per sample.
    """
    if isinstance(responses, str) or len(responses) != len(samples):
        raise ValueError(f"{len(responses)} responses for {len(samples)} samples: give one text for each, in a list")
    judged = [judge(response, sample, candidates) for response, sample in zip(responses, samples)]
    kinds = [question_type(sample)[0] for sample in samples]
    for row, kind in zip(judged, kinds):
        row["yes_no"] = row["yes_no"] if kind == "CLOSED" else None
        named = [name for name in ("yes_no", "candidate") if row[name] is not None]
        row["right"] = row[named[0] if sentences and named and kind else "exact"]

    def split(name: str) -> dict[str, float | None]:
        of = {kind: _mean([row[name] for row, k in zip(judged, kinds) if k == kind.upper()]) for kind in ("open", "closed")}
        return of | {"global": _mean([row[name] for row in judged])}

    filled = EXACT if not sentences else SENTENCES if candidates else {**EXACT, "closed": "yes_no, else exact"}
    return {**split("right"), "filled_by": dict(filled), "free_text": {name: split(name) for name in MEASURES}}
