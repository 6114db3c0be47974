"""Readers of visual question answering data sets as published.

- slake: train.json, validate.json, test.json with img_name, question, answer, answer_type, content_type, q_lang, qid;
  images as imgs/xmlab1/source.jpg.
- vqa-rad: trainset.json, testset.json with image_name, question, answer, answer_type, question_type, phrase_type, qid; or
  "VQA_RAD Dataset Public.json", whose phrase_type says test_... for the test split; images in images/ or "VQA_RAD Image Folder/".
- mile: instruction_data.json, RAD_instruction_data.json with img_name ("vqa-rad/x.jpg"), question_pool, answer, qid.

Each as a JSON list or as JSON lines. A file's format is told by its entries' fields, not by its name. More fields are
welcome; qid, q_lang, content_type and answer_type may be absent: without an answer_type, yes and no are CLOSED and all else
is OPEN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastpeft.data._files import BadEntry, ImageFinder, find_split_file, listed, read_json, read_split_file, value_of, without_image_mark
from fastpeft.data._splits import AnnotationFile, Format, QuestionNaming, names, nothing_left, read_entries, resolve
from fastpeft.data.samples import Sample, SampleList, hold_out, normalise_answer

__all__ = ["Sample", "SampleList", "hold_out", "load_samples"]

_KNOWN = "slake (img_name, question, answer), vqa-rad (image_name, question, answer), mile (img_name, question_pool, answer)"


def load_samples(data, split_file=None, split="train", *, languages=("en",), skip_bad=False, check_images=None) -> SampleList:
    """The samples of one split of a data set in a folder.

    Args:
        data: folder of one of the formats above.
        split_file: annotation file to use instead of the one chosen by name; absolute, or relative to the working directory or
            to `data`. A JSON list or a text file of qids picks those entries out of all of the folder's annotation files.
        split: "train", "val" or "test" picks the file by its name's last words, and the entries of a file that marks some as test
            entries; None takes everything. Without a test file, "test" takes the validation file, else the only one: see `.note`.
        languages: values of q_lang to keep (no q_lang counts as "en"); None keeps all.
        skip_bad: leave bad entries out and count them in `.skipped`, instead of stopping at the first.
        check_images: decode every image once, now. None: where `skip_bad` is set. Else a damaged image is found when it is read.

    Answers may be numbers, as written (2.0 is "2"), or booleans (true is "yes"). White space is collapsed everywhere.

    ValueError, naming file and entry (counted from 0): bad JSON; fields missing, empty (null, NaN) or of the wrong kind; unknown
    answer types; "<image>" in an answer, or more than once in a question (once it stays, as in MILE's); images missing, damaged, or
    outside `data`, be it by an absolute path, by ".." or through a symbolic link; no samples left.
    """
    folder = Path(data)
    if not folder.is_dir():
        what = "is a file: give its folder, and the file as split_file" if folder.is_file() else "no such folder"
        raise ValueError(f"{folder}: {what}")
    if split not in ("train", "val", "test", None):
        raise ValueError(f'split={split!r}: use "train", "val", "test", or None for everything')

    ids: list[str] = []
    if split_file is None:
        sources, note = resolve(folder, split, QuestionNaming(read_json))
    else:
        file, note = find_split_file(folder, split_file), ""
        entries, ids = read_split_file(file)
        sources = resolve(folder, None, QuestionNaming(read_json))[0] if ids else [AnnotationFile(file, read=lambda _: entries)]

    reader = QuestionReader(ImageFinder(folder, skip_bad if check_images is None else check_images), languages)
    samples, used, skipped, wanted = [], [], Counter(), set(ids)
    for source in sources:
        form = format_of(source)
        entries = source.entries(None if ids else split, whole=split_file is not None)
        if ids:
            entries = [(index, e) for index, e in entries if isinstance(e, dict) and qid_of(e, index) in wanted]
        samples += read_entries(source, entries, partial(form.read, reader), skipped if skip_bad else None)
        used.append(form.name)
    if ids and (unknown := _unknown_ids(file, ids, sources)):
        if not skip_bad:
            some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise ValueError(f"{file}: {len(unknown)} of {len(ids)} qids are in none of {names(sources)}: {some}")
        skipped["unknown qid"] = len(unknown)
    if not samples:
        raise ValueError(nothing_left(sources, split, reader, skipped))
    files = tuple(source.path for source in sources)
    return SampleList(samples, dict(skipped), dict(reader.filtered), "+".join(dict.fromkeys(used)), files, note)


def format_of(source: AnnotationFile) -> Format:
    """Which of QUESTION_FORMATS a source of questions is in. ValueError for none, naming the fields."""
    if (form := source.format(QUESTION_FORMATS)) is not None:
        return form
    fields = [entry for _, _, entry in source.all_entries if isinstance(entry, dict)]
    if not fields:
        what = f"entry 0: expected an object with fields, not {type(source.value[0]).__name__}"
    else:
        what = f"unknown format: entries have the fields {listed(sorted(fields[0])) or '(none)'}"
    raise ValueError(f"{source.path}: {what}; supported formats: {_KNOWN}")


def qid_of(entry: dict, index: int) -> str:
    qid = value_of(entry, "qid")
    return str(index if qid is None or str(qid).strip() == "" else qid).strip()


def _unknown_ids(file: Path, ids: list[str], sources: list[AnnotationFile]) -> list[str]:
    """The qids no entry has. ValueError where one has several: taking both, or either, would be a guess."""
    places: dict[str, list[str]] = {qid: [] for qid in ids}
    for source in sources:
        for index, entry in source.entries(None):
            if isinstance(entry, dict) and qid_of(entry, index) in places:
                places[qid_of(entry, index)].append(f"{source.path.name} entry {index}")
    for qid, found in places.items():
        if len(found) > 1:
            raise ValueError(f"{file}: qid {qid} is ambiguous ({', '.join(found)}); give the entries themselves as split_file")
    return [qid for qid, found in places.items() if not found]


class QuestionReader:
    """Entries to samples; counts those in other languages in `filtered`."""

    def __init__(self, find_image: ImageFinder, languages):
        self.find_image, self.filtered = find_image, Counter()
        self.asked_for = (languages,) if isinstance(languages, str) else languages
        self.languages = None if languages is None else {str(x).strip().lower() for x in self.asked_for}

    def sample(self, source: AnnotationFile, index: int, entry: dict, image_field: str) -> Iterator[Sample]:
        """None of an entry in a language that wasn't asked for; `BadEntry` for a bad one."""
        language = str(value_of(entry, "q_lang") or "en").strip().lower()
        if self.languages is not None and language not in self.languages:
            self.filtered[language] += 1
            return
        name = _text(entry, image_field)
        pool = _pool(entry["question_pool"]) if "question_pool" in entry else ()
        question = pool[0] if pool and "question" not in entry else _line(entry, "question")
        answer = _line(entry, "answer")
        for phrasing in pool or (question,):
            without_image_mark([phrasing], True, answer)
        answer_type = value_of(entry, "answer_type")
        if answer_type is None or str(answer_type).strip() == "":
            answer_type = "CLOSED" if normalise_answer(answer) in ("yes", "no") else "OPEN"
        answer_type = str(answer_type).strip().upper()
        if answer_type not in ("OPEN", "CLOSED"):
            raise BadEntry("unknown answer_type", f"answer_type {entry['answer_type']!r} is neither OPEN nor CLOSED")
        image = self.find_image(name)
        content = " ".join(str(value_of(entry, "content_type") or value_of(entry, "question_type") or "").split())
        yield Sample(image, question, answer, answer_type, qid_of(entry, index), content, language, pool, index, source.path, name)


def _format(name: str, shown_by: str, image_field: str) -> Format:
    return Format(
        name, lambda fields: shown_by in fields, lambda reader, source, index, entry: reader.sample(source, index, entry, image_field)
    )


QUESTION_FORMATS = (
    _format("mile", "question_pool", "img_name"),
    _format("vqa-rad", "image_name", "image_name"),
    _format("slake", "img_name", "img_name"),
)


def _text(entry: dict, name: str) -> str:
    """A field as text, stripped: numbers as written, true and false as yes and no."""
    if name not in entry:
        raise BadEntry(f"missing {name}", f"no field {name!r} (it has {listed(sorted(entry)) or 'none'})")
    value = value_of(entry, name)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else value
    elif not isinstance(value, (str, int, type(None))):
        what = value if isinstance(value, float) else type(value).__name__
        raise BadEntry(f"bad {name}", f"{name} must be text or a number, not {what}")
    text = "" if value is None else str(value).strip()
    if not text:
        raise BadEntry(f"empty {name}", f"{name} is empty")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadEntry(f"bad {name}", f"{name} holds half a surrogate pair, which is no character")
    return text


def _line(entry: dict, name: str) -> str:
    return " ".join(_text(entry, name).split())


def _pool(pool) -> tuple[str, ...]:
    if not isinstance(pool, list) or not pool:
        raise BadEntry("bad question_pool", "question_pool must be a list of one or more questions")
    return tuple(_line({"question": question}, "question") for question in pool)
