"""Formats of instruction data as published: how to detect each, and how to read an entry.

- alpaca: [{"instruction", "input" (may be absent), "output" ("": to say nothing)}].
- llava: [{"id", "image" (absent: text only), "conversations": [{"from": "human" | "gpt", "value"}]}], "<image>" in the first value,
  at most once and never without an image. LLaVA-Med's question answering files also say answer_type (OPEN, CLOSED).
- coco: COCO's captions_*.json ({"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}); Karpathy's
  dataset_coco.json ({"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}); or [{"image", "caption"}].
- reports (OpenI, MIMIC): [{"image" (one or several), "report"}], or such lists by split ({"train": [{"image_path", "report"}]}); or
  XrayGPT's summaries, filter_cap.json ({"annotations": [{"image_id", "caption"}]}) beside image/ID.png or .jpg. Each image of a report is
  asked about by itself: a study of two views counts twice. In training the words are drawn from XrayGPT's pool, where `instruction` does
  not say others; what is asked at the end is the first of them.
- vqa: the question answering formats of `load_samples`, each question an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastpeft.data._files import BadEntry, ImageFinder, listed, place_of_image_mark, value_of, without_image_mark
from fastpeft.data._splits import AnnotationFile, Format
from fastpeft.data.formats import QuestionReader, format_of
from fastpeft.data.samples import Instruction, Sample

TURNS = ("dialogue", "each", "first")
KINDS = ("alpaca", "llava", "coco", "reports", "scienceqa", "vqa")
_MISSPELT = "conversatons"  # in some of LLaVA-Med's question answering files, whose code reads either
_IMAGE_FIELDS = ("image", "image_path", "img_path", "image_name", "img_name", "file_name", "filename")
_ASKED = {  # where the data hold responses without questions
    # paper 003, table 2
    "coco": "Please answer me based on this image. Generate a caption that details what happened in the image.",
    "reports": "Describe the given chest x-ray image in detail.",  # paper 001, section 4
}
REPORT_POOL = (  # prompts/alignment.txt of https://github.com/mbzuai-oryx/XrayGPT
    _ASKED["reports"],
    "Take a look at this chest x-ray and describe the findings and impression.",
    "Could you provide a detailed description of the given x-ray image?",
    "Describe the given chest x-ray image as detailed as possible.",
    "What are the key findings in this chest x-ray image?",
    "Could you highlight any abnormalities or concerns in this chest x-ray image?",
    "What specific features of the lungs and heart are visible in this chest x-ray image?",
    "What is the most prominent feature visible in this chest x-ray image, and how is it indicative of the patient's health?",
    "What are the finding and overall impression provided by this chest x-ray image?",
    "How does the size and shape of the heart in this chest x-ray image?",
    "Is the overall impression provided by this chest x-ray image normal or abnormal? Answer based on the observed findings.",
    "Are there any indications of infection or inflammation in this chest x-ray image, and if so, what is the likely cause?",
    "Based on the findings in this chest x-ray image, what is the overall impression?",
    "Are there any visible indications of enlargement or abnormalities in the patient's lymph nodes in this chest x-ray image?",
    "Is there any potential complications or risks are associated with the observed abnormalities in this chest x-ray image? or the x-ray "
    "is normal?",
)
_SUFFIXES = (".png", ".jpg", ".jpeg", "")  # of XrayGPT's images: OpenI's png, MIMIC's jpg


def text_of(entry: dict, name: str, required: bool = True, empty: bool = False) -> str:
    """A field's text as it stands, line breaks and all; numbers as written. Null and NaN count as missing, which where it isn't `required`
    is "". `empty`: an empty text is one, too."""
    value = value_of(entry, name)
    if value is None and required:
        has = f"{name} is null or not a number" if name in entry else f"no field {name!r} (it has {listed(entry) or 'none'})"
        raise BadEntry(f"missing {name}", has)
    infinite = isinstance(value, float) and math.isinf(value)
    if infinite or isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        what = value if infinite else type(value).__name__
        raise BadEntry(f"bad {name}", f"{name} must be text, not {what}")
    text = "" if value is None else str(value)
    if required and not empty and not text.strip():
        raise BadEntry(f"empty {name}", f"{name} is empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadEntry(f"bad {name}", f"{name} holds half a surrogate pair, which is no character")
    return text


@dataclass
class InstructionReader:
    """What entries are read with: images, question answering data's own reader, and options of `load_instructions`."""

    find_image: ImageFinder
    questions: QuestionReader
    instruction: str | None
    image_folder: str
    image_prefix: str
    turns: str
    pool: bool = True  # whether what is asked may be drawn, as in training

    def image(self, name) -> dict:
        """Fields of an `Instruction` about the image of this name. `BadEntry` where there is none."""
        if not isinstance(name, str) or not name.strip():
            raise BadEntry("bad image", f"the image must be a file's name, not {name!r}")
        name = name.strip()
        folder, _, file = name.rpartition("/")
        prefixed = f"{folder}/{self.image_prefix}{file}" if folder else f"{self.image_prefix}{file}"
        return {"image": self.find_image(f"{self.image_folder}{prefixed}"), "image_name": name}


