"""Collator and sampler for causal language models: padded or packed batches, and batches of similar lengths.

B = samples in a batch, L = tokens of the longest, T = tokens of all, U = distinct images, S = image size.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice

import numpy as np
import torch

from fastpeft.data.dataset import batch_images
from fastpeft.data.shared_prefix import WORTH, Saved, Sharing, most_shared, share, with_images
from fastpeft.data.vqa import EpochSampler
from fastpeft.labels import IGNORE_INDEX


class CausalCollator:
    """Items of a `CausalDataset` to one batch, text-only and image-text samples mixed, a dict of

    padded: input_ids, attention_mask, labels int64 [B, L], labels -100 at padding and on prompts; on the "right", or for
    generation on the "left"; L a multiple of `multiple_of`.
    packed: input_ids, position_ids, labels int64 [1, T], samples end to end without padding, positions from 0 in each, each
    one's first label -100; cu_seqlens int32 [B+1], where each begins and all end; max_seqlen, the longest (an int); no mask.
    shared (``share``, where it saves a twentieth of the tokens): as packed, samples in another order and without the tokens that they share
    with the one before them, whose number is prefix_lengths int64 [B]; positions count on from there
    (:mod:`fastpeft.data.shared_prefix`).
    all: images, image_index int64 [B] (-1: no image), pixel_values float32 [U, 3, S, S] as `batch_images`; image_mask bool like
    input_ids, where items have it; samples.
    """

    def __init__(
        self, pad_token_id: int, packed: bool = False, padding_side: str = "right", multiple_of: int = 1, share: bool = False
    ):
        if padding_side not in ("left", "right") or multiple_of < 1:
            raise ValueError(f'padding_side={padding_side!r}, multiple_of={multiple_of}: use "left" or "right", and 1 or more')
        self.pad_token_id, self.packed, self.padding_side, self.multiple_of = pad_token_id, packed, padding_side, multiple_of
        self.share = share

    def __call__(self, items: Sequence[dict]) -> dict:
        sharing = sharing_of(items)[0] if self.share and len(items) > 1 else None
        if sharing is not None and sharing.pays([len(item["input_ids"]) for item in items]):
            items = [items[i] for i in sharing.order]
            return self._packed(items, sharing.lengths) | {"prefix_lengths": torch.tensor(sharing.lengths)} | self._of_samples(items)
        if self.packed:
            return self._packed(items, [0] * len(items)) | self._of_samples(items)
        lengths = [len(item["input_ids"]) for item in items]
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "image_mask": False}
        columns = {name: [item[name] for item in items] for name in fills if name in items[0]}
        columns["attention_mask"] = [torch.ones(n, dtype=torch.int64) for n in lengths]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        batch = {name: torch.stack([self._pad(row, width, fills.get(name, 0)) for row in rows]) for name, rows in columns.items()}
        return batch | self._of_samples(items)

    @staticmethod
    def _packed(items: Sequence[dict], shared: Sequence[int]) -> dict:
        """One row of the items' tokens, each without its first ``shared``."""
        names = [name for name in ("input_ids", "labels", "image_mask") if name in items[0]]
        batch = {name: torch.cat([item[name][n:] for item, n in zip(items, shared)])[None] for name in names}
        ends = [len(item["input_ids"]) for item in items]
        lengths = [end - n for end, n in zip(ends, shared)]
        starts = [0, *accumulate(lengths)]
        if "labels" in batch:
            batch["labels"][0, starts[:-1]] = IGNORE_INDEX
        batch["position_ids"] = torch.cat([torch.arange(n, end) for n, end in zip(shared, ends)])[None]
        return batch | {"cu_seqlens": torch.tensor(starts, dtype=torch.int32), "max_seqlen": max(lengths)}

    @staticmethod
    def _of_samples(items: Sequence[dict]) -> dict:
        return {**batch_images(items), "samples": [item["sample"] for item in items]}

    def _pad(self, row: torch.Tensor, width: int, fill) -> torch.Tensor:
        more = width - len(row)
        return torch.nn.functional.pad(row, (more, 0) if self.padding_side == "left" else (0, more), value=fill)


def sharing_of(items: Sequence[dict], worth: int = WORTH) -> tuple[Sharing, list[np.ndarray]]:
    """How items of a `CausalDataset` share what they begin with, and the tokens that were compared: ids, and images by their files. Where
    an image has no places in the text, every token may see it: then samples on one image alone share."""
    images = {path: i for i, path in enumerate(dict.fromkeys(item["sample"].image for item in items))}
    tokens, limits, roots = [], [], []
    for item in items:
        places, image = item.get("image_mask"), item["sample"].image
        tokens.append(with_images(item["input_ids"], places, images[image]))
        limits.append(most_shared(item.get("labels"), len(item["input_ids"])))
        roots.append((image is not None, None if places is not None else image))
    return share(tokens, limits, roots, worth), tokens


def common_prefix(items: Sequence[dict]) -> int:
    """How many first tokens all of the items begin with; each has more."""
    sharing, _ = sharing_of(items, worth=1)
    return min(sharing.lengths[1:], default=0)


def sharing_note(data, batches: Iterable[Sequence[int]], most: int = 20) -> str:
    """What the first batches of a `CausalDataset` save by sharing, to tell of a run."""
    saved = Saved()
    for indices in islice(batches, most):
        sharing, tokens = sharing_of([data.text_item(index) for index in indices])
        saved = saved.and_of(sharing if sharing.pays(list(map(len, tokens))) else sharing.none(), tokens)
    return saved.note()


class LengthGroupedSampler(EpochSampler):
    """An `EpochSampler` whose batches hold samples of like length, so that padding is short; for padded batches.

    The epoch's order is divided into pools of `pool` batches; each pool is sorted by length and divided into batches; then all batches are
    shuffled. A smaller `pool` is nearer to plain shuffling. `data` is a data set with `samples` and `lengths`. Each sample comes
    once per epoch. Within a batch lengths are similar, so its expected gradient differs from a plain batch's; the epoch's does not.
    """

    def __init__(self, data, batch_size: int, seed: int = 0, pool: int = 50, drop_last: bool = False):
        super().__init__(data, batch_size, seed, drop_last=drop_last)
        if pool < 1:
            raise ValueError(f"pool={pool}: use a whole number of batches, 1 or more")
        self.pool, self.lengths = pool, data.lengths

    def identity(self) -> dict:
        return super().identity() | {"pool": self.pool}

    def _order(self, draw: random.Random) -> list[int]:
        order, size = super()._order(draw), self.batch_size * self.pool
        pools = [sorted(order[i : i + size], key=self.lengths.__getitem__, reverse=True) for i in range(0, self.n, size)]
        order = [i for pool in pools for i in pool]
        batches = [order[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a shorter one stays last
        draw.shuffle(batches)
        return [i for batch in batches + last for i in batch]
