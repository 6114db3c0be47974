"""Instruction data of language and vision-language models, read as they are published; formats in `_instruction_formats`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from fastpeft.data._files import ImageFinder, Refused, field, find_split_file, place_image, read_split_file, read_value
from fastpeft.data._instruction_formats import KINDS, EntryReader, entries_of, kind_of, suggested_folder
from fastpeft.data.formats import load_samples, marks_test
from fastpeft.data.samples import Instruction, SampleList
from fastpeft.data.scienceqa import load_scienceqa

__all__ = ["Instruction", "load_instructions"]

_SPLIT_WORD = re.compile(r"(?:^|[\W_])(train|val|valid|validate|validation|test)(?:set)?(?:\d{4})?(?=$|[\W_])", re.IGNORECASE)


def load_instructions(
    data,
    kind: str | None = None,
    split: str | None = "train",
    *,
    split_file=None,
    languages=("en",),
    instruction: str | None = None,
    image_folder: str = "",
    split_turns: bool = False,
    prompt_format="QCM-ALE",
    use_caption: bool = False,
    skip_bad: bool = False,
    check_images: bool | None = None,
) -> SampleList:
    """The instructions of one split of a data set: a list of `Instruction`.

    Args:
        data: a folder, or an annotation file in it (or in its annotations/).
        kind: "alpaca", "llava", "coco", "reports", "scienceqa" or "vqa"; None tells it by the file's fields.
        split: "train", "val" or "test", by the words of the file's name or by the splits it holds itself; a file that says
            nothing is for training. None takes everything a folder's files hold.
        split_file: annotation file to use instead of the one chosen by name; absolute, or relative to the working directory or
            to `data`, whose images it names. Of a file that holds several splits, the entries of `split` where there are any. Or a
            JSON list or a text file of qids, picked out of the training split if it has them all, else out of everything.
        languages: of question answering data, values of q_lang to keep (no q_lang counts as "en"); None keeps all.
        instruction: what is asked where the data hold responses only (captions, reports).
        image_folder: put before each image's name: "train2017" for LLaVA's bare names of COCO images.
        split_turns: each turn of a conversation a sample of its own, as LaVIN trains.
        prompt_format, use_caption: of ScienceQA, see `load_scienceqa`.
        skip_bad: leave bad entries out and count them in `.skipped`, instead of stopping at the first.
        check_images: decode every image once, now. None: where `skip_bad` is set.

    A sample without an image has `image` None; a file may hold both sorts.

    ValueError, naming file and entry (counted from 0): bad JSON, unknown formats, fields missing or of the wrong kind,
    conversations that don't alternate, "<image>" without an image or more than once, images missing, damaged or outside the folder; no
    samples left.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}, or None to tell it by the files")
    if split not in ("train", "val", "test", None) and kind != "scienceqa":
        raise ValueError(f'split={split!r}: use "train", "val", "test", or None for everything')
    path = Path(data)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    if split_file is not None:
        path = find_split_file(folder, split_file)
        if ids := _qids(path):
            how = {"instruction": instruction, "image_folder": image_folder, "split_turns": split_turns, "skip_bad": skip_bad}
            how |= {"prompt_format": prompt_format, "use_caption": use_caption, "check_images": check_images, "languages": languages}
            return _picked(path, ids, data, kind, how)
    problems = path if path.is_file() else path / "problems.json"
    if kind == "scienceqa" or (kind is None and problems.name == "problems.json" and problems.is_file()):
        options = {"prompt_format": prompt_format, "use_caption": use_caption}
        return load_scienceqa(problems.parent, split, skip_bad=skip_bad, check_images=check_images, **options)
    pages = _choose(path, folder, kind, split)
    finder = ImageFinder(folder, skip_bad if check_images is None else check_images)
    samples, skipped, filtered, kinds, note = [], Counter(), Counter(), [], ""
    for file, (found, value) in pages.items():
        kinds.append(found)
        if found == "vqa":
            if split == "test" and path.is_dir() and _split_of(file) != "test" and not marks_test(value):
                note = f"no test file: {file.name} is used, the only one; a model trained on it is tested on what it has seen"
            part = load_samples(folder, file, split, languages=languages, skip_bad=skip_bad, check_images=check_images)
            samples += map(_asked, part)
            skipped.update(part.skipped)
            filtered.update(part.filtered)
            continue
        reader = EntryReader(finder, instruction, image_folder.strip("/"), split_turns)
        bare = "" if image_folder else suggested_folder(file)
        entries = list(entries_of(value, split, bare))
        if not entries and split_file is not None:  # a file that was named, and has no such split, is taken whole
            entries = list(entries_of(value, None, bare))
        for index, entry in entries:
            try:
                fields = list(reader(found, entry))
            except Refused as bad:
                if not skip_bad:
                    raise ValueError(f"{file}: entry {index}: {bad}") from None
                skipped[bad.reason] += 1
            else:
                qid = str(index if field(entry, "id") is None else entry["id"])
                samples += [Instruction(kind=found, qid=qid, entry=index, source=file, **f) for f in fields]
    if not samples:
        left_out = "; ".join(f"{n} in language {name!r}, of languages={languages!r}" for name, n in filtered.items())
        left_out += "; ".join(f"{n} skipped for {reason}" for reason, n in skipped.items())
        what = f"no {split} samples" if split else "no samples"
        raise ValueError(f"{', '.join(map(str, pages))}: {what} left" + (f" ({left_out})" if left_out else ""))
    return SampleList(samples, dict(skipped), dict(filtered), "+".join(dict.fromkeys(kinds)), tuple(pages), note)


