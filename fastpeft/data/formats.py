"""Visual question answering data sets, read as they are published.

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
from pathlib import Path

from fastpeft.data._files import ImageFinder, Refused, choose_files, field, find_split_file, place_image, read_json, read_split_file
from fastpeft.data.samples import Sample, SampleList, hold_out, normalise_answer

__all__ = ["Sample", "SampleList", "hold_out", "load_samples"]

_FORMATS = "slake (img_name, question, answer), vqa-rad (image_name, question, answer), mile (img_name, question_pool, answer)"


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
    languages = (languages,) if isinstance(languages, str) else languages

    ids, note = [], ""
    if split_file is None:
        files, note = choose_files(folder, split)
        pages = {file: read_json(file) for file in files}
    else:
        file = find_split_file(folder, split_file)
        entries, ids = read_split_file(file)
        pages = {page: read_json(page) for page in choose_files(folder, None)[0]} if ids else {file: entries}

    reader = _Reader(ImageFinder(folder, skip_bad if check_images is None else check_images), languages)
    samples, formats, skipped, wanted_ids = [], [], Counter(), set(ids)
    for page, entries in pages.items():
        formats.append(_format(page, entries))
        for index in range(len(entries)) if ids else _of_split(entries, split, split_file is not None):
            if ids and not (isinstance(entries[index], dict) and _qid(entries[index], index) in wanted_ids):
                continue
            try:
                sample = reader.sample(page, index, entries[index], formats[-1])
            except Refused as bad:
                if not skip_bad:
                    raise ValueError(f"{page}: entry {index}: {bad}") from None
                skipped[bad.reason] += 1
            else:
                samples += [sample] if sample else []
    if ids:
        unknown = _unknown_ids(file, ids, pages)
        if unknown and not skip_bad:
            some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            where = ", ".join(page.name for page in pages)
            raise ValueError(f"{file}: {len(unknown)} of {len(ids)} qids are in none of {where}: {some}")
        skipped.update({"unknown qid": len(unknown)} if unknown else {})
    if not samples:
        raise ValueError(_nothing_left(pages, split, languages, reader.filtered, skipped))
    return SampleList(samples, dict(skipped), dict(reader.filtered), "+".join(dict.fromkeys(formats)), tuple(pages), note)


def _format(file: Path, entries: list) -> str:
    fields = [set(entry) for entry in entries if isinstance(entry, dict)]
    for names in fields:  # the first entry that shows its kind speaks for the file
        for name, kind in (("question_pool", "mile"), ("image_name", "vqa-rad"), ("img_name", "slake")):
            if name in names:
                return kind
    if not fields:
        what = f"entry 0: expected an object with fields, not {type(entries[0]).__name__}"
    else:
        what = f"unknown format: entries have the fields {', '.join(sorted(fields[0])) or '(none)'}"
    raise ValueError(f"{file}: {what}; supported formats: {_FORMATS}")


def _of_split(entries: list, split: str | None, explicit: bool) -> list[int]:
    """Indices of a split's entries: all, unless some are marked as test ones. An explicit file of nothing else is taken whole."""
    test = _marks(entries)
    if split is None or not any(test) or (explicit and all(test)):
        return list(range(len(entries)))
    return [i for i, marked in enumerate(test) if marked is (split == "test")]


def _marks(entries: list) -> list[bool]:
    return [isinstance(e, dict) and str(e.get("phrase_type", "")).strip().lower().startswith("test_") for e in entries]


def marks_test(entries: list) -> bool:
    """Whether some of a file's entries say of themselves that they are for testing."""
    return any(_marks(entries))


def _qid(entry: dict, index: int) -> str:
    qid = field(entry, "qid")
    return str(index if qid is None or str(qid).strip() == "" else qid).strip()


def _unknown_ids(file: Path, ids: list[str], pages: dict[Path, list]) -> list[str]:
    """The qids no entry has. ValueError where one has several: taking both, or either, would be a guess."""
    places: dict[str, list[str]] = {qid: [] for qid in ids}
    for page, entries in pages.items():
        for index, entry in enumerate(entries):
            if isinstance(entry, dict) and _qid(entry, index) in places:
                places[_qid(entry, index)].append(f"{page.name} entry {index}")
    for qid, found in places.items():
        if len(found) > 1:
            raise ValueError(f"{file}: qid {qid} is ambiguous ({', '.join(found)}); give the entries themselves as split_file")
    return [qid for qid, found in places.items() if not found]


class _Reader:
    """Entries to samples; counts those in other languages."""

    def __init__(self, find_image: ImageFinder, languages):
        self.find_image, self.filtered = find_image, Counter()
        self.languages = None if languages is None else {str(x).strip().lower() for x in languages}

    def sample(self, file: Path, index: int, entry, kind: str) -> Sample | None:
        """None for an entry in a language that wasn't asked for; `Refused` for a bad one."""
        if not isinstance(entry, dict):
            raise Refused("not an object", f"expected an object with fields, not {type(entry).__name__}")
        language = str(field(entry, "q_lang") or "en").strip().lower()
        if self.languages is not None and language not in self.languages:
            self.filtered[language] += 1
            return None
        name = _text(entry, "image_name" if kind == "vqa-rad" else "img_name")
        pool = _pool(entry["question_pool"]) if "question_pool" in entry else ()
        question = pool[0] if pool and "question" not in entry else _line(entry, "question")
        answer = _line(entry, "answer")
        for phrasing in pool or (question,):
            place_image([phrasing], True, answer)
        answer_type = field(entry, "answer_type")
        if answer_type is None or str(answer_type).strip() == "":
            answer_type = "CLOSED" if normalise_answer(answer) in ("yes", "no") else "OPEN"
        answer_type = str(answer_type).strip().upper()
        if answer_type not in ("OPEN", "CLOSED"):
            raise Refused("unknown answer_type", f"answer_type {entry['answer_type']!r} is neither OPEN nor CLOSED")
        image = self.find_image(name)
        content = " ".join(str(field(entry, "content_type") or field(entry, "question_type") or "").split())
        return Sample(image, question, answer, answer_type, _qid(entry, index), content, language, pool, index, file, name)


def _text(entry: dict, name: str) -> str:
    """A field as text, stripped: numbers as written, true and false as yes and no."""
    if name not in entry:
        raise Refused(f"missing {name}", f"no field {name!r} (it has {', '.join(sorted(entry)) or 'none'})")
    value = field(entry, name)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else value
    elif not isinstance(value, (str, int, type(None))):
        what = value if isinstance(value, float) else type(value).__name__
        raise Refused(f"bad {name}", f"{name} must be text or a number, not {what}")
    text = "" if value is None else str(value).strip()
    if not text:
        raise Refused(f"empty {name}", f"{name} is empty")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused(f"bad {name}", f"{name} holds half a surrogate pair, which is no character")
    return text


def _line(entry: dict, name: str) -> str:
    return " ".join(_text(entry, name).split())


def _pool(pool) -> tuple[str, ...]:
    if not isinstance(pool, list) or not pool:
        raise Refused("bad question_pool", "question_pool must be a list of one or more questions")
    return tuple(_line({"question": question}, "question") for question in pool)


def _nothing_left(pages, split, languages, filtered, skipped) -> str:
    left_out = [f"{n} in language {name!r}, of languages={languages!r}" for name, n in filtered.items()]
    left_out += [f"{n} skipped for {reason}" for reason, n in skipped.items()]
    what = f"no {split} samples left" if split else "no samples left"
    return f"{', '.join(str(page) for page in pages)}: {what}" + (f" ({'; '.join(left_out)})" if left_out else "")
