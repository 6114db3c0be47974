"""Split resolver: chooses the annotation files of a split, by their names and contents, and tells their format.

`resolve` serves all data sets. A `Naming` describes how a family of data sets names its files. A table of `Format`s describes how entries
are detected and read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fastpeft.data._files import SUFFIXES, BadEntry, listed, read_value, value_of

SPLITS = ("train", "val", "test")
UNNAMED = "unnamed"  # the kind of a file whose name says no split
NOT_TEST = "not test"  # the split of entries without a mark, where others are marked as test entries
_SYNONYMS = {"restval": "train", "valid": "val", "validate": "val", "validation": "val"}
_ONLY = "no test file: {name} is used, the only one; a model trained on it is tested on what it has seen"


@dataclass(frozen=True)
class Format:
    """A published format of annotations.

    detect: whether an entry with these fields is in it. read: (reader, source, index, entry) to the entry's samples, with the options that
    the reader holds; `BadEntry` where it is bad.
    """

    name: str
    detect: Callable[[set], bool]
    read: Callable[[Any, AnnotationFile, int, dict], Iterable]


class Entry(NamedTuple):
    """An entry, its index in its list, and what its file says of its split: None where nothing."""

    split: str | None
    index: int
    content: Any


class AnnotationFile:
    """An annotation file, read when its content is first asked for. `kind`: the split that its name says, or a `Naming`'s other kinds."""

    def __init__(self, path: Path, kind: str = UNNAMED, read: Callable[[Path], Any] = read_value):
        self.path, self.kind, self._read = path, kind, read

    @cached_property
    def value(self) -> Any:
        """What the file holds. ValueError where it is no JSON."""
        return self._read(self.path)

    @cached_property
    def all_entries(self) -> list[Entry]:
        """Every entry, COCO's two lists joined; none where the file holds no list."""
        if isinstance(self.value, list):
            return list(_listed(self.value))
        if not isinstance(self.value, dict):
            return []
        if isinstance(self.value.get("images"), list):
            joined = _annotations if isinstance(self.value.get("annotations"), list) else _sentences
            return list(joined(self.value))
        if self.summaries:
            return [Entry(None, *numbered) for numbered in enumerate(self.value["annotations"])]
        lists = [(name, entries) for name, entries in self.value.items() if isinstance(entries, list)]
        return [Entry(_synonym(name), *numbered) for name, entries in lists for numbered in enumerate(entries)]

    def format(self, formats: Sequence[Format]) -> Format | None:
        """Its format: the first entry that shows one speaks for the file."""
        by_split = isinstance(self.value, dict) and not isinstance(self.value.get("images"), list) and not self.summaries
        shown = (entry.content for entry in self.all_entries if not by_split or entry.split in SPLITS)
        fields = (set(content) for content in shown if isinstance(content, dict))
        return next((form for names in fields for form in formats if form.detect(names)), None)

    def entries(self, split: str | None, whole: bool = False) -> list[tuple[int, Any]]:
        """(index, entry) of a split's entries; with `whole`, all of them where it has none of that split."""
        found = [entry for entry in self.all_entries if _serves(entry.split, split)]
        return [(entry.index, entry.content) for entry in found or (self.all_entries if whole else ())]

    def holds(self, split: str) -> bool:
        """Whether the content itself, without the file's name, says that there are entries of a split other than for training."""
        return (isinstance(self.value, dict) and not self.summaries) or any(entry.split == split for entry in self.all_entries)

    @property
    def summaries(self) -> bool:
        """Whether it is laid out as XrayGPT's filter_cap.json: one list of annotations, which says nothing of splits."""
        value = self.value
        return isinstance(value, dict) and isinstance(value.get("annotations"), list) and "images" not in value

    @property
    def fields(self) -> str:
        """The fields of its first entry, for messages."""
        shown = self.value if isinstance(self.value, list) else [self.value]
        first = next((content for content in shown if isinstance(content, dict)), None)
        return f"fields {listed(first, 8)}" if first else f"{type(self.value).__name__} without fields"