# Each of these reads one entry: fields of one `Instruction` or more, `BadEntry` where the entry is bad.


def _alpaca(reader: InstructionReader, source: AnnotationFile, entry: dict) -> Iterator[dict]:
    asked, answer = text_of(entry, "instruction"), text_of(entry, "output", empty=True)  # an empty one: end at once
    context = text_of(entry, "input", required=False)
    without_image_mark([asked], False, context, answer)
    yield {"turns": ((asked, answer),), "image": None, "context": context if context.strip() else ""}


def _llava(reader: InstructionReader, source: AnnotationFile, entry: dict) -> Iterator[dict]:
    questions, answers = _conversation(entry.get("conversations", entry.get(_MISSPELT)))
    seen = entry.get("image") not in (None, "")
    turns = tuple(zip((text.strip() for text in without_image_mark(questions, seen, *answers)), answers))
    if len(turns) > 1 and not turns[0][0]:
        raise BadEntry("empty value", "the first question holds nothing but <image>")
    image = reader.image(entry["image"]) if seen else {"image": None}
    facts = {name: str(entry[name]).strip() for name in ("answer_type", "content_type") if value_of(entry, name) is not None}
    image |= {"facts": facts | ({"answer_type": facts["answer_type"].upper()} if "answer_type" in facts else {})} if facts else {}
    for part in {"dialogue": (turns,), "each": tuple((turn,) for turn in turns), "first": (turns[:1],)}[reader.turns]:
        yield {"turns": part, "image_at": place_of_image_mark(questions[0]) if seen and part[0] is turns[0] else None, **image}


def _coco(reader: InstructionReader, source: AnnotationFile, entry: dict) -> Iterator[dict]:
    folder = "" if reader.image_folder else _coco_images(source)
    if folder and isinstance(entry.get("image"), str):
        entry = {**entry, "image": f"{folder}/{entry['image']}"}
    yield from _about_images(reader, entry, text_of(entry, "caption").strip(), _ASKED["coco"])


def _reports(reader: InstructionReader, source: AnnotationFile, entry: dict) -> Iterator[dict]:
    if "caption" not in entry:
        samples = _about_images(reader, entry, text_of(entry, "report").strip(), _ASKED["reports"])
    else:
        answer, asked = text_of(entry, "caption").strip(), reader.instruction or _ASKED["reports"]
        without_image_mark([asked], True, answer)
        samples = iter([{"turns": ((asked, answer),), **_numbered_image(reader, text_of(entry, "image_id").strip())}])
    others = () if reader.instruction or not reader.pool else REPORT_POOL[1:]
    for sample in samples:
        yield sample | {"alternatives": tuple(((asked, sample["turns"][0][1]),) for asked in others)}


