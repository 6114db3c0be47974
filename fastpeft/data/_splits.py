"""Split resolver: which annotation files of a folder serve a split, by their names and by what they hold, and in which format they are.

One resolver, `resolve`, for all data sets. A `Naming` says how a family of data sets names its files; a table of `Format`s says how a
file's entries are recognised and read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fastpeft.data._files import SUFFIXES, Refused, field, read_value

SPLITS = ("train", "val", "test")
UNNAMED = "unnamed"  # the kind of a file whose name says no split
NOT_TEST = "not test"  # the part of entries that aren't marked, where others are marked as test ones
_SYNONYMS = {"restval": "train", "valid": "val", "validate": "val", "validation": "val"}
_ONLY = "no test file: {name} is used, the only one; a model trained on it is tested on what it has seen"


@dataclass(frozen=True)
class Format:
    """A published format of annotations.

    detect: whether an entry with these fields is in it. read: (reader, page, index, entry) to the entry's samples, with the options that
    the reader holds; `Refused` where it is bad.
    """

    name: str
    detect: Callable[[set], bool]
    read: Callable[[Any, Page, int, dict], Iterable]


class Part(NamedTuple):
    """An entry, its index in its list, and what its file says of its split: None where nothing."""

    split: str | None
    index: int
    entry: Any


class Page:
    """An annotation file, read when its content is first asked for. `kind`: the split that its name says, or a `Naming`'s other kinds."""

    def __init__(self, file: Path, kind: str = UNNAMED, read: Callable[[Path], Any] = read_value):
        self.file, self.kind, self._read = file, kind, read

    @cached_property
    def value(self) -> Any:
        """What the file holds. ValueError where it is no JSON."""
        return self._read(self.file)

    @cached_property
    def parts(self) -> list[Part]:
        """Its entries, COCO's two lists joined; none where it has none."""
        if isinstance(self.value, list):
            return list(_listed(self.value))
        if not isinstance(self.value, dict):
            return []
        if isinstance(self.value.get("images"), list):
            joined = _annotations if isinstance(self.value.get("annotations"), list) else _sentences
            return list(joined(self.value))
        pages = [(name, page) for name, page in self.value.items() if isinstance(page, list)]
        return [Part(_synonym(name), *numbered) for name, page in pages for numbered in enumerate(page)]

    def format(self, formats: Sequence[Format]) -> Format | None:
        """Its format: the first entry that shows one speaks for the file."""
        by_split = isinstance(self.value, dict) and not isinstance(self.value.get("images"), list)
        shown = (part.entry for part in self.parts if not by_split or part.split in SPLITS)
        fields = (set(entry) for entry in shown if isinstance(entry, dict))
        return next((form for names in fields for form in formats if form.detect(names)), None)

    def entries(self, split: str | None, whole: bool = False) -> list[tuple[int, Any]]:
        """(index, entry) of a split's entries; with `whole`, all of them where it has none of that split."""
        found = [part for part in self.parts if _serves(part.split, split)]
        return [(part.index, part.entry) for part in found or (self.parts if whole else ())]

    def holds(self, split: str) -> bool:
        """Whether the content itself, without the file's name, says that there are entries of a split other than for training."""
        return isinstance(self.value, dict) or any(part.split == split for part in self.parts)

    @property
    def fields(self) -> str:
        """What it holds, for messages."""
        value = self.value
        first = (
            value if isinstance(value, dict) else next((e for e in value if isinstance(e, dict)), None) if isinstance(value, list) else None
        )
        return f"fields {', '.join(list(map(str, first))[:8])}" if first else f"{type(value).__name__} without fields"


def _synonym(split: Any) -> str:
    return _SYNONYMS.get(str(split), str(split))


def _serves(part: str | None, split: str | None) -> bool:
    return split is None or part is None or (part == NOT_TEST and split != "test") or part == split