def _synonym(split: Any) -> str:
    return _SYNONYMS.get(str(split), str(split))


def _serves(said: str | None, split: str | None) -> bool:
    """Whether an entry of which its file says ``said`` is read for a split."""
    return split is None or said is None or (said == NOT_TEST and split != "test") or said == split


def _listed(entries: list) -> Iterator[Entry]:
    """Entries of a list. VQA-RAD marks its test entries by their phrase_type."""
    marks = [isinstance(e, dict) and str(e.get("phrase_type", "")).strip().lower().startswith("test_") for e in entries]
    some = any(marks)
    for index, (entry, mark) in enumerate(zip(entries, marks)):
        yield Entry(("test" if mark else NOT_TEST) if some else None, index, entry)


def _annotations(value: dict) -> Iterator[Entry]:
    """Captions of COCO's own files, which list images and captions apart."""
    images = [image for image in value["images"] if isinstance(image, dict)]
    file_names = {str(image["id"]): value_of(image, "file_name") for image in images if value_of(image, "id") is not None}
    for index, entry in enumerate(value["annotations"]):
        joined = {**entry, "image": file_names.get(str(value_of(entry, "image_id")))} if isinstance(entry, dict) else entry
        yield Entry(None, index, joined)


def _sentences(value: dict) -> Iterator[Entry]:
    """Captions of Karpathy's file of COCO, where each image holds its own and says its split."""
    for index, image in enumerate(value["images"]):
        if not isinstance(image, dict):
            yield Entry(None, index, image)
            continue
        name = "/".join(str(piece) for piece in (value_of(image, "filepath"), value_of(image, "filename")) if piece)
        sentences = image.get("sentences")
        for sentence in sentences if isinstance(sentences, list) and sentences else [{}]:
            found = sentence if isinstance(sentence, dict) else {}
            caption = {"caption": found.get("raw"), "id": found.get("sentid")} if "sentences" in image else {}
            yield Entry(_synonym(image.get("split")), index, {"image": name or None, **caption})


class Naming:
    """How a family of data sets names its annotation files.

    order: for each split (None: everything) groups of kinds of file; the first group of which there are files serves the split.
    """

    order: ClassVar[dict[str | None, tuple[tuple[str, ...], ...]]]
    several: ClassVar[str]  # the message where several files serve a split

    def sources(self, folder: Path) -> list[AnnotationFile]:
        """The files that may serve, in the order in which they are read."""
        raise NotImplementedError(f"{type(self).__name__} must say which files may serve")

    def usable(self, sources: list[AnnotationFile], split: str | None) -> list[AnnotationFile]:
        """Those whose content serves the split. The names of `sources` say this split, or none."""
        return sources

    def only(self, named: list[AnnotationFile], sources: list[AnnotationFile]) -> list[AnnotationFile]:
        """Files that may stand in where no file serves the test split; they do if there is exactly one."""
        return sources

    def preferred(self, sources: list[AnnotationFile]) -> list[AnnotationFile]:
        """Those of several files that go before the others."""
        return sources

    def none_found(self, folder: Path, split: str | None, named: list[AnnotationFile], sources: list[AnnotationFile]) -> str:
        """The message where no file serves a split."""
        raise NotImplementedError(f"{type(self).__name__} must say what is missing where no file serves a split")


