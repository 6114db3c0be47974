"""Sample types that all readers return: `Sample`, a question about an image; `Instruction`; and `SampleList`."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One question about one image: `Sample(image, question, answer)`; the rest is what readers know beside it.

    `image` is an absolute, existing path; `image_name` the name the annotation file gives it. `entry` counts from 0 in `source`.
    `question_pool` holds the phrasings of an instruction data set (empty elsewhere), of which `question` is then the first.
    """

    image: Path
    question: str
    answer: str
    answer_type: str = "OPEN"  # or "CLOSED"
    qid: str = ""
    content_type: str = ""
    language: str = "en"
    question_pool: tuple[str, ...] = ()
    entry: int = 0
    source: Path = Path()
    image_name: str = ""
    data: str = ""  # the data set's name, where several are mixed


Turns = tuple[tuple[str, str], ...]  # (what is asked, the answer), once or more


@dataclass(frozen=True)
class Instruction:
    """An instruction and its response, or a conversation, with an image or without.

    `image` is an absolute, existing path or None; `image_name` the name the file gives it. `context` is what the first question
    is about (Alpaca's "input"). `alternatives` are other turns of the same sample; each epoch draws one of all. `kind` is the
    name of its format; `entry` its place in `source` (an index in a list, or a problem's id). `facts` holds what the format
    says beside the text, such as a problem's subject and grade. `image_at`: where in the first question the data have the image's mark,
    which is taken out of it; None where they have none.
    """

    turns: Turns
    image: Path | None
    kind: str
    qid: str
    entry: int | str
    source: Path
    context: str = ""
    image_name: str = ""
    alternatives: tuple[Turns, ...] = ()
    facts: dict = field(default_factory=dict)
    image_at: int | None = None
    data: str = ""  # the data set's name, where several are mixed

    @property
    def question(self) -> str:
        """The first question."""
        return self.turns[0][0]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1][1]


@dataclass
class SampleList(Sequence):
    """A sequence of samples or instructions, with a record of where they came from and which entries were left out.

    skipped: reason -> count of bad entries left out (`skip_bad`). filtered: language -> count of entries in languages not
    asked for.
    format: the name of their format, or several joined by "+". files: the annotation files read. note: which file was chosen
    instead of the expected one, else "".
    weights: of mixed data sets, name -> share of an epoch's samples (they need not add up to 1); empty: by size.
    """

    samples: list[Sample] | list[Instruction]
    skipped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    format: str = ""
    files: tuple[Path, ...] = ()
    note: str = ""
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The annotation file (the first, where there were several)."""
        return self.files[0] if self.files else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def mix(lists: Mapping[str, SampleList], weights: Mapping[str, float] | None = None) -> SampleList:
    """Several data sets as one, each sample with its data set's name."""
    samples = [replace(sample, data=name) for name, each in lists.items() for sample in each]
    counts = [sum((Counter(getattr(each, kind)) for each in lists.values()), Counter()) for kind in ("skipped", "filtered")]
    formats = "+".join(dict.fromkeys(each.format for each in lists.values()))
    files = tuple(file for each in lists.values() for file in each.files)
    note = "; ".join(f"{name}: {each.note}" for name, each in lists.items() if each.note)
    return SampleList(samples, *map(dict, counts), formats, files, note, dict(weights or {}))


def normalise_answer(text) -> str:
    """The normal form of an answer, in which two answers are compared. It drops only what an uncased WordPiece tokenizer can't express.

    Lower case; accents removed; white space collapsed; no space beside punctuation, since decoding turns "x-ray" into "x -
    ray"; no full stop at the end. Articles, plurals and synonyms count: "the left lung" isn't "left lung".
    """
    text = "".join(c for c in unicodedata.normalize("NFD", str(text).lower()) if unicodedata.category(c) != "Mn")
    text = re.sub(r"\s*([^\w\s]|_)\s*", r"\1", " ".join(text.split()))
    return text.rstrip(".").strip()


def hold_out(samples: Sequence[Sample], fraction: float, seed: int = 0, by: str = "image") -> tuple[SampleList, SampleList]:
    """(kept, held): about `fraction` of the samples held out in whole groups, so that no image (by="image") is on both sides.

    The same samples, fraction and seed give the same split on any machine. by="sample" splits questions one by one: images
    are then shared, and a score on the held part measures memory of images too. A sample without an image is a group of its
    own. ValueError where either side would be empty.
    """
    if by not in ("image", "sample"):
        raise ValueError(f'by={by!r}: use "image" or "sample"')
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction!r}: use a number between 0 and 1, such as 0.1")
    groups: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.image if by == "image" and sample.image is not None else index, []).append(index)
    if len(groups) < 2:
        raise ValueError(f"cannot hold out part of {len(samples)} samples on {len(groups)} image(s): at least 2 are needed")
    order = list(groups.values())  # by first appearance: no path takes part in the draw
    random.Random(f"hold out {seed}").shuffle(order)
    held: set[int] = set()
    target = max(1, round(fraction * len(samples)))
    for group in order[:-1]:  # one group always stays
        if len(held) >= target:
            break
        held.update(group)
    meta = {name: getattr(samples, name) for name in ("format", "files", "note", "weights") if hasattr(samples, name)}
    parts = ([s for i, s in enumerate(samples) if (i in held) is side] for side in (False, True))
    kept, out = (SampleList(part, **meta) for part in parts)
    return kept, out
