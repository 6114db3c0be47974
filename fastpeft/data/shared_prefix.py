"""Samples of a batch that begin alike, laid out so that what they share is there once; and a collator that does so for any model.

A sample goes on from the one before it: of the tokens that both begin with, a row holds those of the first alone, then each one's own, with
positions that count on. Under causality what lies before a token does not depend on what follows, so losses and gradients are those of the
samples alone; with dropout, a shared token draws once. B = samples of a batch, T = tokens of a row, R = rows, L = tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpeft.labels import IGNORE_INDEX
from fastpeft.ops.tree_attention import PrefixTree

WORTH = 16  # tokens that a prefix must save over all who share it: with fewer, its product of attention costs as much
PAYS = 0.05  # of a batch's tokens: sharing fewer changes a batch's form for nothing


class Sharing(NamedTuple):
    """``order`` [B]: samples, depth first; ``lengths`` [B], in that order: how many first tokens each shares with the one before."""

    order: tuple[int, ...]
    lengths: tuple[int, ...]

    def saved(self) -> int:
        """Tokens that are not there again."""
        return sum(self.lengths)

    def pays(self, tokens: Sequence[int]) -> bool:
        """Whether enough of the samples' ``tokens`` are saved for a batch of another form."""
        return self.saved() >= PAYS * sum(tokens) > 0

    def none(self) -> Sharing:
        """The same samples, sharing nothing."""
        return Sharing(self.order, (0,) * len(self.order))


def share(tokens: Sequence[Sequence[int]], limits: Sequence[int], roots: Sequence[Hashable] = (), worth: int = WORTH) -> Sharing:
    """How samples share what they begin with: ``tokens`` of each, compared as whole numbers; ``limits``: the most that each may share;
    ``roots``: those that differ here share nothing. A prefix that saves fewer than ``worth`` tokens is not shared. An image's tokens, all
    the same number below zero, are shared whole or not at all."""
    rows = [np.asarray(sample, dtype=np.int64) for sample in tokens]
    names = {root: i for i, root in enumerate(dict.fromkeys(roots))}
    groups = [names[root] for root in roots] if roots else [0] * len(rows)
    keys = [row.astype(">u8").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (groups[i], keys[i], limits[i]))
    lengths = [0] * len(rows)
    for at, (one, other) in enumerate(pairwise(order), 1):
        if groups[one] == groups[other]:
            most = min(_alike(rows[one], rows[other]), limits[other], len(rows[one]) - 1, len(rows[other]) - 1)
            lengths[at] = _outside_images(rows[other], max(0, most))
    return Sharing(tuple(order), tuple(_worth_it(lengths, worth)))


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def _outside_images(row: np.ndarray, length: int) -> int:
    """``length``, or less, so that no image is divided."""
    while 0 < length < len(row) and row[length] < 0 and row[length] == row[length - 1]:
        length -= 1
    return length


def _worth_it(lengths: list[int], worth: int) -> list[int]:
    """``lengths`` without the prefixes that save too little: those samples share what all of them share."""
    found, waiting = list(lengths), [(1, len(lengths), 0)]
    while waiting:
        first, last, base = waiting.pop()
        if first >= last:
            continue
        least = min(lengths[first:last])
        depth = least if (least - base) * (last - first) >= worth else base
        ends = [first - 1, *(i for i in range(first, last) if lengths[i] == least), last]
        for i in ends[1:-1]:
            found[i] = depth
        waiting += [(a + 1, b, depth) for a, b in pairwise(ends)]
    return found


def most_shared(labels: Sequence[int] | Tensor | None, tokens: int) -> int:
    """The most that a sample may share: its labels are predicted from tokens of its own."""
    if labels is None:
        return tokens - 1
    labelled = (torch.as_tensor(labels)[1:] != IGNORE_INDEX).nonzero()
    return int(labelled[0]) if len(labelled) else tokens - 1


def with_images(ids: Tensor, places: Tensor | None, image: int) -> np.ndarray:
    """Token ids [n], an image's number in its ``places`` [n]: below zero, as no token's."""
    ids = ids.numpy()
    return ids if places is None else np.where(places.numpy(), -1 - image, ids)


