"""A trained model ready to be asked: `fp.load(folder).ask(image, question)`, `fastpeft ask`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.adapters import DESCRIPTION, adapter_in, describe
from fastpeft.data import Instruction, Sample
from fastpeft.data._files import place_of_image_mark, without_image_mark
from fastpeft.data.images import Preprocess, load_image
from fastpeft.evaluate import answer_questions, respond
from fastpeft.models import family_of, resolve
from fastpeft.runs import causal
from fastpeft.runs.evaluate import load_folder, load_run, text_options
from fastpeft.runs.options import TextOptions
from fastpeft.runs.train import RUNS


class Loaded:
    """A model with its tokenizer, its images' preprocessing (None where it sees none), and how it reads text."""

    def __init__(self, model: nn.Module, tokenizer, preprocess: Preprocess | None, text: TextOptions):
        self.model, self.tokenizer, self.preprocess, self.text = model, tokenizer, preprocess, text
        self.kind = family_of(model).kind

    def ask(self, image: Any, question: str | Sequence[str], **generation) -> str | list[str]:
        """The answer to a question about an image, or the answers to several.

        image: a path, a ``PIL.Image`` or an array [height, width, 3] of uint8; None for text alone; or a list of these, one for each
        question. question: one, or a list. ``generation``: options of transformers' ``generate`` (num_beams, max_new_tokens, top_p, ...);
        without them, the decoding of `fastpeft eval`. "<image>" in a question of a causal model is the image's, as in LLaVA's data: it is
        left out, and without an image it is an error. ValueError names an image that cannot be read or that the model cannot see.
        """
        questions = [question] if isinstance(question, str) else list(question)
        images = list(image) if isinstance(image, list | tuple) else [image] * len(questions)
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images for {len(questions)} questions: give one image for all, or one for each")
        if not questions:
            return []
        if self.kind == "vqa" and (missing := [q for q, one in zip(questions, images) if one is None]):
            raise ValueError(f"{missing[0]!r} needs an image: this model answers questions about images")
        if self.kind == "vqa" and (extra := generation.keys() - {"num_beams", "max_length"}):
            raise ValueError(f"{', '.join(sorted(extra))}: a model of this kind takes num_beams and max_length")
        run = RUNS[self.kind]
        with tempfile.TemporaryDirectory() as folder:
            samples = [self._sample(path, q) for path, q in zip(_paths(images, Path(folder)), questions)]
            asked = run.dataset(self.model, samples, self.tokenizer, self.preprocess, self.text, prompts_only=True)
            generation = {"num_beams": run.BEAMS, "progress": False, **generation}
            if self.kind == "vqa":
                answers = answer_questions(self.model, asked, self.tokenizer, **generation)
            else:
                answers = respond(self.model, asked, **generation)
        return answers[0] if isinstance(question, str) else answers

    def _sample(self, image: Path | None, question: str) -> Sample | Instruction:
        if self.kind == "vqa":
            return Sample(image, question, "")
        (asked,) = without_image_mark([question], image is not None)
        return Instruction(((asked, ""),), image, "chat", "", 0, Path(), image_at=place_of_image_mark(question))


def load(folder: str | Path, device: str | None = None, model: str | None = None) -> Loaded:
    """A run's folder, its adapter folder, a merged or other transformers folder with its tokenizer, or a name whose weights ship.

    device: "cpu", "cuda", ...; None: CUDA where there is one. model: the base, where it is no longer where an adapter says.
    ValueError says what is missing.
    """
    adapter = adapter_in(Path(folder).expanduser())
    if (adapter / DESCRIPTION).is_file():
        network, tokenizer, preprocess = load_run(adapter, device, model)
        return Loaded(network.eval(), tokenizer, preprocess, causal.options_of(describe(adapter)))
    source = resolve(folder)
    if source.folder is None:
        raise ValueError(f"{source} has random weights: give a run's folder, an adapter or a model's folder")
    network, tokenizer, preprocess = load_folder(source, device)
    return Loaded(network, tokenizer, preprocess, text_options(source.folder, network))


def _paths(images: Sequence[Any], folder: Path) -> list[Path | None]:
    """Paths of images; those already open are written to ``folder`` once, without loss."""
    written: dict[int, Path] = {}
    return [_path(image, folder, written) for image in images]


def _path(image: Any, folder: Path, written: dict[int, Path]) -> Path | None:
    if image is None:
        return None
    if isinstance(image, str | Path):
        return Path(image).expanduser().resolve()
    if id(image) not in written:
        written[id(image)] = folder / f"{len(written)}.png"
        load_image(_opened(image)).save(written[id(image)])
    return written[id(image)]


def _opened(image: Any):
    """``image`` as a PIL image. ValueError for what is none."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    shape, dtype = getattr(image, "shape", None), str(getattr(image, "dtype", ""))
    if shape is None or len(shape) not in (2, 3) or "uint8" not in dtype:
        what = f"an array {list(shape)} of {dtype}" if shape is not None else type(image).__name__
        raise ValueError(f"{what} is no image: give a path, a PIL image, or an array [height, width, 3] of uint8")
    return Image.fromarray(image.numpy() if hasattr(image, "numpy") else image)
