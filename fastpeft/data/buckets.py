"""Batches padded to sizes that many batches share, so that few CUDA graphs serve them all.

B = samples, L = tokens of the longest, T = real tokens of all, n = labelled positions, U = distinct images. Padding lies on the right and
is masked out; a sample that fills up a short batch is one token without a label, an image that fills up is zeros that nobody asks about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.labels import IGNORE_INDEX
from fastpeft.static_shapes import NotStatic, Sizes

OF_IMAGES = ("pixel_values", "image_embeds", "image_index", "image_mask")
FILLS = {"labels": IGNORE_INDEX}


@dataclass(frozen=True)
class Bucket:
    """Sizes of a padded batch: ``samples`` B, ``length`` L and ``tokens`` T of what is asked (or of the whole text), ``answer_length`` and
    ``answers`` of a decoder's answers (0: there is none), ``labelled`` n, ``images`` U (0: none), ``questions_per_image`` and ``seeing`` as
    :class:`fastpeft.static_shapes.Sizes` has them."""

    samples: int
    length: int
    tokens: int
    answer_length: int
    answers: int
    labelled: int
    images: int
    questions_per_image: int
    seeing: str

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.tokens, self.answers, self.labelled, self.questions_per_image, self.seeing)

    def rounded(self, longest: int) -> Bucket:
        """Sizes rounded up, by themselves alone, so that a run that is resumed pads as one that was not interrupted. Lengths grow to at
        most ``longest``. Questions and answers, which are short, get few sizes; the tokens of a text, most of the work there, are rounded
        less."""
        asks = self.answer_length > 0
        length, answer_length = max(self.length, min(up(self.length, 2), longest)), 0
        if asks:
            answer_length = max(self.answer_length, min(up(self.answer_length, 1, least=4), longest))
        return replace(
            self,
            length=length,
            answer_length=answer_length,
            tokens=min(up(self.tokens, 2 if asks else 4), self.samples * length),
            answers=self.samples * answer_length,
            labelled=min(up(self.labelled, 1 if asks else 2), self.samples * (answer_length or length)),
            images=min(up(self.images, 2, least=1), self.samples) if self.images else 0,
        )


def up(n: int, steps: int, least: int = 8) -> int:
    """The least number that is at least n, and a power of two times 1, 1 + 1/steps, ... below 2."""
    if n <= least:
        return least
    octave = 1 << (n - 1).bit_length() - 1  # octave < n <= 2 octave
    return octave + -(-(n - octave) * steps // octave) * octave // steps


class Padded(NamedTuple):
    """A batch by the names of its inputs, some on the device already, and its own sizes, with those that fill up a short batch."""

    inputs: dict[str, Tensor]
    bucket: Bucket


def measured_batch(inputs: dict[str, Tensor], batch: dict, samples: int, image_tokens: int) -> Padded:
    """``inputs`` of a collated ``batch``, laid out as steps of static shapes take them: padded on the right, with an ``image_index`` where
    there are images, each sample's own where sharing them would not pay. ``samples``: of a full batch; ``image_tokens``: places that an
    image takes in a text. NotStatic where a batch cannot be laid out so."""
    if "prefix_lengths" in inputs:
        raise NotStatic("samples share what they begin with")
    inputs = _unpacked(inputs, batch["cu_seqlens"]) if "cu_seqlens" in batch else dict(inputs)
    inputs.pop("position_ids", None)
    mask, labels = inputs["attention_mask"], inputs["labels"]
    B = len(mask)
    fill = max(samples, B) - B
    lengths, answers = _lengths(mask), _lengths(inputs["decoder_attention_mask"]) if "decoder_attention_mask" in inputs else None
    labelled = int((labels[:, 1:] != IGNORE_INDEX).sum())
    inputs, images, shared, seeing = _images(inputs, B, fill, image_tokens)
    bucket = Bucket(
        samples=B + fill,
        length=int(lengths.max()),
        tokens=int(lengths.sum()) + fill,
        answer_length=0 if answers is None else int(answers.max()),
        answers=0 if answers is None else int(answers.sum()) + fill,
        labelled=max(labelled, 1),
        images=images,
        questions_per_image=shared,
        seeing=seeing,
    )
    return Padded(inputs, bucket)


def padded(batch: Padded, bucket: Bucket) -> dict[str, Tensor]:
    """The batch's inputs in the shapes of ``bucket``, none of whose sizes is below its own."""
    return {name: _padded(name, t, bucket) for name, t in batch.inputs.items()}


