"""Dialogue with a causal language model, about one image or none, in the prompt template of its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import nn

from fastpeft.data import CausalDataset, Instruction
from fastpeft.data._files import without_image_mark
from fastpeft.data.images import load_image
from fastpeft.evaluate.responses import respond


class Chat:
    """A dialogue: its turns so far, and the image they are about.

    read: makes the model's data set of prompts from a list of samples. generation: arguments of transformers' ``generate``.
    """

    def __init__(self, model: nn.Module, read: Callable[[list[Instruction]], CausalDataset], image: str | None = None, **generation):
        self.model, self.read, self.generation = model, read, generation
        self.turns: list[tuple[str, str]] = []
        self.image: Path | None = None
        if image is not None:
            self.show(image)

    def show(self, image: str) -> None:
        """Start a new dialogue about an image. ValueError or OSError where it cannot be read, ValueError where the model sees none."""
        if getattr(self.model.config, "vision_config", None) is None:
            raise ValueError(f"a {self.model.config.model_type} sees no images: leave --image and /image out, or choose a model that does")
        path = Path(image).expanduser().resolve()
        load_image(path)
        self.image, self.turns = path, []

    def ask(self, question: str) -> str:
        """The response to ``question`` after the turns so far. ValueError where they no longer fit."""
        *_, question = without_image_mark([*(asked for asked, _ in self.turns), question], self.image is not None)
        turns = (*self.turns, (question, ""))
        dataset = self.read([Instruction(turns, self.image, "chat", "chat", 0, Path("chat"))])
        if dataset.cut:
            raise ValueError(f"the dialogue takes more than {dataset.max_length} tokens, as many as the model reads: /reset begins anew")
        (response,) = respond(self.model, dataset, batch_size=1, progress=False, **self.generation)
        self.turns.append((question, response))
        return response

    def follow(self, lines: Iterable[str] | None, on_error: Callable[[Exception], None] | None = None) -> Iterator[str]:
        """A response for each line that is not empty (lines None: those typed at the terminal), until /quit; /reset forgets the turns,
        /image FILE begins anew over an image, and another /WORD is an error. Where on_error is given it is told what is wrong with a
        line, and the dialogue goes on."""
        for line in map(str.strip, typed() if lines is None else lines):
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            try:
                if command == "/reset":
                    self.turns = []
                elif command == "/image":
                    self.show(rest.strip())
                elif command.startswith("/") and command[1:].isalpha():
                    raise ValueError(f"there is no {command}; there are /image FILE, /reset and /quit")
                elif line:
                    yield self.ask(line)
            except (ValueError, OSError) as error:
                if on_error is None:
                    raise
                on_error(error)


def typed() -> Iterator[str]:
    """Lines from a terminal, until its end."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