def _listed(entries: list) -> Iterator[Part]:
    """A list of entries. VQA-RAD's marks those for testing by their phrase_type."""
    marks = [isinstance(e, dict) and str(e.get("phrase_type", "")).strip().lower().startswith("test_") for e in entries]
    for index, (entry, mark) in enumerate(zip(entries, marks)):
        yield Part(("test" if mark else NOT_TEST) if any(marks) else None, index, entry)


def _annotations(value: dict) -> Iterator[Part]:
    """COCO's: captions beside the images they are about."""
    images = [image for image in value["images"] if isinstance(image, dict)]
    names = {str(image["id"]): field(image, "file_name") for image in images if field(image, "id") is not None}
    for index, entry in enumerate(value["annotations"]):
        yield Part(None, index, {**entry, "image": names.get(str(field(entry, "image_id")))} if isinstance(entry, dict) else entry)


def _sentences(value: dict) -> Iterator[Part]:
    """Karpathy's split of COCO: images with their captions in them."""
    for index, image in enumerate(value["images"]):
        if not isinstance(image, dict):
            yield Part(None, index, image)
            continue
        name = "/".join(str(part) for part in (field(image, "filepath"), field(image, "filename")) if part)
        sentences = image.get("sentences")
        for sentence in sentences if isinstance(sentences, list) and sentences else [{}]:
            said = sentence if isinstance(sentence, dict) else {}
            caption = {"caption": said.get("raw"), "id": said.get("sentid")} if "sentences" in image else {}
            yield Part(_synonym(image.get("split")), index, {"image": name or None, **caption})


class Naming:
    """How a family of data sets names its annotation files. `order`: for each split, None being everything, the kinds of file that
    serve it together, those of the first group before those of the next."""

    order: dict[str | None, tuple[tuple[str, ...], ...]]

    def pages(self, folder: Path) -> list[Page]:
        """The files that may serve, in the order in which they are read."""
        raise NotImplementedError

    def usable(self, pages: list[Page], split: str | None) -> list[Page]:
        """Those of `pages`, all of them named for the split, or for none, whose content serves it."""
        return pages

    def only(self, named: list[Page], pages: list[Page]) -> list[Page]:
        """What may stand in for a test split that no file serves, if it is a single page."""
        return pages

    def preferred(self, pages: list[Page]) -> list[Page]:
        return pages

    def none_found(self, folder: Path, split: str | None, named: list[Page], pages: list[Page]) -> str:
        raise NotImplementedError

    several: str  # the message where several files serve a split


def resolve(folder: Path, split: str | None, naming: Naming) -> tuple[list[Page], str]:
    """(the annotation files of a split, one of them unless `split` is None; a note where they aren't the obvious ones, else "").

    Files named for the split go first; then those that say by their kind or content that they hold it. For "test" then the validation
    file, where the naming has it so, or the only file there is. ValueError where no file serves the split, or several do.
    """
    pages = naming.pages(folder)
    groups = ([page for page in pages if page.kind in kinds] for kinds in naming.order[split])
    named = next(filter(None, groups), [])
    chosen = naming.usable(named, split)
    if not chosen:
        if split == "test" and len(only := naming.only(named, pages)) == 1:
            return only, "" if only[0].holds("test") else _ONLY.format(name=only[0].file.name)
        raise ValueError(naming.none_found(folder, split, named, pages))
    if split is None:
        return chosen, ""
    if len(chosen := naming.preferred(chosen)) > 1:
        raise ValueError(f"{folder}: {naming.several.format(split=split, names=names(chosen))}")
    return chosen, f"no test file: {chosen[0].file.name} is used" if split == "test" and chosen[0].kind == "val" else ""


def names(pages: Iterable[Page]) -> str:
    return ", ".join(page.file.name for page in pages)


def read_entries(page: Page, entries: Iterable[tuple[int, Any]], read: Callable, skipped: Counter | None) -> Iterator:
    """The samples of entries. A bad one is counted in `skipped`, by its reason; where that is None, ValueError naming file and entry."""
    for index, entry in entries:
        try:
            if not isinstance(entry, dict):
                raise Refused("not an object", f"expected an object with fields, not {type(entry).__name__}")
            yield from list(read(page, index, entry))
        except Refused as bad:
            if skipped is None:
                raise ValueError(f"{page.file}: entry {index}: {bad}") from None
            skipped[bad.reason] += 1


