"""ScienceQA accuracy by subject, context and grade: the columns of paper 004's table 1."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from fastpeft.data import Instruction

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
_SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
_STATED = re.compile(r"\b[Tt]he answer is:? *\(?([A-Z])(?![A-Za-z])")
_BARE = re.compile(r"\(?([A-Z])\)?(?:[.:,\s]|$)")


def parse_answer(text: str, n_choices: int) -> int | None:
    """The index of the choice that a response names: by "The answer is B.", where it first says so, else by a letter that opens it.

    None where neither is there, or the letter is none of the choices. (The official code then draws a choice at random, which
    adds about 1 / n_choices of such responses to its accuracies: `score_scienceqa(draw_unparsed=)`.)
    """
    found = _STATED.search(text) or _BARE.match(text.strip())
    index = ord(found[1]) - ord("A") if found else -1
    return index if 0 <= index < n_choices else None


def _columns(facts: dict) -> list[str]:
    columns = [name for name, subject in _SUBJECTS.items() if facts["subject"] == subject]
    columns += ["TXT"] * facts["has_text"] + ["IMG"] * facts["has_image"]
    columns += ["NO"] * (not facts["has_text"] and not facts["has_image"])
    grade = re.fullmatch(r"grade(\d+)", facts["grade"])
    if grade and 1 <= int(grade[1]) <= 12:
        columns.append("G1-6" if int(grade[1]) <= 6 else "G7-12")
    return [*columns, "Avg"]


def score_scienceqa(responses: Sequence[str], samples: Sequence[Instruction], draw_unparsed: int | None = None) -> dict:
    """Accuracies as fractions of 1, None where a column has no problems, as the official evaluation groups them.

    NAT, SOC, LAN: natural, social, language science. TXT, IMG: problems with a hint, with an image (with both: in both); NO:
    with neither. G1-6, G7-12: grades. Avg: all. `n`: problems of each column. `unparsed`: responses that name no choice; they
    count as wrong, or, with a seed as `draw_unparsed`, a choice is drawn for each, as the official code does.

    ValueError unless there is one text per sample, or where a sample is not of `load_scienceqa`.
    """
    if isinstance(responses, str) or len(responses) != len(samples):
        raise ValueError(f"{len(responses)} responses for {len(samples)} samples: give one text for each, in a list")
    hits: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    unparsed = 0
    for response, sample in zip(responses, samples):
        if sample.kind != "scienceqa":
            raise ValueError(f"sample {sample.qid} is of {sample.kind}, not of load_scienceqa")
        answer = parse_answer(response, len(sample.facts["choices"]))
        unparsed += answer is None
        if answer is None and draw_unparsed is not None:
            answer = random.Random(f"unparsed {draw_unparsed} {sample.qid}").randrange(len(sample.facts["choices"]))
        for name in _columns(sample.facts):
            hits[name].append(answer == sample.facts["answer"])
    scores: dict = {name: sum(h) / len(h) if h else None for name, h in hits.items()}
    counted = "wrong" if draw_unparsed is None else f"drawn with seed {draw_unparsed}"
    return {**scores, "n": {name: len(h) for name, h in hits.items()}, "unparsed": unparsed, "unparsed_are": counted}