def image_once(inputs: dict[str, Tensor], tokens: int, per_image: int) -> dict[str, Tensor]:
    """Samples [B, L] that begin with an image's ``tokens``, in one row where these are once for ``per_image`` of them; {} where that cannot
    be."""
    labels = inputs["labels"]
    batch, length = labels.shape
    if per_image == 1 or not most_shared(labels[0], length) >= tokens:
        return {}
    lengths = torch.where(torch.arange(batch) % per_image == 0, 0, tokens)
    positions = torch.arange(length).expand(batch, length)
    own = positions >= lengths[:, None]
    rows = {name: inputs[name][own][None] for name in ("input_ids", "labels", "image_mask")}
    return rows | {"position_ids": positions[own][None], "prefix_lengths": lengths}


class Saved(NamedTuple):
    """Over batches: ``tokens`` of their samples; ``shared``, those not computed; ``repeated``, an image's tokens computed once more, as
    something else comes before them."""

    tokens: int = 0
    shared: int = 0
    repeated: int = 0

    def and_of(self, sharing: Sharing, tokens: Sequence[np.ndarray]) -> Saved:
        """With one more batch, of samples ``tokens`` in the order before sharing."""
        seen, repeated = set(), 0
        for index, length in zip(sharing.order, sharing.lengths):
            own = tokens[index][length:]
            images, counts = np.unique(own[own < 0], return_counts=True)
            repeated += sum(int(n) for image, n in zip(images, counts) if int(image) in seen)
            seen.update(map(int, images))
        return Saved(self.tokens + sum(map(len, tokens)), self.shared + sharing.saved(), self.repeated + repeated)

    def note(self) -> str:
        """What to tell of a run; '' where there is nothing to tell."""
        if not self.tokens:
            return ""
        said = [f"samples of a batch share what they begin with: {self.shared / self.tokens:.0%} fewer tokens"] if self.shared else []
        if self.repeated >= PAYS * self.tokens:
            alone = "" if said else "samples of a batch share nothing: "
            more = f"{alone}{self.repeated / self.tokens:.0%} of the tokens are an image's, computed again as its question comes first"
            said.append(f"{more}; a template with the image first would share them")
        return "; ".join(said)


