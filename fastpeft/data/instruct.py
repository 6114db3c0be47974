"""Instruction-format data of paper 002: questions with answer options in several phrasings, written as MILE's files (`question_pool`).

Options are "(a)X; (b)Y", shuffled. Wrong options of an open question are answers of other training questions about the same attribute
(Slake's content_type, VQA-RAD's question_type), where there are any; those of a yes/no question are the other of the two.

Two styles. "paper": figure 4's words, three phrasings of closed questions and five of open ones, with two or three options each, drawn
anew for each phrasing. "released": those of the authors' RAD_instruction_data.json to the letter, with "<image>", literal braces,
"ansewer", six and five phrasings, and four options (of yes/no questions two), the same in all phrasings.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastpeft.data._files import read_json
from fastpeft.data._splits import QuestionNaming, resolve
from fastpeft.data.formats import load_samples
from fastpeft.data.samples import Sample, SampleList, normalise_answer
from fastpeft.files import atomic_folder, write_json

FILE = "instruction_data.json"
YES_NO = {"yes": "No", "no": "Yes"}  # the other answer


@dataclass(frozen=True)
class Style:
    """Phrasings with {question} and {options}, of closed questions and of open ones, each with its number of options (0: it has none;
    yes/no questions have two at most). one_draw: all phrasings of a sample show the same options."""

    closed: tuple[tuple[int, str], ...]
    opened: tuple[tuple[int, str], ...]
    one_draw: bool


_ASK = "Question: {question} Option: {options}"
_BRACES = "<image>Question:{{{question}}}Option:{{{options}}}"
_RELEASED = (f"{_BRACES} The answer to the question is:", f"{_BRACES} Answer:")
_RELEASED_LAST = (
    f"{_BRACES} Short answer:",
    "<image>Used the provided image to answer the question:{{{question}}}Option:{{{options}}} Provide your ansewer based on the option",
)
_RELEASED_BARE = '<image>What is the answer to the following question?"{{{question}}}"'
STYLES = {
    "paper": Style(
        closed=(
            (2, f"{_ASK} The answer to the question is"),
            (2, f"{_ASK} Answer:"),
            (0, "Question: {question} Based on the image, give a judgmental answer to the question"),
        ),
        opened=(
            (2, f"{_ASK} The answer to the question is"),
            (2, f"{_ASK} Answer:"),
            (3, f"{_ASK} Short answer:"),
            (3, "Used the provided image to answer the question: {question} Option: {options} Provide your answer based on the option"),
            (0, 'What is the answer to the following question? "{question}"'),
        ),
        one_draw=False,
    ),
    "released": Style(
        closed=(
            *((4, phrasing) for phrasing in _RELEASED),
            (0, "<image>Question:{{{question}}} Based on the image, give a judgmental answer to the question"),
            *((4, phrasing) for phrasing in _RELEASED_LAST),
            (0, _RELEASED_BARE),
        ),
        opened=(*((4, phrasing) for phrasing in (*_RELEASED, *_RELEASED_LAST)), (0, _RELEASED_BARE)),
        one_draw=True,
    ),
}
_AFTER_OPTIONS = tuple(  # what follows the options in some phrasing
    sorted(
        {p.partition("{options}")[2].replace("}}", "}") for s in STYLES.values() for _, p in (*s.closed, *s.opened) if "{options}" in p},
        key=len,
        reverse=True,
    )
)
_OPTIONS = re.compile(r"Option:\s*\{?\(a\)")


def until_options_end(question: str) -> str | None:
    """The beginning of a phrasing, up to the end of its options; None where it has none."""
    if _OPTIONS.search(question) is None:
        return None
    return next((question.removesuffix(end) for end in _AFTER_OPTIONS if question.endswith(end)), question)


class OptionPools:
    """Answers of training questions by attribute, each once after normalisation; yes and no are in none."""

    def __init__(self, training: Sequence[Sample]):
        self._pools: dict[str, dict[str, str]] = {}
        for sample in training:
            if (key := normalise_answer(sample.answer)) not in YES_NO and key:
                for attribute in (*_attributes(sample), ""):  # "": all
                    self._pools.setdefault(attribute, {}).setdefault(key, sample.answer)

    def wrong(self, sample: Sample, number: int, draw: random.Random) -> list[str]:
        """Up to ``number`` wrong answers, different from the sample's and from each other after normalisation."""
        answer = normalise_answer(sample.answer)
        if answer in YES_NO:
            return [YES_NO[answer]][:number]
        near = {key: text for attribute in _attributes(sample) for key, text in self._pools.get(attribute, {}).items()}
        near.pop(answer, None)
        chosen = draw.sample(sorted(near), min(number, len(near)))
        far = sorted(self._pools.get("", {}).keys() - near.keys() - {answer})
        chosen += draw.sample(far, min(number - len(chosen), len(far)))  # of an attribute with too few answers
        return [near.get(key) or self._pools[""][key] for key in chosen]


def _attributes(sample: Sample) -> list[str]:
    """VQA-RAD names several: "PRES, ATTRIB"."""
    return [name for part in sample.content_type.split(",") if (name := part.strip().lower())]


