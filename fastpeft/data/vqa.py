"""Data set, collator and sampler for visual question answering, where a batch holds each distinct image once.

B = questions in a batch, U = distinct images among them, S = image size, L_q, L_a = tokens of the longest question and answer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import Sampler

from fastpeft.data.dataset import SampleDataset, batch_images
from fastpeft.data.images import Preprocess
from fastpeft.data.instruct import until_options_end
from fastpeft.data.samples import Sample
from fastpeft.data.tokenizer import MAX_QUESTION, encode_answers, encode_questions, save_tokenizer


class VQADataset(SampleDataset):
    """Samples with their images: `dataset[i]` is {"sample": Sample, "question": str, "pixel_values": float32 [3, S, S]}.

    Where a sample has a question pool, each access asks one of its phrasings, drawn from (seed, epoch, index) and nothing
    else: the same in any process, order or resumed run. `set_epoch` reaches data loader workers that are already running.

    Decoded images are kept as uint8 in `cache`, up to `cache_bytes` (in each worker its own). With `load_images` False no
    image is touched and "pixel_values" is left out, for trainers that hold the images' features; `pixels(path)` then gives a
    single one. `tokenizer` is what a trainer makes batches with. `max_answer`: positions of the decoder. ValueError names a sample
    whose answer has more tokens, with `skip_bad` it is left out and counted in `.skipped`.

    The interface of any data set for a trainer: `inputs`, the names in a batch that the model takes; `collator()`; `weight(batch)`,
    the number of terms that the model's loss is a mean of; `tokens(batch)`; `describe()` and `save(folder)`, which store what an
    adapter needs to be used without the data.

    max_question: tokens of a question, [ENC] and [SEP] included; longer ones are cut. `cut_options`: samples with a phrasing whose
    answer options are cut so.
    """

    inputs = ("input_ids", "attention_mask", "pixel_values", "image_index", "decoder_input_ids", "decoder_attention_mask", "labels")

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        seed: int = 0,
        cache_bytes: int = 256 << 20,
        tokenizer=None,
        max_answer: int | None = None,
        skip_bad: bool = False,
        max_question: int = MAX_QUESTION,
    ):
        super().__init__(samples, preprocess, seed, cache_bytes, tokenizer)
        if isinstance(max_question, bool) or not isinstance(max_question, int) or max_question < 3:
            raise ValueError(f"max_question={max_question!r}: use a whole number of 3 or more: [ENC], a token and [SEP]")
        self.max_question = max_question
        answers = [] if max_answer is None else [sample.answer for sample in samples]
        too_long = [i for i, answer in enumerate(answers) if self._answer_tokens(answer, max_answer) > max_answer]
        if too_long and not skip_bad:
            bad = samples[too_long[0]]
            n = self._answer_tokens(bad.answer, max_answer)
            raise ValueError(f"{bad.source}: entry {bad.entry}: an answer of {n} tokens, and the decoder has {max_answer} positions")
        if too_long:
            self.samples = [sample for i, sample in enumerate(samples) if i not in set(too_long)]
            self.skipped = {"answer too long": len(too_long)}
            if not self.samples:
                raise ValueError(f"no answer fits the decoder's {max_answer} positions")
        self.cut_options = 0 if tokenizer is None else self._count_cut_options()

    def _count_cut_options(self) -> int:
        """WordPiece splits at spaces and punctuation first: what ends with the options has the tokens it has in the whole phrasing."""
        texts = [[text for q in sample.question_pool if (text := until_options_end(q))] for sample in self.samples]
        flat = list(dict.fromkeys(text for several in texts for text in several))
        if not flat:
            return 0
        ids = self.tokenizer(flat, add_special_tokens=False)["input_ids"]
        long = {text for text, tokens in zip(flat, ids) if len(tokens) > self.max_question - 2}
        return sum(any(text in long for text in several) for several in texts)

    @property
    def notes(self) -> list[str]:
        lost = f"{self.cut_options} of {len(self)} samples lose answer options of some phrasing at max_question={self.max_question}"
        return super().notes + ([f"{lost} (--max-question)"] if self.cut_options else [])

    def _answer_tokens(self, answer: str, limit: int) -> int:
        """An answer's tokens; not counted where there are surely fewer than `limit`, as none is longer than its characters, [DEC] and
        [SEP]. Normalisation makes up to four characters of one."""
        return 0 if 4 * len(answer) + 2 <= limit else len(self.tokenizer(answer)["input_ids"])

    def collator(self) -> VQACollator:
        return VQACollator(self.tokenizer, self.max_question)

    @staticmethod
    def weight(batch: dict) -> int:
        return len(batch["samples"])

    @staticmethod
    def terms(labelled: int) -> int:
        """Of one sample with so many labelled tokens."""
        return 1

    @staticmethod
    def tokens(batch: dict) -> int:
        return int(batch["attention_mask"].sum() + batch["decoder_attention_mask"].sum())

    def describe(self) -> dict:
        return {"preprocess": self.preprocess.to_dict(), "tokenizer": "tokenizer", "max_question": self.max_question}

    def identity(self) -> dict:
        pools = hashlib.sha256(repr([s.question_pool for s in self.samples]).encode()).hexdigest()[:16]
        return {"max_question": self.max_question} | ({"question_pools": pools} if any(s.question_pool for s in self.samples) else {})

    def save(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, folder / "tokenizer")

    def question(self, index: int) -> str:
        """The phrasing asked of sample `index` in this epoch."""
        sample = self.samples[index]
        if len(sample.question_pool) < 2:
            return sample.question
        return random.Random(f"question {self.seed} {self.epoch} {index}").choice(sample.question_pool)

    def _item(self, index: int) -> dict:
        return {"sample": self.samples[index], "question": self.question(index)}


class VQACollator:
    """Items of a `VQADataset` to one batch, a dict of

    pixel_values float32 [U, 3, S, S], distinct images in order of appearance (absent where the items carry none); images,
    their U paths; image_index int64 [B], the image of each question: pixel_values[image_index] is [B, 3, S, S]; input_ids,
    attention_mask int64 [B, L_q], questions opened by [ENC] and cut at `max_question`; decoder_input_ids,
    decoder_attention_mask int64 [B, L_a], answers opened by [DEC]; labels, the same with -100 at padding, not shifted;
    samples, the B `Sample`s.
    """

    def __init__(self, tokenizer, max_question: int = MAX_QUESTION, max_answer: int | None = None):
        self.tokenizer, self.max_question, self.max_answer = tokenizer, max_question, max_answer

    def __call__(self, items: Sequence[dict]) -> dict:
        samples = [item["sample"] for item in items]
        answers = encode_answers(self.tokenizer, [sample.answer for sample in samples], self.max_answer)
        return {
            **batch_images(items),
            **encode_questions(self.tokenizer, [item["question"] for item in items], self.max_question),
            "decoder_input_ids": answers["input_ids"],
            "decoder_attention_mask": answers["attention_mask"],
            "labels": answers["labels"],
            "samples": samples,
        }


class EpochSampler(Sampler[list[int]]):
    """A batch sampler: every sample exactly once per epoch, in an order drawn from (seed, epoch) alone.

    All batches hold `batch_size` indices, except that the last may hold fewer (`drop_last` leaves that one out).

    `questions_per_image` Q > 1 puts up to Q questions about one image side by side, in groups drawn anew each epoch, so that
    a batch of B needs about B / Q images: B / Q passes of the vision tower instead of B. A group is broken only where no
    whole group fits the room left in a batch; two groups of an image may meet by chance. Each sample still comes once per
    epoch, so a batch's expected gradient is the same, but not its noise: with a correlation c between the gradients of
    questions on one image, its variance is up to 1 + (Q - 1) c times that of B independent questions, at worst (c = 1) that
    of B / Q. A larger batch makes up for it, and the images saved pay for the batch.

    Where `data` has `source_weights`, an epoch has as many samples, of each data set its share: all of them as often as they fit, and
    for the rest some, drawn anew each epoch.

    `data` is a `VQADataset`, a sequence of samples, or, for Q = 1, a number of samples.
    """

    def __init__(self, data, batch_size: int, seed: int = 0, questions_per_image: int = 1, drop_last: bool = False):
        for name, value in (("batch_size", batch_size), ("questions_per_image", questions_per_image)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: use a whole number of 1 or more")
        if isinstance(data, int):
            if questions_per_image > 1:
                raise ValueError("questions_per_image > 1 needs the samples, not their number: their images make the groups")
            samples, groups = [], [[i] for i in range(data)]
        else:
            samples = getattr(data, "samples", data)
            by_image: dict[object, list[int]] = {}
            for i, sample in enumerate(samples):
                shared = questions_per_image > 1 and sample.image is not None  # text alone is nobody's neighbour
                by_image.setdefault(sample.image if shared else i, []).append(i)
            groups = list(by_image.values())
        self.n = sum(map(len, groups))
        self.shares = _shares(samples, getattr(data, "source_weights", {}))
        if self.n == 0 or (drop_last and self.n < batch_size):
            raise ValueError(f"{self.n} samples make no batch of {batch_size}")
        self.batch_size, self.seed, self.drop_last, self.questions_per_image = batch_size, seed, drop_last, questions_per_image
        self.epoch, self.start_batch = 0, 0
        self._samples, self._groups = samples, groups

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The epoch to draw next, from batch `start_batch` on: how a run stopped within an epoch goes on."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch}: an epoch has {len(self)} batches")
        self.epoch, self.start_batch = epoch, start_batch

    def identity(self) -> dict:
        """What the order of batches depends on, JSON-able: a run resumes where it stopped only if none of it has changed."""
        digest = hashlib.sha256(repr([(s.image_name, s.question, s.answer) for s in self._samples]).encode()).hexdigest()[:16]
        names = ("n", "batch_size", "seed", "questions_per_image", "drop_last")
        shares = {"shares": {name: count for name, (_, count) in self.shares.items()}} if self.shares else {}
        return {name: getattr(self, name) for name in names} | {"samples": digest} | shares

    def __len__(self) -> int:
        """Batches in a whole epoch, whatever `start_batch`."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(random.Random(f"epoch {self.seed} {self.epoch}"))
        for b in range(self.start_batch, len(self)):
            yield order[b * self.batch_size : (b + 1) * self.batch_size]

    def _visits(self, draw: random.Random) -> list[int]:
        """How often each sample comes in the epoch."""
        visits = [0] * self.n
        for indices, count in self.shares.values():
            whole, rest = divmod(count, len(indices))
            more = set(draw.sample(indices, rest))
            for i in indices:
                visits[i] = whole + (i in more)
        return visits

    def _order(self, draw: random.Random) -> list[int]:
        """All indices in the epoch's order, cut into batches by their position."""
        q = min(self.questions_per_image, self.batch_size)
        visits = self._visits(draw) if self.shares else None
        chunks = []
        for group in self._groups:
            group = group if visits is None else [i for i in group for _ in range(visits[i])]
            group = draw.sample(group, len(group))
            chunks += [group[i : i + q] for i in range(0, len(group), q)]
        draw.shuffle(chunks)
        if q == 1:
            return [i for chunk in chunks for i in chunk]
        waiting = [[] for _ in range(q + 1)]  # by size, each a stack whose top comes first in the drawn order
        for rank in range(len(chunks) - 1, -1, -1):
            waiting[len(chunks[rank])].append((rank, chunks[rank]))
        order: list[int] = []
        while len(order) < self.n:
            room = self.batch_size - len(order) % self.batch_size
            fitting = [stack for stack in waiting[: room + 1] if stack]
            rank, chunk = min(fitting or [s for s in waiting if s], key=lambda stack: stack[-1][0]).pop()
            order += chunk[:room]
            if chunk[room:]:
                waiting[len(chunk) - room].append((rank, chunk[room:]))
        return order


def _shares(samples: Sequence, weights: dict[str, float]) -> dict[str, tuple[list[int], int]]:
    """{data set: (its samples' indices, how many of an epoch's samples are its)}; they add up to the number of samples."""
    if not weights:
        return {}
    own: dict[str, list[int]] = {name: [] for name in weights}
    for i, sample in enumerate(samples):
        own[sample.data].append(i)
    own = {name: indices for name, indices in own.items() if indices}
    total, reached, ends = sum(weights[name] for name in own), 0.0, [0]
    for name in own:
        reached += weights[name]
        ends.append(round(len(samples) * reached / total))
    return {name: (indices, end - start) for (name, indices), start, end in zip(own.items(), ends, ends[1:])}
