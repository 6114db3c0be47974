"""Data set of instructions for causal language models, with labels on responses only. n = tokens of a sample, S = image size."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from fastpeft.data.causal_batches import CausalCollator
from fastpeft.data.causal_tokenizer import encode_texts
from fastpeft.data.dataset import SampleDataset
from fastpeft.data.images import Preprocess
from fastpeft.data.prompts import BOS, IMAGE, Piece, Token, check_place, ending, frame, render
from fastpeft.data.samples import Instruction, Turns
from fastpeft.data.tokenizer import save_tokenizer
from fastpeft.labels import IGNORE_INDEX

_CHUNK = 4096  # samples tokenised at once
_PROMPT, _RESPONSE, _IMAGE = range(3)  # kinds of token
_EOS = Token("</s>")  # the tokenizer's own, whatever its text


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
        image_place: str | None = None,
        image_around: tuple[str, str] | None = None,
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
        check_place(template, image_place)
        self.template, self.max_length, self.image_tokens = template, max_length, image_tokens
        self.image_place, self.image_around, self.ending = image_place, image_around, ending(template)
        for token in image_around or ():
            if tokenizer.get_vocab().get(token) is None:
                raise ValueError(f"the model puts {token} beside an image, and the tokenizer has no such token: use the model's own")
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
        pieces = self._rendered(sample, turns)[0][0]
        words = frame(self.template, sample, turns[0][0], self.image_tokens > 0, self.image_place, self.image_around)
        at = words.piece
        closing = pieces[-1] if at < len(pieces) - 1 else None  # of an image after the question
        around = [words.before, words.before_context, words.after, closing, *filter(_is_text, pieces[: at + 1])]
        texts = list({text for text in around if text is not None})
        tokens = dict(zip(texts, encode_texts(self.tokenizer, texts)))
        start = 1 + sum(self._length(piece, tokens) for piece in pieces[:at])
        stop = len(ids) if closing is None else start + len(tokens[pieces[at]])
        asked = start + _common_prefix(tokens[words.before], ids[start:stop])  # where the question begins
        end = max(asked, stop - _common_prefix(tokens[words.after][::-1], ids[start:stop][::-1]))
        given = end  # where its context begins
        if words.before_context is not None and (len(turns) == 1 or closing is not None):
            given = min(max(asked, start + _common_prefix(tokens[words.before_context], ids[start:])), end)
        over = len(ids) - self.max_length
        if over <= end - asked:
            of_context = min(over, end - given)
            cuts = [(given, of_context), (asked, over - of_context)]  # the later first
        elif _IMAGE not in kinds:
            cuts = [(1, over)]
        elif closing is not None:
            return self._cut_around_image(over, end, tokens[closing], ids, kinds)
        elif start + len(ids) - end <= self.max_length:
            cuts = [(start, over)]
        else:
            return None
        for begin, count in cuts:
            del ids[begin : begin + count], kinds[begin : begin + count]
        return ids, kinds

    def _cut_around_image(self, over: int, end: int, closing: list[int], ids: array, kinds: array) -> tuple[array, array] | None:
        """Of a prompt whose image follows the question: what is left of a later turn goes from its beginning, and then the words before the
        image; bos, the image and the last words stay."""
        seen = len(kinds) - kinds[::-1].index(_IMAGE) + (self.image_around is not None)
        later = max(seen, len(ids) - _common_prefix(closing[::-1], ids[::-1]))
        first = min(over, end - 1)
        rest = over - first
        if rest > later - seen:
            return None
        for begin, count in ((seen, rest), (1, first)):
            del ids[begin : begin + count], kinds[begin : begin + count]
        return ids, kinds

    def _length(self, piece: Piece, tokens: dict[str, list[int]]) -> int:
        return self.image_tokens if piece is IMAGE else 1 if isinstance(piece, Token) else len(tokens[piece])

    def _rendered(self, sample: Instruction, turns: Turns) -> list[tuple[list[Piece], str]]:
        return render(self.template, sample, turns, self.image_tokens > 0, self.image_place, self.image_around)

    def _encode(self, samples: Sequence[Instruction]) -> list[list[tuple[array, array]]]:
        read = [[self._runs(self._rendered(s, turns)) for turns in (s.turns, *s.alternatives)] for s in samples]
        texts: dict[str, list[int]] = dict.fromkeys(
            text for runs in (runs for alternatives in read for runs in alternatives) for run in runs for text in _cumulative(run)
        )
        for text, ids in zip(texts, encode_texts(self.tokenizer, list(texts))):
            texts[text] = ids
        return [[self._join(runs, texts) for runs in alternatives] for alternatives in read]

    def _runs(self, turns: list[tuple[list[Piece], str]]) -> list[list[tuple[Piece, int]]]:
        """Pieces and responses with their kinds; those in one list are tokenised as one text."""
        runs: list[list[tuple[Piece, int]]] = []
        goes_on = False  # whether the text of the turn before does
        for number, (pieces, response) in enumerate(turns, 1):
            for piece in pieces:
                if goes_on and _is_text(piece):
                    runs[-1].append((piece, _PROMPT))
                else:
                    runs.append([(piece, _IMAGE if piece is IMAGE else _PROMPT)])
                goes_on = False
            if self.prompts_only and number == len(turns):
                break
            runs[-1].append((response + self.ending.text, _RESPONSE))
            if self.ending.eos:
                runs.append([(_EOS, _RESPONSE)])
            goes_on = not self.ending.eos
        return runs

    def _join(self, runs: list[list[tuple[Piece, int]]], texts: dict[str, list[int]]) -> tuple[array, array]:
        ids, kinds = array("i", [self.tokenizer.bos_token_id]), array("b", [_PROMPT])

        def add(more: list[int], kind: int) -> None:
            ids.extend(more)
            kinds.extend([kind] * len(more))

        for run in runs:
            piece, kind = run[0]
            if not _is_text(piece):
                add([self.tokenizer.pad_token_id] * self.image_tokens if piece is IMAGE else [self._id(piece)], kind)
                continue
            parts, done = _cumulative(run), 0
            whole = texts[parts[-1]]
            for (_, kind), text in zip(run, parts):
                upto = len(whole) if text is parts[-1] else max(done, _common_prefix(texts[text], whole))
                add(whole[done:upto], kind)
                done = upto
        return ids, kinds

    def _id(self, token: Token) -> int:
        own = {BOS: self.tokenizer.bos_token_id, _EOS: self.tokenizer.eos_token_id}
        return own[token] if token in own else self.tokenizer.get_vocab()[token]

    def _drawn(self, index: int) -> int:
        n = len(self._encoded[index])
        if self.prompts_only and self.samples[index].kind == "reports":
            return 0  # whatever was drawn in training, one wording asks
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
        return describe_prompts(self.template, self.max_length, self.image_tokens, self.preprocess, self.reading, self.image_place)

    def save(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def _is_text(piece: Piece) -> bool:
    return piece is not IMAGE and not isinstance(piece, Token)


def _cumulative(run: list[tuple[Piece, int]]) -> list[str]:
    """The beginnings of a run's text, as far as each of its pieces; none where it is no text."""
    if not _is_text(run[0][0]):
        return []
    return list(accumulate(piece for piece, _ in run))


def _common_prefix(some: Sequence[int], others: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others)))


def describe_prompts(
    template: str,
    max_length: int,
    image_tokens: int,
    preprocess: Preprocess | None = None,
    reading: dict | None = None,
    image_place: str | None = None,
) -> dict:
    """The entries of an adapter's description about the samples it was trained on."""
    images = {} if preprocess is None else {"preprocess": preprocess.to_dict()}
    prompt = {"template": template, "max_length": max_length, "image_tokens": image_tokens} | (reading or {})
    prompt |= {} if image_place is None else {"image_place": image_place}
    return {**images, "tokenizer": "tokenizer", "prompt": prompt}