def _qids(file: Path) -> list[str]:
    """Those a split file lists; none where it holds annotations."""
    listed = file.suffix.lower() not in (".json", ".jsonl") or isinstance(read_value(file), list)
    return read_split_file(file)[1] if listed else []


def _picked(file: Path, ids: list[str], data, kind: str | None, how: dict) -> SampleList:
    """The samples of these qids. ValueError where some are unknown, unless bad entries are skipped, or stand in several files."""
    wanted = set(ids)
    try:
        samples = load_instructions(data, kind, "train", **how)  # what a run with a held-out part lists
        whole = wanted <= {sample.qid for sample in samples}
    except ValueError:
        whole = False
    if not whole:
        samples = load_instructions(data, kind, None, **how)
    found = [sample for sample in samples if sample.qid in wanted]
    sources: dict[str, set[Path]] = {}
    for sample in found:
        sources.setdefault(sample.qid, set()).add(sample.source)
    if twice := [qid for qid, files in sources.items() if len(files) > 1]:
        where = ", ".join(sorted(path.name for path in sources[twice[0]]))
        raise ValueError(f"{file}: qid {twice[0]} is ambiguous (in {where}); give the entries themselves as split_file")
    unknown = [qid for qid in ids if qid not in sources]
    if (unknown and not how["skip_bad"]) or not found:
        raise ValueError(f"{file} names {len(unknown)} samples that {data} does not have, such as {unknown[0]!r}")
    skipped = samples.skipped | ({"unknown qid": len(unknown)} if unknown else {})
    return SampleList(found, skipped, samples.filtered, samples.format, samples.files, samples.note)


def _asked(sample) -> Instruction:
    """A question about an image as an instruction; the phrasings of a pool are alternatives."""
    asked = (place_image([question], True)[0] for question in sample.question_pool or (sample.question,))
    turns = tuple(((question, sample.answer),) for question in asked)
    facts = {"answer_type": sample.answer_type, "content_type": sample.content_type}
    place = {"qid": sample.qid, "entry": sample.entry, "source": sample.source, "image_name": sample.image_name}
    return Instruction(turns[0], sample.image, "vqa", alternatives=turns[1:], facts=facts, **place)


def _split_of(file: Path) -> str | None:
    words = _SPLIT_WORD.findall(file.stem)
    return None if not words else "val" if words[-1].lower().startswith("val") else words[-1].lower()


def _choose(path: Path, folder: Path, kind: str | None, split: str | None) -> dict[Path, tuple[str, object]]:
    """{annotation file: (its format, its content)} for a split."""
    if path.is_file():
        value = read_value(path)
        found = kind_of(value)
        if found is None or kind not in (None, found):
            known = "an unknown format" if found is None else f"format {found}"
            wanted = kind or f"a known one ({', '.join(KINDS)})"
            raise ValueError(f"{path}: {known}, not {wanted}: {_fields(value)}")
        return {path: (found, value)}
    places = [place for place in (folder, folder / "annotations") if place.is_dir()]
    suffixes = (".json", ".jsonl")
    files = [f for place in places for f in sorted(place.iterdir()) if f.suffix.lower() in suffixes and f.name[0] != "."]
    files = [f for f in files if f.name.startswith("captions")] or files  # COCO's others are large, and not captions
    others = []
    if split is not None:
        mine = [f for f in files if _split_of(f) == split] or [f for f in files if _split_of(f) is None]
        files, others = mine, [f for f in files if f not in mine]
    values = {file: read_value(file) for file in files}
    pages = {file: (kind_of(value), value) for file, value in values.items()}
    pages = {file: page for file, page in pages.items() if page[0] is not None and kind in (None, page[0])}
    known = dict(pages)
    if split not in ("train", None):  # a file without a split in its name or in itself is for training
        marked = {file for file, (found, value) in pages.items() if split == "test" and found == "vqa" and marks_test(value)}
        pages = {file: page for file, page in pages.items() if _split_of(file) or isinstance(page[1], dict) or file in marked}
    if not pages:
        alone = known or {file: (kind_of(value := read_value(file)), value) for file in others}
        if split == "test" and [found for found, _ in alone.values()] == ["vqa"] and kind in (None, "vqa"):
            return alone  # the only file, as in `load_samples`
        if known or others:
            seen = f"{', '.join(file.name for file in known or others)} is for another split, or says nothing of splits"
            raise ValueError(f"{folder}: no {split} annotations: {seen}; name the file to use as split_file")
        seen = "; ".join(f"{file.name}: {_fields(value)}" for file, value in values.items()) or "no JSON files"
        what = f"{split} annotations" if split else "annotations"
        raise ValueError(f"{folder}: no {what} in the format {kind or ', '.join(KINDS)} ({seen})")
    if len(pages) > 1 and split is not None:
        raise ValueError(
            f"{folder}: several files for {split} ({', '.join(f.name for f in pages)}); give the one to use instead of the folder"
        )
    return pages


def _fields(value) -> str:
    first = value if isinstance(value, dict) else next((e for e in value if isinstance(e, dict)), None) if isinstance(value, list) else None
    return f"fields {', '.join(list(map(str, first))[:8])}" if first else f"{type(value).__name__} without fields"