def _padded(name: str, t: Tensor, bucket: Bucket) -> Tensor:
    if name in ("pixel_values", "image_embeds"):
        return _filled(t, bucket.images, 0)
    if name == "image_index":
        return t
    if name == "question_states":
        return F.pad(t, (0, 0, 0, bucket.length - t.shape[1], 0, bucket.samples - len(t)))
    answer = name.startswith("decoder_") or (name == "labels" and bucket.answer_length)
    length, fill = bucket.answer_length if answer else bucket.length, FILLS.get(name, 0)
    t, samples = t[:, :length], len(t)
    t = _filled(F.pad(t, (0, length - t.shape[1]), value=fill), bucket.samples, fill)
    if name.endswith("attention_mask"):
        t[samples:, 0] = 1  # a row that attends to nothing has no softmax
    return t


def _filled(t: Tensor, rows: int, fill) -> Tensor:
    return torch.cat([t, t.new_full((rows - len(t), *t.shape[1:]), fill)]) if rows > len(t) else t


def _lengths(mask: Tensor) -> Tensor:
    """[B] of a mask whose padding lies on the right."""
    real = mask != 0
    lengths = real.sum(1)
    if not torch.equal(real, torch.arange(mask.shape[1]) < lengths[:, None]):
        raise NotStatic("a batch has padding on the left, or in between")
    if not bool(lengths.all()):
        raise NotStatic("a sample has no token")
    return lengths


def _unpacked(inputs: dict[str, Tensor], starts: Tensor) -> dict[str, Tensor]:
    """Samples that lie end to end [1, T] as rows [B, L], with their mask."""
    lengths = torch.diff(starts).tolist()
    rows = {name: inputs[name][0].split(lengths) for name in ("input_ids", "labels", "image_mask") if name in inputs}
    rows["attention_mask"] = [torch.ones(n, dtype=torch.int64) for n in lengths]
    pad = torch.nn.utils.rnn.pad_sequence
    return inputs | {name: pad(list(of), batch_first=True, padding_value=FILLS.get(name, 0)) for name, of in rows.items()}


def _images(inputs: dict[str, Tensor], B: int, fill: int, image_tokens: int) -> tuple[dict[str, Tensor], int, int, str]:
    """(inputs, U, questions per image, "none", "some" or "every") with ``image_index`` [B + fill]."""
    name = next((name for name in OF_IMAGES[:2] if inputs.get(name) is not None), None)
    index = inputs.get("image_index")
    places = inputs.get("image_mask")
    if name is None or index is None or bool((index < 0).all()):
        if places is not None and bool(places.any()):
            raise NotStatic("a text has places for an image that is not there")
        return {name: t for name, t in inputs.items() if name not in OF_IMAGES}, 0, 1, "none"
    images, sees = inputs[name], index >= 0
    if index.shape != (B,) or int(index.max()) >= len(images) or int(index.min()) < -1:
        raise NotStatic("image_index does not fit the images")
    if places is not None and not torch.equal(places.sum(1), sees * image_tokens):
        raise NotStatic(f"a sample has not the {image_tokens} places of its image")
    if "decoder_input_ids" not in inputs:  # a text takes of images as many as there are, whoever shares them
        return inputs | {"image_index": _filled(index, B + fill, -1)}, len(images), 1, "every" if bool(sees.all()) and not fill else "some"
    if not bool(sees.all()):
        raise NotStatic("a question has no image")
    shared = int(torch.bincount(index).max())
    if shared == 1 or len(images) * shared > 1.5 * B:  # a table of U rows of so many questions would be wider than one of B rows
        images, shared = images[index.to(images.device)], 1
        index = torch.arange(B + fill)
        return inputs | {name: _filled(images, B + fill, 0), "image_index": index}, B + fill, 1, "every"
    more = -(-fill // shared)
    index = torch.cat([index, len(images) + torch.arange(fill) // shared])
    return inputs | {name: _filled(images, len(images) + more, 0), "image_index": index}, len(images) + more, shared, "every"