def nothing_left(pages: Sequence[Page], split: str | None, languages, filtered: Counter, skipped: Counter) -> str:
    """The message for files of which no sample is left."""
    left_out = [f"{n} in language {name!r}, of languages={languages!r}" for name, n in filtered.items()]
    left_out += [f"{n} skipped for {reason}" for reason, n in skipped.items()]
    what = f"no {split} samples left" if split else "no samples left"
    return f"{', '.join(str(page.file) for page in pages)}: {what}" + (f" ({'; '.join(left_out)})" if left_out else "")


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
    order = {  # noqa: RUF012
        "train": (("train",), ("marked",), ("instructions",)),
        "val": (("val",),),
        "test": (("test",), ("marked",), ("val",)),
        None: (SPLITS, ("marked",), ("instructions",)),
    }

    def __init__(self, read: Callable[[Path], Any]):
        self.read = read

    def pages(self, folder: Path) -> list[Page]:
        files = [(kind, file) for file in sorted(folder.iterdir()) if (kind := _kind(file)) and file.is_file()]
        if not files:
            raise ValueError(_no_annotations(folder))
        return [Page(file, kind, self.read) for name in _LAST_WORDS for kind, file in files if kind == name]

    def preferred(self, pages: list[Page]) -> list[Page]:
        return [page for page in pages if " " not in _words(page.file)] or pages  # train.json goes before slake_train.json

    def none_found(self, folder: Path, split: str | None, named: list[Page], pages: list[Page]) -> str:
        seen = names(sorted(pages, key=lambda page: page.file))
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
    order = {split: ((split,), (UNNAMED,)) for split in SPLITS} | {None: ((*SPLITS, UNNAMED),)}

    def __init__(self, formats: Sequence[Format], kind: str | None, known: Sequence[str]):
        self.formats, self.kind, self.known = formats, kind, known

    def pages(self, folder: Path) -> list[Page]:
        places = [place for place in (folder, folder / "annotations") if place.is_dir()]
        files = [f for place in places for f in sorted(place.iterdir()) if f.suffix.lower() in (".json", ".jsonl") and f.name[0] != "."]
        files = [f for f in files if f.name.startswith("captions")] or files  # COCO's others are large, and not captions
        return [Page(file, split_in_name(file)) for file in files]

    def _readable(self, pages: list[Page]) -> list[Page]:
        found = [(page, page.format(self.formats)) for page in pages]
        return [page for page, form in found if form is not None and self.kind in (None, form.name)]

    def usable(self, pages: list[Page], split: str | None) -> list[Page]:
        return [page for page in self._readable(pages) if split in ("train", None) or page.kind != UNNAMED or page.holds(split)]

    def only(self, named: list[Page], pages: list[Page]) -> list[Page]:
        """Of question answering data alone, as by their own names."""
        rest = self._readable(named) or [page for page in pages if page not in named]
        forms = [page.format(self.formats) for page in rest]
        return rest if self.kind in (None, "vqa") and all(form is not None and form.name == "vqa" for form in forms) else []

    def none_found(self, folder: Path, split: str | None, named: list[Page], pages: list[Page]) -> str:
        if split is not None and (others := self._readable(named) or [page for page in pages if page not in named]):
            seen = f"{names(others)} is for another split, or says nothing of splits"
            return f"{folder}: no {split} annotations: {seen}; name the file to use as split_file"
        seen = "; ".join(f"{page.file.name}: {page.fields}" for page in named) or "no JSON files"
        what = f"{split} annotations" if split else "annotations"
        return f"{folder}: no {what} in the format {self.kind or ', '.join(self.known)} ({seen})"


def split_in_name(file: Path) -> str:
    words = _SPLIT_WORD.findall(file.stem)
    return _synonym(words[-1].lower()) if words else UNNAMED
