"""Files of a data set: parsing annotations, checking fields and image marks, finding images by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from fastpeft.documents import parse_json

SUFFIXES = (".json", ".jsonl", ".jsol", ".ndjson")
_IMAGE_FOLDERS = ("imgs", "images", "image", "img", "vqa_rad image folder", "vqa_rad images")


class BadEntry(ValueError):
    """An entry that can't be used. `skip_bad` counts it under `reason`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def listed(names: Iterable, most: int = 20) -> str:
    """Names from a file, in a message of one line."""
    short = [" ".join(str(name).split())[:60] or repr(name) for name in names]
    return ", ".join(short[:most]) + (", ..." if len(short) > most else "")


def value_of(entry: dict, name: str):
    """A field's value; None also for NaN, which an empty cell of a table turns into."""
    value = entry.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


IMAGE_MARK = "<image>"  # LLaVA's, for an image's place in a question


def without_image_mark(texts: Sequence[str], has_image: bool, *others: str) -> list[str]:
    """The questions of a sample without "<image>": where an image stands is the prompt template's to say (see `place_of_image_mark`).

    `BadEntry` where the mark is in a text without an image, in a later question, there more than once, or in one of `others` (answers).
    """
    marks = [text.count(IMAGE_MARK) for text in texts]
    if not has_image and (any(marks) or any(IMAGE_MARK in text for text in others)):
        raise BadEntry("stray <image>", f"{IMAGE_MARK} stands in a text without an image")
    if any(IMAGE_MARK in text for text in others):
        raise BadEntry("stray <image>", f"{IMAGE_MARK} stands in an answer")
    if sum(marks) > 1 or any(marks[1:]):
        where = f"{sum(marks)} times" if sum(marks) > 1 else "in a later question"
        raise BadEntry("stray <image>", f"{IMAGE_MARK} stands {where}: one image is read, before the first question")
    return [text.replace(IMAGE_MARK, "").strip() if n else text for text, n in zip(texts, marks)]


def place_of_image_mark(text: str) -> int | None:
    """Where "<image>" stands in a question that :func:`without_image_mark` takes it out of; None where there is none."""
    before, mark, after = text.partition(IMAGE_MARK)
    if not mark:
        return None
    return len((before + after).strip()) if not after.strip() else len(before.lstrip()) if before.strip() else 0


def find_split_file(folder: Path, split_file) -> Path:
    """`split_file` as it stands, else relative to the folder. ValueError where neither exists."""
    for path in (Path(split_file), folder / split_file):
        if path.is_file():
            return path
    raise ValueError(f"{split_file}: no such split file, neither from the working directory nor in {folder}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


def _parse(file: Path, text: str, first_line: int = 1):
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        where = f"line {first_line - 1 + error.lineno}, column {error.colno}"
        raise ValueError(f"{file}: not valid JSON: {where}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file}: not valid JSON: nested too deeply") from None


def read_value(file: Path):
    """What a JSON file holds; of JSON lines, a list. ValueError with line and column where it doesn't parse."""
    text = _read_text(file)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    if len(lines) > 1 and first.startswith("{") and first.endswith("}"):  # a whole object on the first line of several
        return [_parse(file, line, number) for number, line in lines]
    return _parse(file, text)


def read_json(file: Path) -> list:
    """The entries of a JSON list or of JSON lines, at least one. ValueError with line and column where it doesn't parse."""
    value = read_value(file)
    if isinstance(value, dict) and _read_text(file).strip().count("\n") == 0:  # a single line: a file of one entry
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{file}: expected a JSON list of entries, or one JSON object on each line, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{file}: holds no entries")
    return value


def read_split_file(file: Path) -> tuple[list, list[str]]:
    """(entries, qids) of a split file, one of them empty: annotations, or a JSON list or a text file of qids, each taken once."""
    entries: list = []
    if file.suffix.lower() in SUFFIXES or _read_text(file).lstrip().startswith(("[", "{")):
        entries = read_json(file)
        if not all(isinstance(entry, (str, int)) for entry in entries):
            return entries, []
    lines = entries or [line for line in _read_text(file).splitlines() if not line.lstrip().startswith("#")]
    ids = [str(line).strip() for line in lines if str(line).strip()]
    if not ids:
        raise ValueError(f"{file}: holds no qids")
    return [], list(dict.fromkeys(ids))


class ImageFinder:
    """Paths of images by the names entries give them, never outside the data folder; with `check`, each decoded once.

    An image folder may itself be a link, as on clusters: whoever made the data folder chose where it leads, and no entry can.

    Looked for in the folder and in its image folders (imgs, images, image, "VQA_RAD Image Folder"). Then, as in MILE's
    "slake/..." and "vqa-rad/...", the name's first component is taken for a data set's: its own image folders if there is
    one, else left out.
    """

    def __init__(self, folder: Path, check: bool = False):
        self.root, self.check = folder.resolve(), check
        self._known: dict[str, Path] = {}
        self._faults: dict[Path, str] = {}
        self._bases: dict[Path, list[Path]] = {}

    def _folders(self, folder: Path) -> list[Path]:
        if folder not in self._bases:
            named = {d.name.lower(): d for d in sorted(folder.iterdir()) if d.is_dir()}
            self._bases[folder] = [folder, *(named[name] for name in _IMAGE_FOLDERS if name in named)]
        return self._bases[folder]

    def _allowed(self) -> list[Path]:
        """Where images may lie: the data folder, and what its own image folders are links to."""
        return [self.root, *(folder.resolve() for folder in self._folders(self.root)[1:] if folder.is_symlink())]

    def __call__(self, name: str) -> Path:
        """The absolute path of an image. `BadEntry` where it is absent or outside, or, with `check`, damaged."""
        if name not in self._known:
            self._known[name] = self._find(name)
        path = self._known[name]
        if self.check and path not in self._faults:
            from fastpeft.data.images import load_image  # where asked for: reading annotations needs neither Pillow nor torch

            self._faults[path] = ""
            try:
                load_image(path)
            except ValueError as error:
                self._faults[path] = str(error)
        if self._faults.get(path):
            raise BadEntry("corrupt image", self._faults[path])
        return path

    def _find(self, name: str) -> Path:
        refused = f"image path {name!r} is refused: "
        if "\0" in name or name.startswith("/") or PureWindowsPath(name).drive or PureWindowsPath(name).root:
            raise BadEntry("unsafe image path", refused + "give it relative to the data folder")
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or not parts:
            raise BadEntry("unsafe image path", refused + "it may not leave the data folder through '..'")
        places = [base.joinpath(*parts) for base in self._folders(self.root)]
        if len(parts) > 1:
            own = [base / parts[0] for base in self._folders(self.root) if (base / parts[0]).is_dir()]
            bases = [folder for base in own for folder in self._folders(base)] or self._folders(self.root)
            places += [base.joinpath(*parts[1:]) for base in bases]
        for place in places:
            if not os.path.isfile(place):  # False, not an error, for names too long
                continue
            path = place.resolve()
            if not any(path.is_relative_to(base) for base in self._allowed()):
                raise BadEntry("unsafe image path", refused + "it leaves the data folder through a symbolic link: copy it in (cp -L)")
            return path
        looked = ", ".join(dict.fromkeys(str(place.parent.relative_to(self.root)) for place in places))
        raise BadEntry("missing image", f"image {name!r} not found in {self.root} (looked in {looked})")