def phrasings(sample: Sample, pools: OptionPools, style: str, draw: random.Random) -> list[str]:
    """The question pool of a sample. A phrasing whose options would show the right answer alone is left out."""
    made = STYLES[style]
    closed = sample.answer_type == "CLOSED" or normalise_answer(sample.answer) in YES_NO
    templates = made.closed if closed else made.opened
    options: dict[int, str] = {}
    found = []
    for number, template in templates:
        if number and (number not in options or not made.one_draw):
            options[number] = _options(sample, pools.wrong(sample, number - 1, draw), draw)
        if not number or "; (b)" in options[number]:
            found.append(template.format(question=sample.question, options=options.get(number, "")))
    return found


def _options(sample: Sample, wrong: list[str], draw: random.Random) -> str:
    listed = [sample.answer, *wrong]
    draw.shuffle(listed)
    return "; ".join(f"({'abcdefgh'[i]}){text}" for i, text in enumerate(listed))


def write_instruction_data(
    data: str | Path,
    out: str | Path,
    *,
    style: str = "paper",
    seed: int = 0,
    split_file: str | None = None,
    languages: Sequence[str] | None = ("en",),
    skip_bad: bool = False,
) -> dict:
    """Write a data set of questions about images to a folder: its training split in instruction format, the others as they are.

    The folder holds instruction_data.json (img_name, qid, answer, question_pool; answer_type and content_type beside them),
    validate.json and test.json where the data have them, and copies of the images. Each sample's
    options are drawn from (seed, its place in its file) alone. Returns {"train", "validate", "test": samples of each, "phrasings",
    "without_options": samples for which no wrong answer was found, "notes"}.

    ValueError: an unknown style; data in instruction format already; ``out`` with anything in it; what `load_samples` refuses.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r}: use one of {', '.join(STYLES)}")
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: give a new one")
    reading = {"languages": languages, "skip_bad": skip_bad}
    training = load_samples(data, split_file, "train", **reading)
    if any(sample.question_pool for sample in training):
        raise ValueError(f"{training.file}: already in instruction format: give the original questions and answers")
    held = _held_out(data, training, reading)
    pools, prefix = OptionPools(training), training.format.split("+")[0]
    drawn = [phrasings(s, pools, style, random.Random(f"instruct {seed} {s.source.name} {s.entry}")) for s in training]
    with atomic_folder(out) as draft:
        write_json(draft / FILE, [_as_mile(prefix, sample, pool) for sample, pool in zip(training, drawn)])
        for name, samples in held.items():
            write_json(draft / f"{name}.json", [_as_slake(prefix, sample) for sample in samples])
        for sample in (*training, *(sample for samples in held.values() for sample in samples)):
            _place(sample.image, draft / _image_name(prefix, sample))
    return {
        "train": len(training),
        **{name: len(held.get(name, ())) for name in ("validate", "test")},
        "phrasings": sum(map(len, drawn)),
        "without_options": sum(not any(map(until_options_end, pool)) for pool in drawn),
        "notes": [f"{count} bad entries skipped: {reason}" for reason, count in training.skipped.items()],
    }


def _held_out(data, training: SampleList, reading: dict) -> dict[str, SampleList]:
    """{"validate", "test": their samples}, where the data have them."""
    found = {name: held for name, split in (("validate", "val"), ("test", "test")) if (held := _split(data, split, training, reading))}
    if len(found) == 2 and found["validate"].files == found["test"].files:
        del found["test"]  # the validation file stood in for it
    return found


def _split(data, split: str, training: SampleList, reading: dict) -> SampleList | None:
    """The samples of a split, or None where the data have none apart from the training samples."""
    try:
        resolve(Path(data), split, QuestionNaming(read_json))
    except ValueError:  # no file for it; what is wrong in one is an error
        return None
    held = load_samples(data, None, split, **reading)
    trained = {(sample.source, sample.entry) for sample in training}
    return None if any((sample.source, sample.entry) in trained for sample in held) else held


def _image_name(prefix: str, sample: Sample) -> str:
    """As the authors name images: the data set's name, then its own."""
    name = PurePosixPath(sample.image_name.replace("\\", "/"))
    return str(PurePosixPath(prefix) / name)


def _qid(sample: Sample) -> int | str:
    return int(sample.qid) if sample.qid.isdecimal() and str(int(sample.qid)) == sample.qid else sample.qid


def _as_mile(prefix: str, sample: Sample, pool: list[str]) -> dict:
    row = {"img_name": _image_name(prefix, sample), "qid": _qid(sample), "answer": sample.answer, "question_pool": pool}
    return row | {"answer_type": sample.answer_type, "content_type": sample.content_type}


def _as_slake(prefix: str, sample: Sample) -> dict:
    row = {"img_name": _image_name(prefix, sample), "qid": _qid(sample), "question": sample.question, "answer": sample.answer}
    return row | {"answer_type": sample.answer_type, "content_type": sample.content_type, "q_lang": sample.language}


def _place(image: Path, path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, path)
