"""Prompt templates of instruction tuning, word for word as published.

- alpaca: Stanford Alpaca's train.py, with and without input; paper 003 prints the same words.
- lavin: LaVIN's data_processing.py and base_prompt.py, after "Image: " and the image's tokens, or "Image: N/A".
- llava (LLaVA's conversation v1, of Vicuna 1.1) and the other conversations of LLaVA and LLaVA-Med, by version: `conversations`.
- scienceqa: ScienceQA's base_prompt.py.
- plain: the question and a line break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastpeft.data._files import IMAGE_MARK
from fastpeft.data.conversations import CONVERSATIONS, Conversation
from fastpeft.data.samples import Instruction, Turns


class Token(str):
    """A piece of a prompt that is one special token, by its text."""


BOS = Token("<s>")  # the tokenizer's own, whatever its text
IMAGE = None  # a piece of a prompt: the place of the image's tokens
Piece = str | None
PLACES = ("before", "after", "data")
_HERE = "\ufdd0image\ufdd1"  # no text has these: they are no characters


@dataclass(frozen=True)
class Ending:
    """What closes a response: ``text``, then the end token where ``eos`` says so. A response is cut at ``stop``, where there is one.
    Without the end token the next question goes on in the same text."""

    text: str = ""
    eos: bool = True
    stop: str = ""


@dataclass(frozen=True)
class Frame:
    """A template's words around the first question: ``piece``, the one of the prompt that holds it, as (``before`` the question,
    ``before_context``, ``after`` both). The second contains the question; it is None where the prompt has no context."""

    piece: int
    before: str
    before_context: str | None
    after: str


def _alpaca(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    if turn:
        return f"\n\n### Instruction:\n{question}\n\n### Response:", ""
    paired = ", paired with an input that provides further context" if sample.context else ""
    context = f"### Input:\n{sample.context}\n\n" if sample.context else ""
    opening = f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
    return f"{opening}### Instruction:\n{question}\n\n{context}### Response:", ""


def _lavin(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    if sample.kind == "scienceqa":
        return f"{question}\nResponse:", ""
    context = f" {sample.context}" if sample.kind == "alpaca" and not turn else ""  # the space stays where the input is empty, as published
    return ("\n" if turn else "") + f"Instruction: {question}{context}\nResponse: ".replace("  ", " ").strip(), ""


def _scienceqa(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    return f"{question}\nAnswer:", " "


def _plain(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    context = f"\n{sample.context}" if sample.context and not turn else ""
    return f"{question}{context}\n", ""


_TEMPLATES: dict[str, Callable[[Instruction, int, str], tuple[str, str]]] = {
    "alpaca": _alpaca,
    "lavin": _lavin,
    "plain": _plain,
    "scienceqa": _scienceqa,
}
TEMPLATES = tuple(sorted([*_TEMPLATES, *CONVERSATIONS]))


def ending(template: str) -> Ending:
    """What closes a template's responses. ValueError for an unknown template."""
    _check(template)
    style = CONVERSATIONS.get(template)
    return Ending() if style is None else Ending(style.end, style.eos, style.stop)


def check_place(template: str, place: str | None) -> None:
    """ValueError for a place of the image that there is not, or where the template has one of its own."""
    _check(template)
    if place is not None and place not in PLACES:
        raise ValueError(f"image_place={place!r}: use one of {', '.join(PLACES)}")
    if place is not None and template not in CONVERSATIONS:
        raise ValueError(f"image_place={place!r}: the template {template} has its own place for the image; leave image_place out")


def _check(template: str) -> None:
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r}: use one of {', '.join(TEMPLATES)}")


