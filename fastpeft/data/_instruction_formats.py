"""Entries of instruction data as published, to `Instruction`s. Each format: how it is known, its entries, and one entry's reading.

- alpaca: [{"instruction", "input" (may be absent), "output" ("": to say nothing)}].
- llava: [{"id", "image" (absent: text only), "conversations": [{"from": "human" | "gpt", "value"}]}], "<image>" in the first value,
  at most once and never without an image.
- coco: COCO's captions_*.json ({"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}); Karpathy's
  dataset_coco.json ({"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}); or [{"image", "caption"}].
- reports (OpenI, MIMIC): [{"image" (one or several), "report"}], or such lists by split ({"train": [{"image_path", "report"}]}).
- vqa: the question answering formats of `load_samples`, each question an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from fastpeft.data._files import Refused, field, place_image

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
    kinds = (_kind_by_fields(set(entry)) for entry in value if isinstance(entry, dict))
    return next(filter(None, kinds), None)  # the first entry that shows its kind speaks for the file


def _kind_by_fields(fields: set) -> str | None:
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
    return any(isinstance(entry, dict) and name in entry for entry in entries)


def entries_of(value, split: str | None, folder_name: str) -> Iterator[tuple[int, object]]:
    """(index in its list, entry) of the entries of a split, with COCO's two lists joined; `folder_name`: where its images lie."""
    if isinstance(value, list):
        yield from enumerate(value)
    elif "annotations" in value:
        images = [image for image in value["images"] if isinstance(image, dict)]
        names = {str(image["id"]): field(image, "file_name") for image in images if field(image, "id") is not None}
        for index, entry in enumerate(value["annotations"]):
            if isinstance(entry, dict):
                name = names.get(str(field(entry, "image_id")))
                entry = {**entry, "image": f"{folder_name}/{name}" if isinstance(name, str) and folder_name else name}
            yield index, entry
    elif "images" in value:
        for index, image in enumerate(value["images"]):
            if not isinstance(image, dict):
                yield index, image
            elif split is None or _SPLITS.get(str(image.get("split")), image.get("split")) == split:
                name = "/".join(str(part) for part in (field(image, "filepath"), field(image, "filename")) if part)
                sentences = image.get("sentences")
                for sentence in sentences if isinstance(sentences, list) and sentences else [{}]:
                    said = sentence if isinstance(sentence, dict) else {}
                    yield index, {"image": name or None, "caption": said.get("raw"), "id": said.get("sentid")}
    else:
        for name, page in value.items():
            if isinstance(page, list) and (split is None or _SPLITS.get(name, name) == split):
                yield from enumerate(page)


def text_of(entry: dict, name: str, required: bool = True, empty: bool = False) -> str:
    """A field's text as it stands, line breaks and all; numbers as written. Null and NaN count as missing, which where it isn't `required`
    is "". `empty`: an empty text is one, too."""
    value = field(entry, name)
    if value is None and required:
        has = f"{name} is null or not a number" if name in entry else f"no field {name!r} (it has {', '.join(map(str, entry)) or 'none'})"
        raise Refused(f"missing {name}", has)
    infinite = isinstance(value, float) and math.isinf(value)
    if infinite or isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        what = value if infinite else type(value).__name__
        raise Refused(f"bad {name}", f"{name} must be text, not {what}")
    text = "" if value is None else str(value)
    if required and not empty and not text.strip():
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
        context = text_of(entry, "input", required=False)
        place_image([asked], False, context, answer)
        yield {"turns": ((asked, answer),), "image": None, "context": context if context.strip() else ""}

    def _llava(self, entry: dict) -> Iterator[dict]:
        questions, answers = _conversation(entry.get("conversations"))
        seen = entry.get("image") not in (None, "")
        turns = tuple(zip((text.strip() for text in place_image(questions, seen, *answers)), answers))
        if len(turns) > 1 and not turns[0][0]:
            raise Refused("empty value", "the first question holds nothing but <image>")
        image = self._image(entry["image"]) if seen else {"image": None}
        for part in ((turn,) for turn in turns) if self.split_turns else (turns,):
            yield {"turns": part, **image}

    def _of_images(self, kind: str, entry: dict, answer: str) -> Iterator[dict]:
        name = next((name for name in _IMAGE_FIELDS if field(entry, name) is not None), None)
        if name is None:
            raise Refused("missing image", f"no image (none of {', '.join(_IMAGE_FIELDS)}; or an image_id without its image)")
        names = entry[name] if isinstance(entry[name], list) else [entry[name]]
        if not names:
            raise Refused("missing image", f"{name} lists no image")
        (asked,) = place_image([self.instruction or _ASKED[kind]], True, answer)
        for image in names:
            yield {"turns": ((asked, answer),), **self._image(image)}

    def _coco(self, entry: dict) -> Iterator[dict]:
        yield from self._of_images("coco", entry, text_of(entry, "caption").strip())

    def _reports(self, entry: dict) -> Iterator[dict]:
        yield from self._of_images("reports", entry, text_of(entry, "report").strip())


def _conversation(messages) -> tuple[list[str], list[str]]:
    """(questions, answers) of LLaVA's messages."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused("bad conversations", "conversations must be a list of one or more messages with 'from' and 'value'")
    speakers = [message.get("from") for message in messages]
    if len(messages) % 2 or any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers)):
        said = ", ".join(map(str, speakers[:6])) + (", ..." if len(speakers) > 6 else "")
        raise Refused("bad conversations", f"conversations must go human, gpt, human, gpt, ..., not {said}")
    texts = [text_of(message, "value") for message in messages]
    return texts[::2], texts[1::2]


def suggested_folder(file: Path) -> str:
    """The folder of a COCO captions file's images: train2014 for captions_train2014.json, else ""."""
    return file.stem.removeprefix("captions_") if file.stem.startswith("captions_") else ""