class SharedPrefixCollator:
    """Samples to rows in which a common beginning is there once, for any causal model of transformers that takes ``attention_mask`` of
    four dimensions and ``position_ids``; :class:`transformers.Trainer` takes it as ``data_collator``.

    Items are mappings with "input_ids" and "labels" (lists or tensors of n), and where there is an image "pixel_values" (one tensor per
    sample; ``image_token_id`` marks its places in the ids). Samples share what they begin with: ids, and images of the same content. Of
    four questions about an image that all begin with it, a row holds the image once.

    A batch: input_ids, labels, position_ids int64 [R, L]; attention_mask [R, 1, L, L], True = attend, or with ``mask_dtype`` a floating
    dtype numbers to add (eager attention takes no others; SDPA those of its own dtype or True and False); pixel_values of the images whose
    places are in the rows, in their order. R rows, one for each beginning, filled up with ``pad_token_id``. The loss of a model is the mean
    over labelled tokens, as of the samples in rows of their own.

    worth: tokens that a common beginning must save. ``saved`` counts what was, so far; ``saved.note()`` says it, and what another template
    would save.
    Not for models with windows of attention narrower than a sample, convolutions or recurrent layers: these look past a mask.
    Other keys of an item are refused (ValueError): nobody knows how they go into a row.
    """

    def __init__(
        self, pad_token_id: int = 0, *, image_token_id: int | None = None, mask_dtype: torch.dtype = torch.bool, worth: int = WORTH
    ):
        if mask_dtype != torch.bool and not mask_dtype.is_floating_point:
            raise ValueError(f"mask_dtype={mask_dtype}: use torch.bool or a floating dtype")
        self.pad_token_id, self.image_token_id, self.mask_dtype, self.worth = pad_token_id, image_token_id, mask_dtype, worth
        self.saved = Saved()

    def __call__(self, items: Sequence[dict]) -> dict[str, Tensor]:
        samples = [self._checked(item) for item in items]
        images = _numbered([sample.get("pixel_values") for sample in samples])
        places = [self._places(sample) for sample in samples]
        tokens = [with_images(sample["input_ids"], place, image) for sample, place, image in zip(samples, places, images)]
        limits = [most_shared(sample["labels"], len(sample["input_ids"])) for sample in samples]
        order, lengths = sharing = share(tokens, limits, worth=self.worth)
        self.saved = self.saved.and_of(sharing, tokens)
        rows = [_Row() for n in lengths if n == 0]
        row, seen = -1, []
        for index, length in zip(order, lengths):
            row += length == 0
            rows[row].add(samples[index], length)
            if places[index] is not None and bool(places[index][length:].any()):
                seen.append(samples[index]["pixel_values"])
        batch = self._filled_up(rows)
        return batch | ({"pixel_values": torch.stack(seen)} if seen else {})

    def _checked(self, item: dict) -> dict[str, Tensor]:
        known = ("input_ids", "labels", "pixel_values")
        item = {name: value for name, value in item.items() if value is not None}
        mask = item.pop("attention_mask", None)
        if unknown := sorted(set(item) - set(known)):
            raise ValueError(f"SharedPrefixCollator knows {', '.join(known)} of an item, not {', '.join(unknown)}: leave them out")
        if missing := [name for name in known[:2] if name not in item]:
            raise ValueError(f"an item has no {' and no '.join(missing)}")
        sample = {name: torch.as_tensor(value) for name, value in item.items()}
        if sample["input_ids"].dim() != 1 or sample["input_ids"].shape != sample["labels"].shape or not len(sample["input_ids"]):
            raise ValueError(
                f"an item's input_ids {tuple(sample['input_ids'].shape)} and labels {tuple(sample['labels'].shape)} are not both [n]"
            )
        if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
            raise ValueError("an item is padded (its attention_mask has zeros): give samples without padding")
        return sample

    def _places(self, sample: dict[str, Tensor]) -> Tensor | None:
        """Of a sample's image in its ids [n], None where it has none. Without places an image may be seen from any token: refused."""
        if "pixel_values" not in sample:
            return None
        places = sample["input_ids"] == (-1 if self.image_token_id is None else self.image_token_id)
        if not bool(places.any()):
            raise ValueError("an item has pixel_values and no places for them in its input_ids: say their token (image_token_id=)")
        return places

    def _filled_up(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        longest = max(len(row.ids) for row in rows)
        shape = len(rows), longest
        batch = {"input_ids": torch.full(shape, self.pad_token_id), "labels": torch.full(shape, IGNORE_INDEX)}
        batch["position_ids"] = torch.zeros(shape, dtype=torch.int64)
        allowed = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
        for i, row in enumerate(rows):
            n = len(row.ids)
            for name, values in (("input_ids", row.ids), ("labels", row.labels), ("position_ids", row.positions)):
                batch[name][i, :n] = torch.tensor(values)
            allowed[i, :n, :n] = PrefixTree((*row.starts, n), tuple(row.shared)).mask()
        if self.mask_dtype != torch.bool:
            allowed = torch.zeros(allowed.shape, dtype=self.mask_dtype).masked_fill_(~allowed, torch.finfo(self.mask_dtype).min)
        return batch | {"attention_mask": allowed[:, None]}


class _Row:
    """One row while samples come into it."""

    def __init__(self):
        self.ids, self.labels, self.positions, self.starts, self.shared = [], [], [], [], []

    def add(self, sample: dict[str, Tensor], shared: int) -> None:
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        self.starts.append(len(self.ids))
        self.shared.append(shared)
        self.ids += ids[shared:]
        self.labels += [IGNORE_INDEX, *labels[shared + 1 :]]  # what comes before it in the row is another sample's
        self.positions += range(shared, len(ids))


def _numbered(images: Sequence[Tensor | None]) -> list[int]:
    """Of each image its number, the same for the same content; -1 for none."""
    known: list[Tensor] = []
    numbers = []
    for image in images:
        if image is None:
            numbers.append(-1)
            continue
        found = next((i for i, other in enumerate(known) if other is image or torch.equal(other, image)), len(known))
        if found == len(known):
            known.append(image)
        numbers.append(found)
    return numbers
