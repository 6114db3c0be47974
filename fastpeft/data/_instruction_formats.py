"""Entries of instruction data as published, to `Instruction`s. Each format: how it is known, its entries, and one entry's reading.

- alpaca: [{"instruction", "input", "output"}].
- llava: [{"id", "image" (absent: text only), "conversations": [{"from": "human" | "gpt", "value"}]}], "<image>" in the first value.
- coco: COCO's captions_*.json ({"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}); Karpathy's
  dataset_coco.json ({"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}); or [{"image", "caption"}].
- reports (OpenI, MIMIC): [{"image" (one or several), "report"}], or such lists by split ({"train": [{"image_path", "report"}]}).
- vqa: the question answering formats of `load_samples`, each question an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from fastpeft.data._files import Refused

KINDS = ("alpaca", "llava", "coco", "reports", "scienceqa", "vqa")
_IMAGE_FIELDS = ("image", "image_path", "img_path", "image_name", "img_name", "file_name", "filename")
_SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val", "test": "test"}
_ASKED = {  # where the data hold responses without questions
    "coco": "Generate a caption that details what happened in the image.",  # paper 003, table 2
    "reports": "Describe the given chest x-ray image in detail.",  # paper 001, section 4
}


def kind_of(value) -> str | None:
    """The format of a JSON file's content, None for an unknown one."""
    if isinstance(value, dict):
        images, annotations = value.get("images"), value.get("annotations")
        if isinstance(images, list):
            captions = _has(annotations, "caption") if isinstance(annotations, list) else _has(images, "sentences")
            return "coco" if captions else None
        pages = [page for name, page in value.items() if name in _SPLITS and isinstance(page, list)]
        return kind_of(pages[0]) if pages else None
    if not isinstance(value, list):
        return None
    fields = next((set(entry) for entry in value if isinstance(entry, dict)), set())
    if "conversations" in fields:
        return "llava"
    if {"instruction", "output"} <= fields:
        return "alpaca"
    if fields & {"image_name", "img_name"} and fields & {"question", "question_pool"}:
        return "vqa"
    if fields & set(_IMAGE_FIELDS):
        return "reports" if "report" in fields else "coco" if "caption" in fields else None
    return None


def _has(entries: list, name: str) -> bool:
    return bool(entries) and isinstance(entries[0], dict) and name in entries[0]


def entries_of(value, split: str | None, folder_name: str) -> Iterator[tuple[int, object]]:
    """(index in its list, entry) of the entries of a split, with COCO's two lists joined; `folder_name`: where its images lie."""
    if isinstance(value, list):
        yield from enumerate(value)
    elif "annotations" in value:
        names = {image.get("id"): image.get("file_name") for image in value["images"] if isinstance(image, dict)}
        for index, entry in enumerate(value["annotations"]):
            if isinstance(entry, dict):
                name = names.get(entry.get("image_id"))
                entry = {**entry, "image": f"{folder_name}/{name}" if name and folder_name else name}
            yield index, entry
    elif "images" in value:
        for index, image in enumerate(value["images"]):
            if not isinstance(image, dict):
                yield index, image
            elif split is None or _SPLITS.get(image.get("split"), image.get("split")) == split:
                name = "/".join(str(image[field]) for field in ("filepath", "filename") if image.get(field))
                for sentence in image.get("sentences") or [{}]:
                    yield index, {"image": name, "caption": sentence.get("raw"), "id": sentence.get("sentid")}
    else:
        for name, page in value.items():
            if isinstance(page, list) and (split is None or _SPLITS.get(name, name) == split):
                yield from enumerate(page)


def text_of(entry: dict, name: str, empty: bool = False) -> str:
    """A field's text as it stands, line breaks and all; numbers as written."""
    value = entry.get(name)
    if value is None and not empty:
        raise Refused(f"missing {name}", f"no field {name!r} (it has {', '.join(map(str, entry)) or 'none'})")
    if isinstance(value, float) and math.isnan(value):
        value = None
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise Refused(f"bad {name}", f"{name} must be text, not {type(value).__name__}")
    text = "" if value is None else str(value)
    if not empty and not text.strip():
        raise Refused(f"empty {name}", f"{name} is empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused(f"bad {name}", f"{name} holds half a surrogate pair, which is no character")
    return text


class EntryReader:
    """One entry to its instructions: several for a conversation split into turns, or a report on several images."""

    def __init__(self, find_image, instruction: str | None, image_folder: str, split_turns: bool):
        self.find_image, self.instruction, self.image_folder, self.split_turns = find_image, instruction, image_folder, split_turns

    def __call__(self, kind: str, entry) -> Iterator[dict]:
        """Fields of `Instruction`; `Refused` where the entry is bad."""
        if not isinstance(entry, dict):
            raise Refused("not an object", f"expected an object with fields, not {type(entry).__name__}")
        yield from getattr(self, f"_{kind}")(entry)

    def _image(self, name) -> dict:
        if not isinstance(name, str) or not name.strip():
            raise Refused("bad image", f"the image must be a file's name, not {name!r}")
        name = name.strip()
        return {"image": self.find_image(f"{self.image_folder}/{name}" if self.image_folder else name), "image_name": name}

    def _alpaca(self, entry: dict) -> Iterator[dict]:
        asked, answer = text_of(entry, "instruction"), text_of(entry, "output", empty=True)  # an empty one: end at once
        context = text_of(entry, "input", empty=True)
        yield {"turns": ((asked, answer),), "image": None, "context": context if context.strip() else ""}

    def _llava(self, entry: dict) -> Iterator[dict]:
        turns = _conversation(entry.get("conversations"))
        image = {"image": None} if entry.get("image") in (None, "") else self._image(entry["image"])
        for part in ((turn,) for turn in turns) if self.split_turns else (turns,):
            yield {"turns": part, **image}

    def _of_images(self, kind: str, entry: dict, answer: str) -> Iterator[dict]:
        name = next((field for field in _IMAGE_FIELDS if entry.get(field) is not None), None)
        if name is None:
            raise Refused("missing image", f"no image (none of {', '.join(_IMAGE_FIELDS)}; or an image_id without its image)")
        names = entry[name] if isinstance(entry[name], list) else [entry[name]]
        if not names:
            raise Refused("missing image", f"{name} lists no image")
        for image in names:
            yield {"turns": ((self.instruction or _ASKED[kind], answer),), **self._image(image)}

    def _coco(self, entry: dict) -> Iterator[dict]:
        yield from self._of_images("coco", entry, text_of(entry, "caption").strip())

    def _reports(self, entry: dict) -> Iterator[dict]:
        yield from self._of_images("reports", entry, text_of(entry, "report").strip())


def _conversation(messages) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of LLaVA's messages, "<image>" taken out of the questions."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused("bad conversations", "conversations must be a list of one or more messages with 'from' and 'value'")
    speakers = [message.get("from") for message in messages]
    if len(messages) % 2 or any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers)):
        said = ", ".join(map(str, speakers[:6])) + (", ..." if len(speakers) > 6 else "")
        raise Refused("bad conversations", f"conversations must go human, gpt, human, gpt, ..., not {said}")
    questions = [text_of(message, "value").replace("<image>", "").strip() for message in messages[::2]]
    answers = [text_of(message, "value") for message in messages[1::2]]
    if questions[0] == "" and len(questions) > 1:
        raise Refused("empty value", "the first question holds nothing but <image>")
    return tuple(zip(questions, answers))


def suggested_folder(file: Path) -> str:
    """The folder of a COCO captions file's images: train2014 for captions_train2014.json, else ""."""
    return file.stem.removeprefix("captions_") if file.stem.startswith("captions_") else ""
