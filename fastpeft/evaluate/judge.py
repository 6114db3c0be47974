"""Pairwise judging of two models' responses: what a judge is asked, each pair in both orders, and what its answers say.

A file of outputs is AlpacaEval's: a JSON list of {"instruction", "output", "generator"} ("input" where there is one). As a judge favours
what it reads first, each pair is asked twice with the places exchanged, and a pair's scores are the means of both (paper 003, section
4.1.1, after Chiang et al., 2023): the higher mean wins, equal ones tie. A judgment is one of

- text that begins with the two scores ("8 6", "8/10, 6.5/10"), or ends in a verdict [[A]], [[B]] or [[C]] (a tie);
- {"scores": [8, 6]}, or AlpacaEval's {"preference": p}: from 1, the first is better, to 2, the second is; 0, a tie, in its older files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.documents import parse_json
from fastpeft.files import write_json, write_text

SYSTEM = "You are a fair and careful judge of the responses of two assistants to the same instruction."
ASK = (
    "Instruction:\n{instruction}\n\nResponse of assistant 1:\n{first}\n\nResponse of assistant 2:\n{second}\n\n"
    "Rate how helpful, relevant, accurate and detailed each response is, from 1 to 10. Do not let the order of the responses, their length "
    "or the assistants' names sway you. On the first line write the two scores alone, assistant 1's first, with a space between them. Then "
    "explain them."
)
ORDERS = ("ab", "ba")  # whose response is first: a, ours; b, theirs
_SCORES = re.compile(r"\s*\[?\(?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\s*[,;: ]\s*(\d+(?:\.\d+)?)(?:\s*/\s*10)?(?![\w.]*\d)")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Outputs:
    """Responses of one model: generator, its name; by instruction."""

    generator: str
    responses: dict[str, str]


def write_outputs(path: str | Path, samples: Sequence, responses: Sequence[str], generator: str) -> None:
    """Responses of a data set as AlpacaEval's outputs; an instruction's input is joined to it by an empty line."""
    rows = []
    for sample, response in zip(samples, responses, strict=True):
        instruction = f"{sample.question}\n\n{sample.context}" if getattr(sample, "context", "") else sample.question
        rows.append({"dataset": Path(sample.source).stem, "instruction": instruction, "output": response, "generator": generator})
    write_json(path, rows)


def read_outputs(path: str | Path) -> Outputs:
    """ValueError names the file and the entry that is no output, an instruction that is there twice, or several generators."""
    rows = _read(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a JSON list of outputs, each with instruction and output")
    found: dict[str, str] = {}
    names = set()
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("instruction", "output")):
            raise ValueError(f"{path}: entry {at} is no output: it needs instruction and output, both text")
        instruction = (
            f"{row['instruction']}\n\n{row['input']}" if isinstance(row.get("input"), str) and row["input"] else row["instruction"]
        )
        if instruction in found:
            raise ValueError(f"{path}: entry {at} has an instruction that is there before: {instruction[:60]!r}")
        found[instruction] = row["output"]
        names.add(str(row.get("generator") or Path(path).stem))
    if len(names) > 1:
        raise ValueError(f"{path} holds outputs of several generators ({', '.join(sorted(names))}): give a file for each")
    return Outputs(names.pop(), found)


def _read(path: str | Path) -> Any:
    """JSON, or a list of JSON lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            return parse_json(text)
        except ValueError:
            lines = [line for line in text.splitlines() if line.strip()]
            if len(lines) < 2:
                raise
            return [parse_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def common(ours: Outputs, theirs: Outputs) -> list[str]:
    """Instructions that both have, in our order. ValueError for none."""
    both = [instruction for instruction in ours.responses if instruction in theirs.responses]
    if not both:
        raise ValueError(f"{ours.generator} and {theirs.generator} have no instruction in common")
    return both


def write_pairs(path: str | Path, ours: Outputs, theirs: Outputs) -> int:
    """A line of JSON for each instruction and order: id, instruction, output_1, output_2, generator_1, generator_2, and messages to send to
    a judge. Returns the number of lines."""
    lines, by_name = [], {"a": ours, "b": theirs}
    for at, instruction in enumerate(common(ours, theirs)):
        for order in ORDERS:
            first, second = (by_name[name] for name in order)
            said = {"instruction": instruction, "first": first.responses[instruction], "second": second.responses[instruction]}
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASK.format(**said)}]
            pair = {"instruction": instruction, "output_1": said["first"], "output_2": said["second"]}
            pair |= {"generator_1": first.generator, "generator_2": second.generator}
            lines.append(json.dumps({"id": f"{at}-{order}"} | pair | {"messages": messages}, ensure_ascii=False))
    write_text(Path(path), "\n".join(lines) + "\n")
    return len(lines)


