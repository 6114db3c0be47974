"""Readers of instruction data for language and vision-language models as published; the formats are in `_instruction_formats`."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from fastpeft.data._files import ImageFinder, find_split_file, read_split_file, read_value
from fastpeft.data._instruction_formats import INSTRUCTION_FORMATS, KINDS, TURNS, InstructionReader
from fastpeft.data._splits import AnnotationFile, InstructionNaming, nothing_left, read_entries, resolve
from fastpeft.data.formats import QuestionReader
from fastpeft.data.samples import Instruction, SampleList
from fastpeft.data.scienceqa import load_scienceqa

__all__ = ["Instruction", "load_instructions"]


def load_instructions(
    data,
    kind: str | None = None,
    split: str | None = "train",
    *,
    split_file=None,
    languages=("en",),
    instruction: str | None = None,
    image_folder: str = "",
    image_prefix: str = "",
    turns: str = "dialogue",
    prompt_format="QCM-ALE",
    use_caption: bool = False,
    tell_format: bool | None = None,
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
        instruction: what is asked where the data hold responses only (captions, reports). None: of captions the papers' words, of reports
            one of XrayGPT's wordings, drawn anew in every epoch of training.
        image_folder: put before each image's name: "train2017" for LLaVA's bare names of COCO images.
        image_prefix: put before each image's file name: LaVIN's "COCO_train2014_".
        turns: of conversations: "dialogue", a sample of all turns; "each", every turn a sample of its own, or "first", the first turn
            alone, as LaVIN trains on LLaVA's conversations and on its other files.
        prompt_format, use_caption, tell_format: of ScienceQA, see `load_scienceqa`.
        skip_bad: leave bad entries out and count them in `.skipped`, instead of stopping at the first.
        check_images: decode every image once, now. None: where `skip_bad` is set.

    A sample without an image has `image` None; a file may hold both sorts.

    ValueError, naming file and entry (counted from 0): bad JSON, unknown formats, fields missing or of the wrong kind,
    conversations that don't alternate, "<image>" without an image or more than once, images missing, damaged or outside the folder; no
    samples left.
    """
    if turns not in TURNS:
        raise ValueError(f"turns={turns!r}: use one of {', '.join(TURNS)}")
    path = _checked(data, kind, split)
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    if split_file is not None:
        path = find_split_file(folder, split_file)
        if ids := _qids(path):
            options = {"instruction": instruction, "image_folder": image_folder, "image_prefix": image_prefix, "turns": turns}
            options |= {
                "skip_bad": skip_bad,
                "prompt_format": prompt_format,
                "use_caption": use_caption,
                "tell_format": tell_format,
                "check_images": check_images,
                "languages": languages,
            }
            return _picked(path, ids, data, kind, options)
    problems = path if path.is_file() else path / "problems.json"
    if kind == "scienceqa" or (kind is None and problems.name == "problems.json" and problems.is_file()):
        options = {"prompt_format": prompt_format, "use_caption": use_caption, "tell_format": tell_format}
        return load_scienceqa(problems.parent, split, skip_bad=skip_bad, check_images=check_images, **options)
    sources, note = (
        ([_named(path, kind)], "") if path.is_file() else resolve(folder, split, InstructionNaming(INSTRUCTION_FORMATS, kind, KINDS))
    )
    finder = ImageFinder(folder, skip_bad if check_images is None else check_images)
    inside = f"{image_folder.strip('/')}/" if image_folder else ""
    drawn = split in ("train", None)
    reader = InstructionReader(finder, QuestionReader(finder, languages), instruction, inside, image_prefix, turns, drawn)
    samples, used, skipped = [], [], Counter()
    for source in sources:
        form = source.format(INSTRUCTION_FORMATS)
        # Where all entries of a list are marked as test ones, the caller's choice of the file, or its name, goes before the marks.
        whole = split_file is not None or (isinstance(source.value, list) and (path.is_file() or source.kind == split))
        samples += read_entries(source, source.entries(split, whole), partial(form.read, reader), skipped if skip_bad else None)
        used.append(form.name)
    if not samples:
        raise ValueError(nothing_left(sources, split, reader.questions, skipped))
    files = tuple(source.path for source in sources)
    return SampleList(samples, dict(skipped), dict(reader.questions.filtered), "+".join(dict.fromkeys(used)), files, note)


def _checked(data, kind: str | None, split: str | None) -> Path:
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}, or None to tell it by the files")
    if split not in ("train", "val", "test", None) and kind != "scienceqa":
        raise ValueError(f'split={split!r}: use "train", "val", "test", or None for everything')
    path = Path(data)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return path


def _named(file: Path, kind: str | None) -> AnnotationFile:
    """A file given instead of a folder. ValueError where it is in no known format, or not in the one asked for."""
    source = AnnotationFile(file)
    found = source.format(INSTRUCTION_FORMATS)
    if found is None or kind not in (None, found.name):
        known = "an unknown format" if found is None else f"format {found.name}"
        wanted = kind or f"a known one ({', '.join(KINDS)})"
        raise ValueError(f"{file}: {known}, not {wanted}: {source.fields}")
    return source


def _qids(file: Path) -> list[str]:
    """Those a split file lists; none where it holds annotations."""
    listed = file.suffix.lower() not in (".json", ".jsonl") or isinstance(read_value(file), list)
    return read_split_file(file)[1] if listed else []


def _picked(file: Path, ids: list[str], data, kind: str | None, options: dict) -> SampleList:
    """The samples of these qids. ValueError where some are unknown, unless bad entries are skipped, or stand in several files."""
    wanted = set(ids)
    try:
        samples = load_instructions(data, kind, "train", **options)  # what a run with a held-out part lists
        whole = wanted <= {sample.qid for sample in samples}
    except ValueError:
        whole = False
    if not whole:
        samples = load_instructions(data, kind, None, **options)
    found = [sample for sample in samples if sample.qid in wanted]
    sources: dict[str, set[Path]] = {}
    for sample in found:
        sources.setdefault(sample.qid, set()).add(sample.source)
    if twice := [qid for qid, files in sources.items() if len(files) > 1]:
        where = ", ".join(sorted(path.name for path in sources[twice[0]]))
        raise ValueError(f"{file}: qid {twice[0]} is ambiguous (in {where}); give the entries themselves as split_file")
    unknown = [qid for qid in ids if qid not in sources]
    if (unknown and not options["skip_bad"]) or not found:
        raise ValueError(f"{file} names {len(unknown)} samples that {data} does not have, such as {unknown[0]!r}")
    skipped = samples.skipped | ({"unknown qid": len(unknown)} if unknown else {})
    return SampleList(found, skipped, samples.filtered, samples.format, samples.files, samples.note)