def render(
    template: str,
    sample: Instruction,
    turns: Turns | None = None,
    image_tokens: bool = False,
    place: str | None = None,
    around: tuple[str, str] | None = None,
) -> list[tuple[list[Piece], str]]:
    """(pieces of the prompt, response) of each turn; `turns` instead of the sample's own, where given.

    Each piece is tokenised on its own. The last piece and the response are tokenised as one text, since a token may span both:
    "...Response:" and "The answer" have no space between them. With `image_tokens`, `IMAGE` marks the place of the image's
    tokens: where lavin and the conversations put them (of these `place` says another: "before" or "after" the first question, or as the
    "data" have it), and before all text in other templates. Without, no piece is `IMAGE`. ``around``: special tokens before and after an
    image.

    ValueError for an unknown template, and for "<image>" in a text: readers take it out where the sample has an image.
    """
    _check(template)
    if any(IMAGE_MARK in text for turn in (turns or sample.turns) for text in turn) or IMAGE_MARK in sample.context:
        where = f"{sample.source}: entry {sample.entry}" if sample.source.name else "a sample"
        raise ValueError(f"{where}: {IMAGE_MARK} stands in its text: leave it out, an image's place is the template's to say")
    shown = bool(image_tokens and sample.image)
    if template in CONVERSATIONS:
        rendered = _conversation(CONVERSATIONS[template], sample, turns or sample.turns, shown, place)
    else:
        rendered = []
        for turn, (question, answer) in enumerate(turns or sample.turns):
            prompt, space = _TEMPLATES[template](sample, turn, question)
            rendered.append(([prompt], space + answer))
        if image_tokens and template == "lavin":
            rendered[0][0][:0] = ["Image: ", IMAGE] if sample.image else ["Image: N/A"]
        elif shown:
            rendered[0][0].insert(0, IMAGE)
    if shown and around is not None:
        first = rendered[0][0]
        at = first.index(IMAGE)
        first[at : at + 1] = [Token(around[0]), IMAGE, Token(around[1])]
    return rendered


def _conversation(style: Conversation, sample: Instruction, turns: Turns, shown: bool, place: str | None) -> list[tuple[list[Piece], str]]:
    rendered: list[tuple[list[Piece], str]] = []
    for turn, (question, answer) in enumerate(turns):
        context = f"\n{sample.context}" if sample.context and not turn else ""
        if turn:
            pieces: list[Piece] = [BOS] if style.bos else []
            pieces.append(f"{style.again}{question}{style.after}")
        elif not shown:
            pieces = [f"{style.before}{question}{context}{style.after}"]
        else:
            before, after = _around_image(style, sample.image_at, question, context, place).split(_HERE)
            pieces = [f"{style.before}{before}", IMAGE, f"{after}{style.after}"]
        rendered.append((pieces, f" {answer}"))
    return rendered


def _around_image(style: Conversation, at: int | None, question: str, context: str, place: str | None) -> str:
    """The first question and its context with the image's place in it."""
    here = f"{style.image[0]}{_HERE}{style.image[1]}"
    place = place or style.place
    if place == "data" and at is not None and 0 < at < len(question):
        return f"{question[:at]}{here}{question[at:]}{context}"
    if place == "data":
        own = "after" if style.place == "data" else style.place
        place = own if at is None else "after" if at else "before"
    return f"{here}\n{question}{context}" if place == "before" else f"{question}{context}\n{here}"


def frame(
    template: str,
    sample: Instruction,
    question: str,
    image_tokens: bool = False,
    place: str | None = None,
    around: tuple[str, str] | None = None,
) -> Frame:
    """The template's words around the first question of a prompt that :func:`render` makes of the same arguments."""
    at = sample.image_at if image_tokens and sample.image and place in (None, "data") else None
    kept = question[:at] if at and at < len(question) and _in_place(template, place) else ""  # before an image within the question

    def pieces(question: str, context: str) -> list[Piece]:
        return render(template, replace(sample, context=context), ((f"{kept}{question}", ""),), image_tokens, place, around)[0][0]

    asked, given = "\0", "\1"
    whole = pieces(asked, given if sample.context else "")
    piece = next(i for i, text in enumerate(whole) if text is not IMAGE and asked in text)
    before, after = whole[piece].split(asked)
    if given not in after:
        return Frame(piece, before, None, after)
    return Frame(piece, before, pieces(question[len(kept) :], given)[piece].split(given)[0], after.split(given)[1])


def _in_place(template: str, place: str | None) -> bool:
    return template in CONVERSATIONS and (place or CONVERSATIONS[template].place) == "data"