def parse_judgment(said: Any) -> tuple[float, float] | None:
    """The scores of the first and the second response; None where there are none to be read."""
    if isinstance(said, Mapping):
        if isinstance(scores := said.get("scores"), Sequence) and len(scores) == 2 and all(map(_is_number, scores)):
            return float(scores[0]), float(scores[1])
        if _is_number(preference := said.get("preference")) and (preference == 0 or 1 <= preference <= 2):
            return (2.0 - preference, preference - 1.0) if preference else (0.5, 0.5)
        said = next((said[name] for name in ("judgment", "response", "text", "content") if isinstance(said.get(name), str)), None)
    if not isinstance(said, str):
        return None
    if verdicts := _VERDICT.findall(said):
        return {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (0.5, 0.5)}[verdicts[-1]]
    lines = said.strip().splitlines()
    scores = _SCORES.match(lines[0]) if lines else None
    return None if scores is None else (float(scores[1]), float(scores[2]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def read_judgments(path: str | Path, ours: Outputs, theirs: Outputs) -> dict[str, Any]:
    """What a judge said, of lines with the "id" that :func:`write_pairs` gave, or of AlpacaEval's annotations ("instruction",
    "output_1", "output_2").

    {"wins", "ties", "losses": pairs of instructions; "n", "win_rate": ties count half; "scores": the mean of each generator's; "one_order":
    pairs of which one order alone was judged, scored by that; "unread": judgments without scores; "unjudged": pairs without any; and
    "first_preferred": the share of judgments, ties apart, that favour the response read first}. ValueError names a judgment of another
    pair, and one that is there twice."""
    rows, asked = _read(path), common(ours, theirs)
    rows = rows if isinstance(rows, list) else [rows]
    found: dict[int, dict[str, tuple[float, float]]] = {}
    unread, firsts = 0, []
    for at, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: judgment {at} is {type(row).__name__}, not an object with an id")
        pair, order = _pair(row, f"{path}: judgment {at}", asked, ours, theirs)
        scores = parse_judgment(row)
        if scores is None:
            unread += 1
            continue
        if order in found.setdefault(pair, {}):
            raise ValueError(f"{path}: judgment {at} is the second one of pair {pair} in order {order}")
        firsts += [scores[0] > scores[1]] if scores[0] != scores[1] else []
        found[pair][order] = scores if order == "ab" else scores[::-1]
    means = [tuple(sum(column) / len(of) for column in zip(*of.values())) for of in found.values() if of]
    wins, losses = sum(a > b for a, b in means), sum(a < b for a, b in means)
    return {
        "wins": wins,
        "ties": len(means) - wins - losses,
        "losses": losses,
        "n": len(means),
        "win_rate": (wins + (len(means) - wins - losses) / 2) / len(means) if means else None,
        "scores": [sum(column) / len(means) for column in zip(*means)] if means else None,
        "generators": [ours.generator, theirs.generator],
        "one_order": sum(len(of) == 1 for of in found.values()),
        "unread": unread,
        "unjudged": len(asked) - len(means),
        "first_preferred": sum(firsts) / len(firsts) if firsts else None,
    }


def _pair(row: dict, where: str, asked: list[str], ours: Outputs, theirs: Outputs) -> tuple[int, str]:
    """(number of the instruction, the order) of a judgment."""
    named = re.fullmatch(r"(\d{1,9})-(ab|ba)", str(row.get("id", "")))
    if named is not None:
        if int(named[1]) >= len(asked):
            raise ValueError(f"{where} is of pair {named[1]}, and there are {len(asked)}: these are judgments of other outputs")
        return int(named[1]), named[2]
    instruction = row.get("instruction")
    if instruction not in asked or not {"output_1", "output_2"} <= row.keys():
        raise ValueError(f"{where} has neither the id of a pair, such as 0-ab, nor an instruction of these outputs with output_1, output_2")
    outputs = (row["output_1"], row["output_2"])
    mine, other = ours.responses[instruction], theirs.responses[instruction]
    named = (row.get("generator_1"), row.get("generator_2"))
    if outputs == (mine, other) and (mine != other or named != (theirs.generator, ours.generator)):
        return asked.index(instruction), "ab"
    if outputs == (other, mine):
        return asked.index(instruction), "ba"
    raise ValueError(f"{where} is of other responses to {instruction[:60]!r} than these files hold")