def resolve(folder: Path, split: str | None, naming: Naming) -> tuple[list[AnnotationFile], str]:
    """(the annotation files of a split, one of them unless `split` is None; a note where they aren't the obvious ones, else "").

    Files named for the split go first; then those that say by their kind or content that they hold it. For "test" then the validation
    file, where the naming has it so, or the only file there is. ValueError where no file serves the split, or several do.
    """
    sources = naming.sources(folder)
    groups = ([source for source in sources if source.kind in kinds] for kinds in naming.order[split])
    named = next(filter(None, groups), [])
    chosen = naming.usable(named, split)
    if not chosen:
        if split == "test" and len(only := naming.only(named, sources)) == 1:
            return only, "" if only[0].holds("test") else _ONLY.format(name=only[0].path.name)
        raise ValueError(naming.none_found(folder, split, named, sources))
    if split is None:
        return chosen, ""
    if len(chosen := naming.preferred(chosen)) > 1:
        raise ValueError(f"{folder}: {naming.several.format(split=split, names=names(chosen))}")
    return chosen, f"no test file: {chosen[0].path.name} is used" if split == "test" and chosen[0].kind == "val" else ""


def names(sources: Iterable[AnnotationFile]) -> str:
    return ", ".join(source.path.name for source in sources)


def read_entries(source: AnnotationFile, entries: Iterable[tuple[int, Any]], read: Callable, skipped: Counter | None) -> Iterator:
    """The samples of entries. A bad one is counted in `skipped`, by its reason; where that is None, ValueError naming file and entry."""
    for index, entry in entries:
        try:
            if not isinstance(entry, dict):
                raise BadEntry("not an object", f"expected an object with fields, not {type(entry).__name__}")
            yield from list(read(source, index, entry))
        except BadEntry as bad:
            if skipped is None:
                raise ValueError(f"{source.path}: entry {index}: {bad}") from None
            skipped[bad.reason] += 1


def nothing_left(sources: Sequence[AnnotationFile], split: str | None, reader, skipped: Counter) -> str:
    """The message for files of which no sample is left. reader: counts entries in languages not `asked_for` in `filtered`."""
    left_out = [f"{n} in language {name!r}, of languages={reader.asked_for!r}" for name, n in reader.filtered.items()]
    left_out += [f"{n} skipped for {reason}" for reason, n in skipped.items()]
    what = f"no {split} samples left" if split else "no samples left"
    return f"{', '.join(str(source.path) for source in sources)}: {what}" + (f" ({'; '.join(left_out)})" if left_out else "")


# --- names of question answering data ---------------------------------------------------------------------------------

_LAST_WORDS = {  # the last word or words of a file's name, without its suffix, in lower case
    "train": ("train", "trainset", "training"),
    "val": ("val", "valid", "validate", "validation", "valset"),
    "test": ("test", "testset", "testing"),
    "marked": ("dataset public", "rad dataset"),
    "instructions": ("instruction data",),
}
_LOOKED_FOR = (
    "train.json, validate.json, test.json (Slake), trainset.json, testset.json, VQA_RAD Dataset Public.json (VQA-RAD), "
    "instruction_data.json (MILE), or names that end so, such as slake_train.jsonl"
)


class QuestionNaming(Naming):
    """Slake, VQA-RAD and MILE: the last words of a name say what a file holds; a file with any other name is none of the data set's."""

    several = "several {split} files ({names}); name the one to use as split_file"
    order: ClassVar = {
        "train": (("train",), ("marked",), ("instructions",)),
        "val": (("val",),),
        "test": (("test",), ("marked",), ("val",)),
        None: (SPLITS, ("marked",), ("instructions",)),
    }

    def __init__(self, read: Callable[[Path], Any]):
        self.read = read

    def sources(self, folder: Path) -> list[AnnotationFile]:
        files = [(kind, file) for file in sorted(folder.iterdir()) if (kind := _kind(file)) and file.is_file()]
        if not files:
            raise ValueError(_no_annotations(folder))
        return [AnnotationFile(file, kind, self.read) for name in _LAST_WORDS for kind, file in files if kind == name]

    def preferred(self, sources: list[AnnotationFile]) -> list[AnnotationFile]:
        return [source for source in sources if " " not in _words(source.path)] or sources  # train.json goes before slake_train.json

    def none_found(self, folder: Path, split: str | None, named: list[AnnotationFile], sources: list[AnnotationFile]) -> str:
        seen = names(sorted(sources, key=lambda source: source.path))
        return f"{folder}: no {split} file among {seen}; name the file to use as split_file"


