"""MMLU of a run's adapter, beside the base without it (`fastpeft eval` on a folder of MMLU)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastpeft.adapters import describe, load_adapter
from fastpeft.data.mmlu import LETTERS, MMLU, is_mmlu, load_mmlu
from fastpeft.documents import parse_json
from fastpeft.evaluate.mmlu import answer_mmlu, score_mmlu
from fastpeft.files import write_json
from fastpeft.models import family_of
from fastpeft.runs.options import DataOptions, MMLUOptions


def asks_mmlu(data: DataOptions) -> bool:
    """Whether the data to score are MMLU's, by their kind or their files."""
    source = data.sources[0]
    return len(data.sources) == 1 and (source.kind == "mmlu" or (source.kind is None and is_mmlu(source.path)))


def mmlu_run(
    adapter: str | Path,
    network,
    tokenizer,
    data: DataOptions,
    options: MMLUOptions,
    *,
    out: str | None = None,
    progress: bool = True,
    batch_size: int = 8,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Scores of `fastpeft.evaluate.mmlu.score_mmlu` under "mmlu", with the fields of other evaluations beside them ("global": the average
    over all questions). ``network``: the adapter's base, not adapted yet: it is asked first, unless ``options`` say no_base, and is
    adapted afterwards; or a model's own folder, which has no other base. ``kept``: a folder where a base's answers stay, for the next
    adapter of it. ``out``: a file for the answers."""
    if family_of(network).kind != "causal":
        raise ValueError("MMLU is asked of causal language models, and this adapter's base is none")
    questions = load_mmlu(data.sources[0].path, shots=options.shots)
    how = {"shots": options.shots, "batch_size": batch_size, "progress": progress}
    alone = not describe(adapter)  # a model's own folder
    base = None if options.no_base or alone else _base(adapter, network, tokenizer, questions, how, kept)
    device = next(network.parameters()).device
    if not alone:
        load_adapter(network, adapter)
    network.to(device)
    answers = answer_mmlu(network, tokenizer, questions, **how)
    scored = score_mmlu(answers["answers"], questions, base and base["answers"])
    if out:
        write_json(out, _rows(questions, answers["answers"], base and base["answers"]))
    notes = [f"MMLU: {len(questions.missing)} of 57 tasks are not in the data"] if questions.missing else []
    notes += [f"MMLU: {answers['fewer_shots']} prompts too long for {options.shots} examples have fewer"] * bool(answers["fewer_shots"])
    notes += [f"MMLU: {answers['cut']} questions lost their beginning"] * bool(answers["cut"])
    commonest = Counter(question.answer for question in questions.questions).most_common(1)[0][1]
    none = dict.fromkeys(("open", "closed", "majority_closed", "always_no_closed"))
    of_all = {"global": scored["average"], "n": scored["n"], "majority": commonest / scored["n"], "filled_by": {"global": "mmlu"}}
    return none | of_all | {"mmlu": scored | {"shots": options.shots}, "generation": None, "notes": notes}


def _base(adapter, network, tokenizer, questions: MMLU, how: dict, kept: Path | None) -> dict[str, Any]:
    asked = [[q.task, q.question, q.choices] for q in questions.questions]
    vocabulary = sorted(tokenizer.get_vocab().items())
    examples = {task: [q.text(True) for q in of] for task, of in questions.shots.items()}
    identity = [describe(adapter)["base"], vocabulary, how["shots"], asked, examples]
    file = None
    if kept is not None:
        name = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]
        file = Path(kept) / f"mmlu-{name}.json"
        if file.is_file():
            return parse_json(file.read_text(encoding="utf-8"))
    found = answer_mmlu(network, tokenizer, questions, **how)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return found


def _rows(questions: MMLU, answers: list[int], base: list[int] | None) -> list[dict[str, Any]]:
    rows = []
    for at, question in enumerate(questions.questions):
        row = {"task": question.task, "question": question.question, "choices": question.choices, "answer": LETTERS[question.answer]}
        row |= {"prediction": LETTERS[answers[at]]} | ({} if base is None else {"base": LETTERS[base[at]]})
        rows.append(row)
    return rows
