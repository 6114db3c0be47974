"""Instructions to tokens of a causal language model, labels on responses only. n = tokens of a sample, S = image size."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from fastpeft.data.causal_batches import IGNORE, CausalCollator
from fastpeft.data.causal_tokenizer import encode_texts
from fastpeft.data.dataset import SampleDataset
from fastpeft.data.images import Preprocess
from fastpeft.data.prompts import IMAGE, render
from fastpeft.data.samples import Instruction
from fastpeft.data.tokenizer import save_tokenizer

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
        max_length: longer samples are cut at the end, eos and all (LaVIN's 512 include its modality token: 511 here).
        image_tokens: N > 0 leaves N places for an image's tokens where the template has them, marked in "image_mask"; their ids
            are the padding token's. 0: the model puts the image in, or its prompts, by itself.
        packed: batches end to end instead of padded, see `CausalCollator`.
        prompts_only: for generation: ids end where the last response would begin, a long prompt loses its beginning after bos,
            and there are no labels.
        skip_bad: leave out samples whose response is cut off whole, and count them in `.skipped`, instead of ValueError.
        reading: how the samples were read, for the description alone.

    ValueError naming a sample that `max_length` leaves no response.
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
        self.prompts_only, self.packed, self.skipped, self.reading = prompts_only, packed, {}, reading
        of_images = ("image_mask", "pixel_values", "image_index") if any(sample.image for sample in samples) else ()
        self.inputs = ("input_ids", "attention_mask", "position_ids", "labels", *of_images)
        self._encoded: list[list[tuple[array, array]]] = []  # of each sample, each of its alternatives: ids, kinds of token
        kept = []
        for start in range(0, len(samples), _CHUNK):
            part = samples[start : start + _CHUNK]
            for sample, encoded in zip(part, self._encode(part)):
                fitting = prompts_only or all(_RESPONSE in kinds for _, kinds in encoded)
                if not fitting and not skip_bad:
                    where = f"{sample.source}: entry {sample.entry}"
                    raise ValueError(f"{where}: no room for a response in max_length={max_length}; raise it, or skip_bad leaves it out")
                if fitting:
                    kept.append(sample)
                    self._encoded.append(encoded)
        if len(kept) < len(samples):
            self.skipped = {"response cut off": len(samples) - len(kept)}
            self.samples = kept
        if not kept:
            raise ValueError(f"max_length={max_length} leaves no sample a response; raise it")

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
                over = len(ids) - self.max_length
                return (ids[:1] + ids[1 + over :], kinds[:1] + kinds[1 + over :]) if over > 0 else (ids, kinds)
            same = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
            add(whole[:same], _PROMPT)
            add([*whole[same:], self.tokenizer.eos_token_id], _RESPONSE)
        return ids[: self.max_length], kinds[: self.max_length]

    def _drawn(self, index: int) -> int:
        n = len(self._encoded[index])
        return random.Random(f"turns {self.seed} {self.epoch} {index}").randrange(n) if n > 1 else 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, of the longest of its alternatives."""
        return [max(len(ids) for ids, _ in encoded) for encoded in self._encoded]

    def _item(self, index: int) -> dict:
        ids, kinds = (torch.tensor(values, dtype=torch.int64) for values in self._encoded[index][self._drawn(index)])
        item = {"sample": self.samples[index], "input_ids": ids}
        if not self.prompts_only:
            item["labels"] = ids.masked_fill(kinds != _RESPONSE, IGNORE)
        if self.image_tokens:
            item["image_mask"] = kinds == _IMAGE
        return item

    def collator(self) -> CausalCollator:
        return CausalCollator(self.tokenizer.pad_token_id, packed=self.packed, padding_side="left" if self.prompts_only else "right")

    @staticmethod
    def weight(batch: dict) -> int:
        """Labelled tokens: what a causal model's loss is a mean over (a sample's first token never is one)."""
        return int((batch["labels"] != IGNORE).sum())

    @staticmethod
    def tokens(batch: dict) -> int:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].shape[1]

    def describe(self) -> dict:
        return describe_prompts(self.template, self.max_length, self.image_tokens, self.preprocess, self.reading)

    def save(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def describe_prompts(
    template: str, max_length: int, image_tokens: int, preprocess: Preprocess | None = None, reading: dict | None = None
) -> dict:
    """What an adapter's description says of the samples it was trained on."""
    images = {} if preprocess is None else {"preprocess": preprocess.to_dict()}
    prompt = {"template": template, "max_length": max_length, "image_tokens": image_tokens} | (reading or {})
    return {**images, "tokenizer": "tokenizer", "prompt": prompt}