def _words(file: Path) -> str:
    return re.sub(r"[\s_.-]+", " ", file.stem).lower().strip()


def _kind(file: Path) -> str | None:
    words = _words(file)
    if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):  # macOS archives carry a ._train.json
        return None
    return next((kind for kind, ends in _LAST_WORDS.items() if any(words == e or words.endswith(f" {e}") for e in ends)), None)


def _no_annotations(folder: Path) -> str:
    message = f"{folder}: no annotation file found; looked for {_LOOKED_FOR}"
    for inner in sorted(d for d in folder.iterdir() if d.is_dir()):
        if any(_kind(file) for file in inner.iterdir()):
            return f"{message}; did you mean {inner}?"
    other = next((f.name for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES), None)
    return f"{message}; to use {other}, name it as split_file" if other else message


# --- names of instruction data ----------------------------------------------------------------------------------------

_SPLIT_WORD = re.compile(r"(?:^|[\W_])(train|val|valid|validate|validation|test)(?:set)?(?:\d{4})?(?=$|[\W_])", re.IGNORECASE)


class InstructionNaming(Naming):
    """Any JSON file, in the folder or its annotations/, in one of `formats`. The last word for a split anywhere in its name counts; a file
    whose name and content say nothing of splits is for training. `kind`: the only format that is looked for; `known`: all there are."""

    several = "several files for {split} ({names}); give the one to use instead of the folder"
    order: ClassVar = {split: ((split,), (UNNAMED,)) for split in SPLITS} | {None: ((*SPLITS, UNNAMED),)}

    def __init__(self, formats: Sequence[Format], kind: str | None, known: Sequence[str]):
        self.formats, self.kind, self.known = formats, kind, known

    def sources(self, folder: Path) -> list[AnnotationFile]:
        places = [place for place in (folder, folder / "annotations") if place.is_dir()]
        files = [f for place in places for f in sorted(place.iterdir()) if f.suffix.lower() in (".json", ".jsonl") and f.name[0] != "."]
        files = [f for f in files if f.name.startswith("captions")] or files  # COCO's others are large, and not captions
        return [AnnotationFile(file, split_in_name(file)) for file in files]

    def _readable(self, sources: list[AnnotationFile]) -> list[AnnotationFile]:
        found = [(source, source.format(self.formats)) for source in sources]
        return [source for source, form in found if form is not None and self.kind in (None, form.name)]

    def usable(self, sources: list[AnnotationFile], split: str | None) -> list[AnnotationFile]:
        return [source for source in self._readable(sources) if split in ("train", None) or source.kind != UNNAMED or source.holds(split)]

    def only(self, named: list[AnnotationFile], sources: list[AnnotationFile]) -> list[AnnotationFile]:
        """Of question answering data alone, as by their own names, and XrayGPT's summaries, which have none for splits."""
        rest = self._readable(named) or [source for source in sources if source not in named]
        if rest and all(source.summaries for source in rest):
            return rest
        forms = [source.format(self.formats) for source in rest]
        return rest if self.kind in (None, "vqa") and all(form is not None and form.name == "vqa" for form in forms) else []

    def none_found(self, folder: Path, split: str | None, named: list[AnnotationFile], sources: list[AnnotationFile]) -> str:
        if split is not None and (others := self._readable(named) or [source for source in sources if source not in named]):
            seen = f"{names(others)} is for another split, or says nothing of splits"
            return f"{folder}: no {split} annotations: {seen}; name the file to use as split_file"
        seen = "; ".join(f"{source.path.name}: {source.fields}" for source in named) or "no JSON files"
        what = f"{split} annotations" if split else "annotations"
        return f"{folder}: no {what} in the format {self.kind or ', '.join(self.known)} ({seen})"


def split_in_name(file: Path) -> str:
    words = _SPLIT_WORD.findall(file.stem)
    return _synonym(words[-1].lower()) if words else UNNAMED
