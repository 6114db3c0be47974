"""Data set of instructions for causal language models, with labels on responses only. n = tokens of a sample, S = image size."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from fastpeft.data.causal_batches import CausalCollator
from fastpeft.data.causal_tokenizer import encode_texts
from fastpeft.data.dataset import SampleDataset
from fastpeft.data.images import Preprocess
from fastpeft.data.prompts import IMAGE, frame, render
from fastpeft.data.samples import Instruction, Turns
from fastpeft.data.tokenizer import save_tokenizer
from fastpeft.labels import IGNORE_INDEX

_CHUNK = 4096  # samples tokenised at once
_PROMPT, _RESPONSE, _IMAGE = range(3)  # kinds of token


class CausalDataset(SampleDataset):
    """Instructions as token ids: `dataset[i]` is {"sample", "input_ids" int64 [n], "labels" int64 [n]} and, where there is an
    image and a `preprocess`, "pixel_values" float32 [3, S, S]; with image tokens "image_mask" bool [n].

    ids: bos, then for each turn the prompt, the response, eos. Labels are -100 but on responses and the eos after each (the
    first response token is the first that the prompt alone doesn't have). All is tokenised once, here.

    Args:
        samples: `Instruction`s; where one has alternatives, its turns are drawn from (seed, epoch, index).
        tokenizer: with bos, eos and padding tokens, of `load_causal_tokenizer` or `train_causal_tokenizer`.
        template: see `prompts`.
        max_length: longer samples are cut at the end, eos and all (LaVIN's 512 include its modality token: 511 here), as published.
            A sample whose response is cut off entirely is refused. Places of image tokens are never cut.
        image_tokens: N > 0 reserves N places for an image's tokens where the template has them, marked in "image_mask"; their ids
            are the padding token's. 0: the model itself inserts the image.
        packed: batches join samples end to end instead of padding them, see `CausalCollator`.
        prompts_only: for generation: ids end where the last response would begin, and there are no labels. A prompt longer than
            `max_length` loses the beginning of its context, then of its question (in a dialogue, the oldest turns), so that the
            template and the image's places stay complete. Where that is not enough, it keeps bos, or all up to the image's last
            place, and the last tokens of its text.
        skip_bad: leave out samples that are refused, and count them in `.skipped`, instead of ValueError.
        reading: options that the samples were read with, for `describe()`.

    `cut`: number of samples or prompts that lost tokens. ValueError, with the number of such samples and the first one's place, where
    `max_length` has no room for a response, or in a prompt for the image's places and the template's last words.
    """

    def __init__(
        self,
        samples: Sequence[Instruction],
        tokenizer,
        template: str = "alpaca",
        max_length: int = 512,
        *,
        preprocess: Preprocess | None = None,
        image_tokens: int = 0,
        prompts_only: bool = False,
        packed: bool = False,
        skip_bad: bool = False,
        seed: int = 0,
        cache_bytes: int = 256 << 20,
        reading: dict | None = None,
    ):
        if max_length < 2 or image_tokens < 0:
            raise ValueError(f"max_length={max_length}, image_tokens={image_tokens}: use 2 or more, and 0 or more")
        super().__init__(samples, preprocess, seed, cache_bytes, tokenizer)
        self.template, self.max_length, self.image_tokens = template, max_length, image_tokens
        self.prompts_only, self.packed, self.reading, self.cut = prompts_only, packed, reading, 0
        of_images = ("image_mask", "pixel_values", "image_index") if any(sample.image for sample in samples) else ()
        self.inputs = ("input_ids", "attention_mask", "position_ids", "prefix_lengths", "labels", *of_images)
        self._encoded: list[list[tuple[array, array]]] = []  # of each sample, each of its alternatives: ids, kinds of token
        kept, refused = [], []
        for start in range(0, len(samples), _CHUNK):
            part = samples[start : start + _CHUNK]
            for sample, encoded in zip(part, self._encode(part)):
                fitted = [self._fit(sample, turns, *whole) for turns, whole in zip((sample.turns, *sample.alternatives), encoded)]
                if None in fitted:
                    refused.append(sample)
                    continue
                self.cut += any(len(ids) < len(whole) for (ids, _), (whole, _) in zip(fitted, encoded))
                kept.append(sample)
                self._encoded.append(fitted)
        if refused:
            self._refuse(refused, len(samples), skip_bad)
            self.samples = kept

    def _refuse(self, refused: list[Instruction], count: int, skip_bad: bool) -> None:
        response = "" if self.prompts_only else "a response"
        if skip_bad and len(refused) < count:
            self.skipped = {"response cut off" if response else "no room for the image": len(refused)}
            return
        if skip_bad:
            raise ValueError(f"max_length={self.max_length} leaves no sample {response or 'its image'}: raise it (--max-length)")
        where = f"{refused[0].source}: entry {refused[0].entry}"
        room = response or f"the image's {self.image_tokens} places and the prompt around them"
        raise ValueError(
            f"{where}: no room for {room} in max_length={self.max_length} ({len(refused)} of {count} samples): train with a larger one "
            "(--max-length), or skip_bad (--skip-bad) leaves them out"
        )

    def _fit(self, sample: Instruction, turns: Turns, ids: array, kinds: array) -> tuple[array, array] | None:
        """At most `max_length` tokens; None where they have no room for what must stay."""
        over = len(ids) - self.max_length
        if over <= 0:
            return ids, kinds
        if not self.prompts_only:
            kinds = kinds[: self.max_length]
            return (ids[: self.max_length], kinds) if _RESPONSE in kinds else None
        return self._cut_prompt(sample, turns, ids[:], kinds[:])

    def _cut_prompt(self, sample: Instruction, turns: Turns, ids: array, kinds: array) -> tuple[array, array] | None:
        (*openings, _), _ = render(self.template, sample, turns, self.image_tokens > 0)[0]
        before, before_context, after = frame(self.template, sample, turns[0][0], self.image_tokens > 0)
        texts = list({text for text in (*openings, before, before_context, after) if text is not None})
        tokens = dict(zip(texts, encode_texts(self.tokenizer, texts)))
        start = 1 + sum(self.image_tokens if piece is IMAGE else len(tokens[piece]) for piece in openings)
        asked = start + _common_prefix(tokens[before], ids[start:])  # where the question begins
        end = max(asked, len(ids) - _common_prefix(tokens[after][::-1], ids[::-1]))
        given = end  # where its context begins
        if before_context is not None and len(turns) == 1:
            given = min(max(asked, start + _common_prefix(tokens[before_context], ids[start:])), end)
        over = len(ids) - self.max_length
        if over <= end - asked:
            of_context = min(over, end - given)
            cuts = [(given, of_context), (asked, over - of_context)]  # the later first
        elif _IMAGE not in kinds:
            cuts = [(1, over)]
        elif start + len(ids) - end <= self.max_length:
            cuts = [(start, over)]
        else:
            return None
        for begin, count in cuts:
            del ids[begin : begin + count], kinds[begin : begin + count]
        return ids, kinds

    def _encode(self, samples: Sequence[Instruction]) -> list[list[tuple[array, array]]]:
        rendered = [
            [render(self.template, sample, turns, self.image_tokens > 0) for turns in (sample.turns, *sample.alternatives)]
            for sample in samples
        ]
        texts: dict[str, list[int]] = {}
        for turns in (turns for alternatives in rendered for turns in alternatives):
            for pieces, response in turns:
                texts.update(dict.fromkeys(p for p in pieces if p is not IMAGE))
                texts[pieces[-1] + response] = []
        for text, ids in zip(texts, encode_texts(self.tokenizer, list(texts))):
            texts[text] = ids
        return [[self._join(turns, texts) for turns in alternatives] for alternatives in rendered]

    def _join(self, turns: list, texts: dict[str, list[int]]) -> tuple[array, array]:
        ids, kinds = array("i", [self.tokenizer.bos_token_id]), array("b", [_PROMPT])

        def add(more: list[int], kind: int) -> None:
            ids.extend(more)
            kinds.extend([kind] * len(more))

        for number, (pieces, response) in enumerate(turns, 1):
            for piece in pieces[:-1]:
                if piece is IMAGE:
                    add([self.tokenizer.pad_token_id] * self.image_tokens, _IMAGE)
                else:
                    add(texts[piece], _PROMPT)
            prompt, whole = texts[pieces[-1]], texts[pieces[-1] + response]
            if self.prompts_only and number == len(turns):
                add(prompt, _PROMPT)
                return ids, kinds
            same = _common_prefix(prompt, whole)
            add(whole[:same], _PROMPT)
            add([*whole[same:], self.tokenizer.eos_token_id], _RESPONSE)
        return ids, kinds

    def _drawn(self, index: int) -> int:
        n = len(self._encoded[index])
        return random.Random(f"turns {self.seed} {self.epoch} {index}").randrange(n) if n > 1 else 0

    @property
    def notes(self) -> list[str]:
        where = "within their question" if self.prompts_only else "at their end"
        cut = [f"{self.cut} {'prompts' if self.prompts_only else 'samples'} cut to max_length={self.max_length} {where}"]
        return super().notes + (cut if self.cut else [])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, of the longest of its alternatives."""
        return [max(len(ids) for ids, _ in encoded) for encoded in self._encoded]

    def text_item(self, index: int) -> dict:
        """`dataset[index]` without its image."""
        return self._item(index)

    def _item(self, index: int) -> dict:
        ids, kinds = (torch.tensor(values, dtype=torch.int64) for values in self._encoded[index][self._drawn(index)])
        item = {"sample": self.samples[index], "input_ids": ids}
        if not self.prompts_only:
            item["labels"] = ids.masked_fill(kinds != _RESPONSE, IGNORE_INDEX)
        if self.image_tokens:
            item["image_mask"] = kinds == _IMAGE
        return item

    def collator(self, share: bool = False) -> CausalCollator:
        """``share``: what samples of a batch begin with is there once, for models that take "prefix_lengths"."""
        side = "left" if self.prompts_only else "right"
        return CausalCollator(self.tokenizer.pad_token_id, packed=self.packed, padding_side=side, share=share and not self.prompts_only)

    @staticmethod
    def weight(batch: dict) -> int:
        """Labelled tokens: what a causal model's loss is a mean over (a sample's first token never is one)."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    @staticmethod
    def terms(labelled: int) -> int:
        return labelled

    @staticmethod
    def tokens(batch: dict) -> int:
        """Of its samples: those that several share count for each."""
        if "attention_mask" in batch:
            return int(batch["attention_mask"].sum())
        return batch["input_ids"].shape[1] + int(sum(batch.get("prefix_lengths", ())))

    def describe(self) -> dict:
        return describe_prompts(self.template, self.max_length, self.image_tokens, self.preprocess, self.reading)

    def save(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def _common_prefix(some: Sequence[int], others: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others)))


def describe_prompts(
    template: str, max_length: int, image_tokens: int, preprocess: Preprocess | None = None, reading: dict | None = None
) -> dict:
    """The entries of an adapter's description about the samples it was trained on."""
    images = {} if preprocess is None else {"preprocess": preprocess.to_dict()}
    prompt = {"template": template, "max_length": max_length, "image_tokens": image_tokens} | (reading or {})
    return {**images, "tokenizer": "tokenizer", "prompt": prompt}