def _numbered_image(reader: InstructionReader, name: str) -> dict:
    """Fields about the image of this id, with one of the suffixes that XrayGPT's have. `BadEntry` where there is none."""
    absent = None
    for suffix in _SUFFIXES:
        try:
            return reader.image(f"{name}{suffix}")
        except BadEntry as error:
            if error.reason != "missing image":
                raise
            absent = absent or error
    raise absent


def _about_images(reader: InstructionReader, entry: dict, answer: str, asked: str) -> Iterator[dict]:
    name = next((name for name in _IMAGE_FIELDS if value_of(entry, name) is not None), None)
    if name is None:
        raise BadEntry("missing image", f"no image (none of {', '.join(_IMAGE_FIELDS)}; or an image_id without its image)")
    names = entry[name] if isinstance(entry[name], list) else [entry[name]]
    if not names:
        raise BadEntry("missing image", f"{name} lists no image")
    (asked,) = without_image_mark([reader.instruction or asked], True, answer)
    for image in names:
        yield {"turns": ((asked, answer),), **reader.image(image)}


def _coco_images(source: AnnotationFile) -> str:
    """The folder of the images of COCO's two lists, train2014 for captions_train2014.json; else ""."""
    stem = source.path.stem
    joined = isinstance(source.value, dict) and "annotations" in source.value
    return stem.removeprefix("captions_") if joined and stem.startswith("captions_") else ""


def _conversation(messages) -> tuple[list[str], list[str]]:
    """(questions, answers) of LLaVA's messages."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadEntry("bad conversations", "conversations must be a list of one or more messages with 'from' and 'value'")
    speakers = [message.get("from") for message in messages]
    if len(messages) % 2 or any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers)):
        said = listed(speakers, 6)
        raise BadEntry("bad conversations", f"conversations must go human, gpt, human, gpt, ..., not {said}")
    texts = [text_of(message, "value") for message in messages]
    return texts[::2], texts[1::2]


def as_instruction(sample: Sample) -> Instruction:
    """A question about an image as an instruction; the phrasings of a pool are alternatives."""
    asked = (without_image_mark([question], True)[0] for question in sample.question_pool or (sample.question,))
    turns = tuple(((question, sample.answer),) for question in asked)
    facts = {"answer_type": sample.answer_type, "content_type": sample.content_type}
    place = {"qid": sample.qid, "entry": sample.entry, "source": sample.source, "image_name": sample.image_name}
    return Instruction(turns[0], sample.image, "vqa", alternatives=turns[1:], facts=facts, **place)


def _question(reader: InstructionReader, source: AnnotationFile, index: int, entry: dict) -> Iterator[Instruction]:
    return map(as_instruction, format_of(source).read(reader.questions, source, index, entry))


def _format(
    name: str, detect: Callable[[set], bool], fields_of: Callable[[InstructionReader, AnnotationFile, dict], Iterator[dict]]
) -> Format:
    def read(reader: InstructionReader, source: AnnotationFile, index: int, entry: dict) -> Iterator[Instruction]:
        qid = str(index if value_of(entry, "id") is None else entry["id"])
        for fields in fields_of(reader, source, entry):
            yield Instruction(kind=name, qid=qid, entry=index, source=source.path, **fields)

    return Format(name, detect, read)


def _is_report(fields: set) -> bool:
    named = not fields.isdisjoint(_IMAGE_FIELDS)
    return ("report" in fields and named) or ({"image_id", "caption"} <= fields and not named)


INSTRUCTION_FORMATS = (  # the first that shows in an entry's fields
    _format("llava", lambda fields: not fields.isdisjoint(("conversations", _MISSPELT)), _llava),
    _format("alpaca", lambda fields: {"instruction", "output"} <= fields, _alpaca),
    Format("vqa", lambda fields: bool(fields & {"image_name", "img_name"} and fields & {"question", "question_pool"}), _question),
    _format("reports", _is_report, _reports),
    _format("coco", lambda fields: "caption" in fields and not fields.isdisjoint(_IMAGE_FIELDS), _coco),
)
