"""What a model reads before the last response of a sample, as one text: earlier responses in it, without an image's place."""

from fastpeft.data.prompts import ending, render


def prompt_text(template, sample) -> str:
    *earlier, (pieces, _) = render(template, sample)
    return "".join("".join(prompt) + answer + ending(template).text for prompt, answer in earlier) + "".join(pieces)
