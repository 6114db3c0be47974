"""Frozen stages of a network: its first parts, where their output is a constant of the sample.

MISS runs image encoder, question encoder, answer decoder. With its image encoder frozen (F/x/y) a constant belongs to each image; with its
question encoder frozen too (F/F/x), to each pair of an image and a question. A class here says what its outputs are, what they belong to
(an "item") and which of the model's arguments they replace; :mod:`fastpeft.features.cache` computes and keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastpeft.data import encode_questions
from fastpeft.fused.stack.blip import FusedBlipTextModel
from fastpeft.methods import Frozen, Part
from fastpeft.models import parts_of

QUESTIONS = 128  # encoded at a time, beside their images


class ImageFeatures:
    """[N, C] of an image; an item is its path."""

    what, unit = "image features", "image"
    argument: ClassVar[str] = "image_embeds"
    replaced: ClassVar[tuple[str, ...]] = ("pixel_values",)
    stage_names: ClassVar[tuple[tuple[str, ...], ...]] = (("vit", "vision"),)  # each stage's part, by any of its names

    def __init__(self, model: nn.Module, dataset):
        self.model, self.dataset = model, dataset

    @classmethod
    def parts(cls, model: nn.Module) -> list[Part | None]:
        """The stages' parts; None for one that the model has not."""
        return [next((part for part in parts_of(model) if part.name in names), None) for names in cls.stage_names]

    @classmethod
    def why_not(cls, model: nn.Module, dataset=None) -> str:
        """'' where the outputs are constants; else the reason they are not. ``dataset`` None: of any that asks in one way."""
        parts = cls.parts(model)
        if None in parts:
            return f"the model has no part that encodes {cls.unit}s"
        for part in parts:
            methods = model.fastpeft_plan.treatments[part.name]
            if Frozen(True) in methods:
                return f"the frozen part {part.name} was asked to keep its dropout: its outputs are random"
            if methods != (Frozen(),):
                return f"{part.name} is trained"
        return ""

    def items(self) -> list[Hashable]:
        """Of all samples that have an image."""
        return [sample.image for sample in self.dataset.samples if sample.image is not None]

    def items_of(self, batch: dict) -> list[Hashable]:
        """Of a collated batch, in the order of the argument's rows."""
        return batch["images"]

    def image(self, item) -> Path:
        """What :meth:`outputs` needs the features of."""
        return item

    def tokens(self, item) -> int:
        """To which the size of the item's output is proportional."""
        return 1

    def key(self, item) -> str:
        """By content: of the image's file, wherever it lies."""
        return self.dataset.image_key(self.image(item))

    def outputs(self, items: Sequence, features: Tensor) -> Iterator[Tensor]:
        """One of each item, given [U, N, C] of the items' distinct images in order of appearance."""
        yield from features


class QuestionStates(ImageFeatures):
    """[L, C] of a question about an image; an item is the image's path and the question's token ids, without padding."""

    what, unit = "question states", "question"
    argument = "question_states"
    replaced = ("pixel_values", "image_index", "input_ids")
    stage_names = (("vit",), ("jtm",))

    @classmethod
    def why_not(cls, model: nn.Module, dataset=None) -> str:
        reason = super().why_not(model, dataset)
        if not reason and not isinstance(model.text_encoder, FusedBlipTextModel):
            return "in transformers' own modules a question's padding changes its answer's loss"
        if not reason and dataset is not None and any(len(sample.question_pool) > 1 for sample in dataset.samples):
            return "the questions are phrased anew in every epoch"  # an image is then encoded once, but not its questions
        return reason

    def items(self) -> list[Hashable]:
        samples, tokenizer = self.dataset.samples, self.dataset.tokenizer
        encoded = encode_questions(tokenizer, [sample.question for sample in samples], self.dataset.collator().max_question)
        return _pairs([sample.image for sample in samples], encoded)

    def items_of(self, batch: dict) -> list[Hashable]:
        return _pairs([batch["images"][i] for i in batch["image_index"].tolist()], batch)

    def image(self, item) -> Path:
        return item[0]

    def tokens(self, item) -> int:
        return len(item[1])

    def key(self, item) -> str:
        return hashlib.blake2b(f"{super().key(item)} {item[1]}".encode(), digest_size=16).hexdigest()

    def outputs(self, items: Sequence, features: Tensor) -> Iterator[Tensor]:
        place = {path: u for u, path in enumerate(dict.fromkeys(path for path, _ in items))}
        for at in range(0, len(items), QUESTIONS):
            paths, ids = zip(*items[at : at + QUESTIONS])
            ids = [torch.tensor(one) for one in ids]
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
            padded, index = nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([place[path] for path in paths])
            states = self.model.encode_questions(padded.to(features.device), mask, features, index)
            yield from (states[b, : len(one)] for b, one in enumerate(ids))


def _pairs(paths: Sequence[Path], encoded: dict[str, Tensor]) -> list[tuple[Path, tuple[int, ...]]]:
    rows = zip(paths, encoded["input_ids"], encoded["attention_mask"])
    return [(path, tuple(ids[mask.bool()].tolist())) for path, ids, mask in rows]


def longest_frozen_stages(model: nn.Module, dataset=None) -> type[ImageFeatures] | None:
    """The longest run of stages whose outputs are constants; None where there is none."""
    return next((stages for stages in (QuestionStates, ImageFeatures) if not stages.why_not(model, dataset)), None)
