"""Prompt templates of instruction tuning, word for word as published.

- alpaca: Stanford Alpaca's train.py, with and without input; paper 003 prints the same words.
- lavin: LaVIN's data_processing.py and base_prompt.py, after "Image: " and the image's tokens, or "Image: N/A".
- llava: LLaVA's conversation v1 (Vicuna 1.1); the image comes before the first question.
- scienceqa: ScienceQA's base_prompt.py.
- plain: the question and a line break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastpeft.data._files import IMAGE_MARK
from fastpeft.data.samples import Instruction, Turns

IMAGE = None  # a piece of a prompt: the place of the image's tokens
Piece = str | None
_LLAVA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


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


def _llava(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    context = f"\n{sample.context}" if sample.context and not turn else ""
    return (f"USER: {question}{context} ASSISTANT:" if turn else f"{_LLAVA}USER: {question}{context} ASSISTANT:"), " "


def _scienceqa(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    return f"{question}\nAnswer:", " "


def _plain(sample: Instruction, turn: int, question: str) -> tuple[str, str]:
    context = f"\n{sample.context}" if sample.context and not turn else ""
    return f"{question}{context}\n", ""


_TEMPLATES: dict[str, Callable[[Instruction, int, str], tuple[str, str]]] = {
    "alpaca": _alpaca,
    "lavin": _lavin,
    "llava": _llava,
    "plain": _plain,
    "scienceqa": _scienceqa,
}
TEMPLATES = tuple(_TEMPLATES)


def render(template: str, sample: Instruction, turns: Turns | None = None, image_tokens: bool = False) -> list[tuple[list[Piece], str]]:
    """(pieces of the prompt, response) of each turn; `turns` instead of the sample's own, where given.

    Each piece is tokenised on its own. The last piece and the response are tokenised as one text, since a token may span both:
    "...Response:" and "The answer" have no space between them. With `image_tokens`, `IMAGE` marks the place of the image's
    tokens: where lavin and llava put them, and before all text in other templates. Without, no piece is `IMAGE`.

    ValueError for an unknown template, and for "<image>" in a text: readers take it out where the sample has an image.
    """
    if template not in _TEMPLATES:
        raise ValueError(f"template={template!r}: use one of {', '.join(TEMPLATES)}")
    if any(IMAGE_MARK in text for turn in (turns or sample.turns) for text in turn) or IMAGE_MARK in sample.context:
        where = f"{sample.source}: entry {sample.entry}" if sample.source.name else "a sample"
        raise ValueError(f"{where}: {IMAGE_MARK} stands in its text: leave it out, an image's place is the template's to say")
    rendered: list[tuple[list[Piece], str]] = []
    for turn, (question, answer) in enumerate(turns or sample.turns):
        prompt, space = _TEMPLATES[template](sample, turn, question)
        rendered.append(([prompt], space + answer))
    if image_tokens:
        first = rendered[0][0]
        if template == "lavin":
            first[:0] = ["Image: ", IMAGE] if sample.image else ["Image: N/A"]
        elif sample.image and template == "llava":
            before, after = first[0].split("USER: ", 1)
            first[:] = [f"{before}USER: ", IMAGE, f"\n{after}"]
        elif sample.image:
            first.insert(0, IMAGE)
    return rendered


def frame(template: str, sample: Instruction, question: str, image_tokens: bool = False) -> tuple[str, str | None, str]:
    """The template's words in the last piece of a first prompt, as (before the question, before the context, after both).

    The second contains the question; it is None where the prompt has no context.
    """

    def last_piece(question: str, context: str) -> str:
        return render(template, replace(sample, context=context), ((question, ""),), image_tokens)[0][0][-1]

    asked, given = "\0", "\1"
    before, after = last_piece(asked, given if sample.context else "").split(asked)
    if given not in after:
        return before, None, after
    return before, last_piece(question, given).split(given)[0], after.split(given)[1]
