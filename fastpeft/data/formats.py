"""Visual question answering data sets, read as they are published.

| format  | annotation files                                                    | fields of an entry                            | images           |
|---------|---------------------------------------------------------------------|-----------------------------------------------|------------------|
| slake   | train.json, validate.json, test.json                                | img_name, question, answer, answer_type,      | imgs/xmlab1/     |
|         |                                                                     | content_type, q_lang, qid                     | source.jpg       |
| vqa-rad | trainset.json, testset.json, or "VQA_RAD Dataset Public.json", whose| image_name, question, answer, answer_type,    | images/, "VQA_RAD|
|         | entries with a phrase_type of test_... are the test split           | question_type, phrase_type, qid               | Image Folder"/   |
| mile    | instruction_data.json, RAD_instruction_data.json, ...               | img_name, question_pool, answer, qid          | any of the above |

Each as a JSON list or as JSON lines; more fields are welcome, and qid, content_type and q_lang may be absent. An entry's format is told by its fields, not by
its file's name. Answers may be numbers or booleans (true is "yes"); without an answer_type, yes and no are CLOSED and all else is OPEN.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from fastpeft.data._files import ImageFinder, Refused, choose_files, find_split_file, is_entry_list, read_ids, read_json
from fastpeft.data.samples import Sample, SampleList, hold_out, normalise_answer

__all__ = ["Sample", "SampleList", "hold_out", "load_samples"]

_FORMATS = "slake (img_name, question, answer), vqa-rad (image_name, question, answer), mile (img_name, question_pool, answer)"


def load_samples(data, split_file=None, split="train", *, languages=("en",), skip_bad=False, check_images=None) -> SampleList:
    """The samples of one split of a data set in a folder.

    Args:
        data: folder of one of the formats above.
        split_file: annotation file to use instead of the one chosen by name: absolute, or relative to the working directory or to `data`.
            A JSON list of qids, or a text file with one on each line, picks those entries out of the folder's annotation files.
        split: "train", "val" or "test": picks the file by the last words of its name, then the entries of a file that marks both
            train and test ones. None takes everything. "test" falls back on the validation file, then on the only file (see `.note`).
        languages: values of q_lang to keep (no q_lang counts as "en"); None keeps all.
        skip_bad: leave bad entries out and count them in `.skipped`, instead of stopping at the first.
        check_images: decode every image once, now. None does so where `skip_bad` is set; otherwise a damaged image is found when it is read.

    Returns a `SampleList`. ValueError, naming file and entry (counted from 0), for bad JSON, fields missing or empty, unknown answer types,
    and images missing, damaged or outside `data`, be it by an absolute path, by ".." or through a symbolic link.
    """
    folder = Path(data)
    if not folder.is_dir():
        what = "is a file: give its folder, and the file as split_file" if folder.is_file() else "no such folder"
        raise ValueError(f"{folder}: {what}")
    if split not in ("train", "val", "test", None):
        raise ValueError(f'split={split!r}: use "train", "val", "test", or None for everything')
    languages = (languages,) if isinstance(languages, str) else languages
    check_images = skip_bad if check_images is None else check_images
    ids, note = None, ""
    if split_file is None:
        files, note = choose_files(folder, split)
        pages = {file: read_json(file) for file in files}
    else:
        file = find_split_file(folder, split_file)
        if is_entry_list(file):
            pages = {file: read_json(file)}
        else:
            ids = read_ids(file)
            pages = {page: read_json(page) for page in choose_files(folder, None)[0]}

    reader = _Reader(ImageFinder(folder), languages, check_images)
    samples, formats, skipped = [], [], Counter()
    for page, entries in pages.items():
        formats.append(_format(page, entries))
        wanted = _marked(entries, None if ids is not None else split)
        if split == "test" and split_file is None and not note and len(wanted) == len(entries) and page.stem.lower().endswith("public"):
            note = f"{page.name} marks no test entries: all are used"
        for index in wanted:
            entry = entries[index]
            if ids is not None and isinstance(entry, dict) and _qid(entry, index) not in ids:
                continue
            try:
                sample = reader.sample(page, index, entry, formats[-1])
            except Refused as bad:
                if not skip_bad:
                    raise ValueError(f"{page}: entry {index}: {bad}") from None
                skipped[bad.reason] += 1
            else:
                samples += [sample] if sample else []
    if ids is not None:
        _check_ids(ids, samples, file, pages, skip_bad, skipped)
    if not samples:
        raise ValueError(_nothing_left(pages, split, languages, reader.filtered, skipped))
    return SampleList(samples, dict(skipped), dict(reader.filtered), "+".join(dict.fromkeys(formats)), tuple(pages), note)


def _format(file: Path, entries: list) -> str:
    fields = [set(entry) for entry in entries if isinstance(entry, dict)]
    for names in fields:  # the first entry that shows its kind speaks for the file
        if "question_pool" in names:
            return "mile"
        if "image_name" in names:
            return "vqa-rad"
        if "img_name" in names:
            return "slake"
    if not fields:
        raise ValueError(f"{file}: entry 0: expected an object with fields, not {type(entries[0]).__name__}; supported formats: {_FORMATS}")
    raise ValueError(f"{file}: unknown format: entries have the fields {', '.join(sorted(fields[0])) or '(none)'}; supported formats: {_FORMATS}")


def _marked(entries: list, split: str | None) -> list[int]:
    """Indices of the entries of a split: all of them, unless the file marks some of its entries, and not all, as test entries."""
    test = [isinstance(e, dict) and str(e.get("phrase_type", "")).strip().lower().startswith("test_") for e in entries]
    if split is None or all(test) or not any(test):
        return list(range(len(entries)))
    return [i for i, marked in enumerate(test) if marked is (split == "test")]


def _qid(entry: dict, index: int) -> str:
    qid = entry.get("qid")
    return str(index if qid is None or str(qid).strip() == "" else qid).strip()


class _Reader:
    """Entries to samples; counts those in other languages."""

    def __init__(self, find_image: ImageFinder, languages, check_images: bool):
        self.find_image, self.check_images, self.filtered, self._checked = find_image, check_images, Counter(), {}
        self.languages = None if languages is None else {str(x).strip().lower() for x in languages}

    def sample(self, file: Path, index: int, entry, kind: str) -> Sample | None:
        if not isinstance(entry, dict):
            raise Refused("not an object", f"expected an object with fields, not {type(entry).__name__}")
        language = str(entry.get("q_lang") or "en").strip().lower()
        if self.languages is not None and language not in self.languages:
            self.filtered[language] += 1
            return None
        name = _text(entry, "image_name" if kind == "vqa-rad" else "img_name")
        pool = _pool(entry["question_pool"]) if "question_pool" in entry else ()
        question = _text(entry, "question") if "question" in entry or not pool else pool[0]
        answer = _text(entry, "answer")
        answer_type = str(entry.get("answer_type") or "").strip().upper()
        if not answer_type:
            answer_type = "CLOSED" if normalise_answer(answer) in ("yes", "no") else "OPEN"
        if answer_type not in ("OPEN", "CLOSED"):
            raise Refused("unknown answer_type", f"answer_type {entry['answer_type']!r} is neither OPEN nor CLOSED")
        image = self.find_image(name)
        if self.check_images:
            self._decode(image)
        content = " ".join(str(entry.get("content_type") or entry.get("question_type") or "").split())
        return Sample(image, question, answer, answer_type, _qid(entry, index), content, language, pool, index, file, name)

    def _decode(self, image: Path) -> None:
        if image not in self._checked:
            from fastpeft.data.images import load_image

            try:
                load_image(image)
                self._checked[image] = ""
            except ValueError as error:
                self._checked[image] = str(error)
        if self._checked[image]:
            raise Refused("corrupt image", self._checked[image])


def _text(entry: dict, name: str) -> str:
    """A field as text: numbers as written, true and false as yes and no, white space collapsed."""
    if name not in entry:
        raise Refused(f"missing {name}", f"no field {name!r} (it has {', '.join(sorted(map(str, entry))) or 'none'})")
    value = entry[name]
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else value
    elif value is None or isinstance(value, float):
        value = ""
    elif not isinstance(value, (str, int)):
        raise Refused(f"bad {name}", f"{name} must be text or a number, not {type(value).__name__}")
    text = " ".join(str(value).split())
    if not text:
        raise Refused(f"empty {name}", f"{name} is empty")
    return text


def _pool(pool) -> tuple[str, ...]:
    if not isinstance(pool, list) or not all(isinstance(q, str) for q in pool):
        raise Refused("bad question_pool", "question_pool must be a list of questions")
    questions = tuple(" ".join(q.split()) for q in pool)
    if not questions or not all(questions):
        raise Refused("empty question", "question_pool holds no question" if not questions else "question_pool holds an empty question")
    return questions


def _check_ids(ids, samples, file, pages, skip_bad, skipped) -> None:
    """Every qid of a split file must name one entry: more would be a guess, none a typing error."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.qid in found:
            first = found[sample.qid]
            where = f"{first.source.name} entry {first.entry} and {sample.source.name} entry {sample.entry}"
            raise ValueError(f"{file}: qid {sample.qid} is ambiguous: {where} both have it; list the entries themselves, as annotation JSON")
        found[sample.qid] = sample
    present = {_qid(e, i) for entries in pages.values() for i, e in enumerate(entries) if isinstance(e, dict)}
    missing = [qid for qid in ids if qid not in present]
    if missing and not skip_bad:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{file}: {len(missing)} of {len(ids)} qids are in none of {', '.join(p.name for p in pages)}: {some}")
    if missing:
        skipped["unknown qid"] += len(missing)


def _nothing_left(pages, split, languages, filtered, skipped) -> str:
    left_out = [f"{n} in language {name!r} (languages={languages!r})" for name, n in filtered.items()]
    left_out += [f"{n} skipped: {reason}" for reason, n in skipped.items()]
    what = f"no {split} samples" if split else "no samples"
    return f"{', '.join(str(p) for p in pages)}: {what} left" + (f" ({'; '.join(left_out)})" if left_out else "")
