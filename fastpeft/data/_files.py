"""Files of a data set: which annotation file serves a split, how it is parsed, and where an entry's image lies. Used by `formats`."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

_SUFFIXES = (".json", ".jsonl", ".jsol", ".ndjson")
_KINDS = {  # the last word(s) of a file's name, without its suffix, in lower case
    "train": ("train", "trainset", "training"),
    "val": ("val", "valid", "validate", "validation", "valset"),
    "test": ("test", "testset", "testing"),
    "both": ("dataset public", "rad dataset"),
    "instructions": ("instruction data",),
}
_LOOKED_FOR = "train.json, validate.json, test.json (Slake), trainset.json, testset.json, VQA_RAD Dataset Public.json (VQA-RAD), *instruction_data.json (MILE)"
_IMAGE_FOLDERS = ("imgs", "images", "image", "img", "vqa_rad image folder", "vqa_rad images")


class Refused(ValueError):
    """An entry that can't be used: `reason` is what `skip_bad` counts it under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def _kind(file: Path) -> str | None:
    words = re.sub(r"[\s_.-]+", " ", file.stem).lower().strip()
    for kind, endings in _KINDS.items():
        if any(words == e or words.endswith(" " + e) for e in endings):
            return kind
    return None


def choose_files(folder: Path, split: str | None) -> tuple[list[Path], str]:
    """(annotation files, note) of a split of a folder; the note says so where a split's own file was absent. ValueError where none serves."""
    found: dict[str, list[Path]] = {}
    others = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _SUFFIXES and file.is_file():
            kind = _kind(file)
            found.setdefault(kind, []).append(file) if kind else others.append(file.name)
    if not found:
        raise ValueError(_none_found(folder, others))
    if split is None:
        named = [file for kind in ("train", "val", "test") for file in found.get(kind, ())]
        return named or found.get("both") or found["instructions"], ""
    order = {"train": ("train", "both", "instructions"), "val": ("val",), "test": ("test", "both", "val")}[split]
    for kind in order:
        if kind in found:
            file = _only(folder, found[kind], split)
            return [file], f"no test file: {file.name} is used" if split == "test" and kind == "val" else ""
    names = sorted(f.name for files in found.values() for f in files)
    if split == "test" and len(names) == 1:
        return [next(iter(found.values()))[0]], f"no test file: {names[0]} is used, which may be what was trained on"
    raise ValueError(f"{folder}: no {split} file among {', '.join(names)}; name the file to use as split_file")


def _only(folder: Path, files: list[Path], split: str) -> Path:
    plain = [f for f in files if " " not in re.sub(r"[\s_.-]+", " ", f.stem).strip()]  # train.json before slake_train.json
    files = plain or files
    if len(files) > 1:
        raise ValueError(f"{folder}: several {split} files ({', '.join(f.name for f in files)}); name the one to use as split_file")
    return files[0]


def _none_found(folder: Path, others: list[str]) -> str:
    message = f"{folder}: no annotation file found; looked for {_LOOKED_FOR}"
    inner = sorted(d.name for d in folder.iterdir() if d.is_dir() and any(_kind(f) for s in _SUFFIXES for f in d.glob(f"*{s}")))
    if inner:
        return f"{message}; did you mean {folder / inner[0]}?"
    return f"{message}; to use {others[0]}, name it as split_file" if others else message


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


def read_json(file: Path) -> list:
    """The entries of a JSON list or of JSON lines, not empty. ValueError with line and column where it doesn't parse."""
    text = _read_text(file)
    try:
        value = json.loads(text)
        if not isinstance(value, list) and file.suffix.lower() != ".json":
            value = [value]  # JSON lines of one line
    except (json.JSONDecodeError, RecursionError) as error:
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        by_line = file.suffix.lower() in (".jsonl", ".ndjson") or (len(lines) > 1 and _parses(lines[0][1]))
        if not by_line:
            raise ValueError(f"{file}: not valid JSON: {_where(error)}") from None
        value = [_parse_line(file, number, line) for number, line in lines]
    if not isinstance(value, list):
        raise ValueError(f"{file}: expected a JSON list of entries, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{file}: holds no entries")
    return value


def _where(error) -> str:
    return f"line {error.lineno}, column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _parses(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _parse_line(file: Path, number: int, line: str):
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"line {number}, column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f"line {number}: nested too deeply"
        raise ValueError(f"{file}: not valid JSON: {where}") from None


def is_entry_list(file: Path) -> bool:
    """True for annotation files; False for lists of qids (a JSON list of text and numbers, or anything that isn't JSON by its name)."""
    if file.suffix.lower() not in _SUFFIXES:
        return _read_text(file).lstrip().startswith(("[", "{"))
    return not all(isinstance(e, (str, int)) for e in read_json(file))


def read_ids(file: Path) -> dict[str, None]:
    """The qids of a split file, in order, each once."""
    if file.suffix.lower() in _SUFFIXES:
        ids = [str(e).strip() for e in read_json(file)]
    else:
        ids = [line.strip() for line in _read_text(file).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not ids:
        raise ValueError(f"{file}: holds no qids")
    return dict.fromkeys(ids)


class ImageFinder:
    """Paths of images by the names entries give them, never outside the data folder.

    Tried in order: the name in the folder and in its image folders, then the name without its first component ("vqa-rad/x.jpg") in the same
    places, then that in the image folders of the sub-folder called so.
    """

    def __init__(self, folder: Path):
        self.root = folder.resolve()
        self._known: dict[str, Path] = {}
        self._folders = {self.root: self._image_folders(self.root)}

    @staticmethod
    def _image_folders(folder: Path) -> list[Path]:
        if not folder.is_dir():
            return []
        named = {d.name.lower(): d for d in sorted(folder.iterdir()) if d.is_dir()}
        return [folder, *(named[name] for name in _IMAGE_FOLDERS if name in named)]

    def __call__(self, name: str) -> Path:
        """The absolute path of an image. `Refused` where it is absent or outside."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> Path:
        if "\0" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or PureWindowsPath(name).root:
            raise Refused("unsafe image path", f"image path {name!r} is refused: give it relative to the data folder")
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or not parts:
            raise Refused("unsafe image path", f"image path {name!r} is refused: it may not leave the data folder through '..'")
        places = [base.joinpath(*parts) for base in self._folders[self.root]]
        if len(parts) > 1:
            inner = self.root / parts[0]
            if inner not in self._folders:
                self._folders[inner] = self._image_folders(inner)
            places += [base.joinpath(*parts[1:]) for base in self._folders[self.root] + self._folders[inner][1:]]
        for place in places:
            if not place.is_file():
                continue
            path = place.resolve()
            if not path.is_relative_to(self.root):
                raise Refused("unsafe image path", f"image path {name!r} is refused: it leaves the data folder through a symbolic link")
            return path
        looked = ", ".join(dict.fromkeys(str(p.parent.relative_to(self.root)) for p in places))
        raise Refused("missing image", f"image {name!r} not found in {self.root} (looked in {looked})")
