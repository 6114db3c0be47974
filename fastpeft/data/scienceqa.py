"""Reader of ScienceQA as published, and its family of prompt formats.

Files: problems.json, pid_splits.json, captions.json and images/SPLIT/ID/image.png.

A prompt format is INPUT-OUTPUT. INPUT is CQM or QCM, or, with the lecture (L) or the solution (E, the explanation) in the prompt,
QCML, QCME, QCMLE, QCLM, QCEM, QCLEM. OUTPUT is A alone, A with L and E before or after it, or L and E without A. The words are
those of ScienceQA's models/base_prompt.py, which LaVIN's training uses too, to the letter where a problem has a lecture and a
solution. Where it has neither, nothing follows the answer (LaVIN leaves a "BECAUSE:" there; ScienceQA deletes every one in the prompt).

"AL" puts the solution after the answer and "AE" the lecture, unlike "LA" and "EA". This looks like a mistake of the official code; it
is kept because the published results of these formats were made with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastpeft.data._files import BadEntry, ImageFinder, read_value, value_of, without_image_mark
from fastpeft.data._instruction_formats import text_of
from fastpeft.data.samples import Instruction, SampleList

OPTIONS = "ABCDE"
_PARTS = {"C": "Context: {context}\n", "Q": "Question: {question}\n", "M": "Options: {choices}\n"}
_INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
_OUTPUTS = {  # what stands before the answer and after it
    "A": ("", ""),
    "AL": ("", "E"),
    "AE": ("", "L"),
    "ALE": ("", "LE"),
    "AEL": ("", "EL"),
    "LA": ("L", ""),
    "EA": ("E", ""),
    "LEA": ("LE", ""),
    "ELA": ("EL", ""),
}
_REASONS = ("L", "E", "LE", "EL")  # outputs without an answer, for reasoning in two stages


def check_prompt_format(prompt_format: str) -> tuple[str, str]:
    """(input, output) of a format such as "QCM-ALE". ValueError for an unknown one."""
    given, _, wanted = str(prompt_format).partition("-")
    if given not in _INPUTS or wanted not in (*_OUTPUTS, *_REASONS):
        known = f"one of {', '.join(_INPUTS)}, then -, then one of {', '.join((*_OUTPUTS, *_REASONS))}"
        raise ValueError(f"prompt_format={prompt_format!r}: use {known}")
    return given, wanted


def _joined(letters: str, problem: dict) -> str:
    """Lecture and solution; their line breaks as backslash and n, as published, so that a response stays on one line."""
    names = {"L": "lecture", "E": "solution"}
    return " ".join(problem[names[letter]].replace("\n", "\\n") for letter in letters)


def scienceqa_prompt(problem: dict, prompt_format: str = "QCM-ALE", use_caption: bool = False) -> tuple[str, str]:
    """(prompt, response) of a problem with question, choices, answer, hint, lecture, solution and, for `use_caption`, caption.

    The prompt ends with the options; what asks for the answer ("Answer:", LaVIN's "Response:") is the template's.
    """
    given, wanted = check_prompt_format(prompt_format)
    context = " ".join([problem["hint"], problem.get("caption", "") if use_caption else ""]).strip() or "N/A"
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTIONS, problem["choices"]))
    reasons = "".join(letter for letter in given if letter in "LE")
    prompt = "".join(_PARTS.get(letter, "") if letter not in "LE" else "{because}" if letter == reasons[0] else "" for letter in given)
    because = f"BECAUSE: {_joined(reasons, problem)}\n" if reasons else ""
    texts = {"context": context, "question": problem["question"], "choices": choices, "because": because}
    prompt = prompt.format(**texts).replace("  ", " ").removesuffix("\n")
    if wanted in _REASONS:
        return prompt, _joined(wanted, problem).replace("  ", " ").strip()
    before, after = _OUTPUTS[wanted]
    answer = f"The answer is {OPTIONS[problem['answer']]}."
    response = f"{_joined(before, problem)} {answer}" if before else f"{answer} BECAUSE: {_joined(after, problem)}" if after else answer
    return prompt, response.replace("  ", " ").strip().removesuffix("BECAUSE:").strip()


def asked_in(samples: Sequence[Instruction], formats: Sequence[str]) -> list[Instruction]:
    """Problems that were read in several ``formats`` as they are asked after training: in the format whose response is the answer alone,
    where that is one of them (paper 003), else in the first."""
    at = next((i for i, each in enumerate(formats) if check_prompt_format(each)[1] == "A"), 0)
    asked = [(sample.turns, *sample.alternatives)[at] if sample.kind == "scienceqa" else None for sample in samples]
    return [s if turns is None else replace(s, turns=turns, alternatives=()) for s, turns in zip(samples, asked)]


DIRECT = "Answer with the option's letter from the given choices directly."  # LLaVA's words


def load_scienceqa(
    folder,
    split: str | None = "train",
    *,
    prompt_format="QCM-ALE",
    use_caption: bool = False,
    tell_format: bool | None = None,
    skip_bad: bool = False,
    check_images=None,
) -> SampleList:
    """The problems of a split (train, val, test, or another of pid_splits.json, such as minival; None: all), in its order.

    Args:
        folder: with problems.json and pid_splits.json; captions.json here or in the folder above, where it is published.
        prompt_format: "QCM-ALE" (LaVIN), "QCM-A", ...; or several, one of which is drawn per problem and epoch: paper 003
            trains on ("QCM-LEA", "QCM-A").
        tell_format: prompts whose response is the answer alone end with `DIRECT`, so that a model trained on several formats knows which
            is asked. None: where there are several.
        use_caption: a caption of the image follows the hint. For models that don't see the image.
        skip_bad, check_images: as for `load_instructions`.

    `facts` of each instruction: subject, grade, topic, choices, answer (index), has_text (a hint), has_image.

    ValueError, naming file and problem: fields missing or of the wrong kind, an answer that is no choice, images missing.
    """
    folder = Path(folder)
    formats = (prompt_format,) if isinstance(prompt_format, str) else tuple(prompt_format)
    for each in formats or ("",):
        check_prompt_format(each)
    tell = len(formats) > 1 if tell_format is None else tell_format
    file = folder / "problems.json"
    problems = _object(file)
    ids = list(problems) if split is None else _ids(folder / "pid_splits.json", split)
    captions = _captions(folder) if use_caption else {}
    finder = ImageFinder(folder, skip_bad if check_images is None else check_images)
    samples, skipped = [], Counter()
    for qid in ids:
        try:
            problem, image = _read(problems.get(qid), qid, split, finder)
            problem["caption"] = captions.get(qid, "")
            texts = [_asked(problem, each, use_caption, tell) for each in formats]
            turns = [((without_image_mark([asked], image["image"] is not None, answer)[0], answer),) for asked, answer in texts]
            if not all(turn[0][1] for turn in turns):
                raise BadEntry("empty response", f"nothing to respond in {'/'.join(formats)}: neither lecture nor solution")
        except BadEntry as bad:
            if not skip_bad:
                raise ValueError(f"{file}: problem {qid}: {bad}") from None
            skipped[bad.reason] += 1
            continue
        facts = {name: problem[name] for name in ("subject", "grade", "topic", "choices", "answer")}
        facts |= {"has_text": bool(problem["hint"]), "has_image": image["image"] is not None}
        samples.append(
            Instruction(turns[0], kind="scienceqa", qid=qid, entry=qid, source=file, alternatives=tuple(turns[1:]), facts=facts, **image)
        )
    if not samples:
        left_out = "; ".join(f"{n} skipped for {reason}" for reason, n in skipped.items())
        raise ValueError(f"{file}: no {split or ''} problems left" + (f" ({left_out})" if left_out else ""))
    return SampleList(samples, dict(skipped), {}, "scienceqa", (file,))


def _asked(problem: dict, prompt_format: str, use_caption: bool, tell: bool) -> tuple[str, str]:
    prompt, response = scienceqa_prompt(problem, prompt_format, use_caption)
    return (f"{prompt}\n{DIRECT}" if tell and prompt_format.endswith("-A") else prompt), response


def _read(entry, qid: str, split: str | None, finder: ImageFinder) -> tuple[dict, dict]:
    """(the problem's fields, its image's) of an entry of problems.json."""
    if not isinstance(entry, dict):
        raise BadEntry("unknown problem", "not among the problems" if entry is None else "expected an object with fields")
    problem = {name: text_of(entry, name, required=False) for name in ("hint", "lecture", "solution", "subject", "grade", "topic")}
    problem["question"] = text_of(entry, "question")
    choices, answer = entry.get("choices"), entry.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(OPTIONS) or not all(isinstance(c, str) for c in choices):
        raise BadEntry("bad choices", f"choices must be a list of 2 to {len(OPTIONS)} texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadEntry("bad answer", f"answer {answer!r} is none of the {len(choices)} choices, counted from 0")
    problem |= {"choices": choices, "answer": answer}
    if entry.get("image") in (None, ""):
        return problem, {"image": None}
    if not isinstance(entry["image"], str):
        raise BadEntry("bad image", f"the image must be a file's name, not {entry['image']!r}")
    name = f"images/{entry.get('split') or split}/{qid}/{entry['image']}"
    return problem, {"image": finder(name), "image_name": name}


def _object(file: Path) -> dict:
    value = read_value(file)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{file}: expected a JSON object of one or more entries, not {type(value).__name__}")
    return value


def _ids(file: Path, split: str) -> list[str]:
    splits = _object(file)
    ids = splits.get(split)
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{file}: no split {split!r}; it has {', '.join(map(str, splits))}")
    return [str(qid) for qid in ids]


def _captions(folder: Path) -> dict:
    file = next((f for f in (folder / "captions.json", folder.parent / "captions.json") if f.is_file()), folder / "captions.json")
    captions = _object(file).get("captions")
    if not isinstance(captions, dict):
        raise ValueError(f"{file}: no field 'captions' with a text for each problem")
    return {qid: str(value_of(captions, qid) or "") for qid in captions}
