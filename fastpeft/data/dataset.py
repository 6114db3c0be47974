"""Base class of data sets: random choices by seed and epoch, and a bounded cache of decoded images."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import Dataset

from fastpeft.data.images import ImageCache, Preprocess, allowed_pixels
from fastpeft.labels import IGNORE_INDEX


class SampleDataset(Dataset):
    """Samples, whose `image` is a path or None, and what turns them into batches.

    Choices are drawn from (seed, epoch, index) and nothing else: the same in any process, order or resumed run. `set_epoch`
    reaches data loader workers that are already running. Decoded images are kept as uint8 in `cache`, up to `cache_bytes` (in
    each worker its own). With `load_images` False no image is touched, for trainers that hold the images' features; `pixels`
    then gives a single one. A data set adds `_item(index)`: an item without its pixels, with its "sample".
    """

    def __init__(self, samples: Sequence, preprocess: Preprocess | None, seed: int, cache_bytes: int, tokenizer):
        if not len(samples):
            raise ValueError("a data set needs at least one sample")
        self.samples, self.preprocess, self.seed, self.tokenizer = samples, preprocess, seed, tokenizer
        self.source_weights: dict[str, float] = dict(getattr(samples, "weights", {}))  # of mixed data sets
        self.cache = ImageCache(cache_bytes)
        self.skipped: dict[str, int] = {}  # samples left out, by reason
        self.load_images, self.max_pixels = True, allowed_pixels()  # of an image; kept, for workers that are no copies of this process
        self._image_keys: dict[Path, str] = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared, for workers kept alive across epochs

    @property
    def epoch(self) -> int:
        """The epoch that random choices are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draws random choices for another epoch from now on."""
        self._epoch.fill_(epoch)

    def seeded(self, seed: int, tokenizer=None) -> SampleDataset:
        """The same samples, whose choices are drawn by another seed: what is encoded and decoded of them is shared. ``tokenizer``: a copy
        of this one, to use instead."""
        other = copy.copy(self)
        other.seed, other.tokenizer, other._epoch = seed, tokenizer or self.tokenizer, torch.zeros((), dtype=torch.int64).share_memory_()
        return other

    @property
    def notes(self) -> list[str]:
        """Messages about samples that were left out or cut."""
        return [f"{count} samples left out: {reason}" for reason, count in self.skipped.items()]

    def image_digest(self) -> str:
        """Of the contents of the samples' images, in their order: 32 hexadecimal digits. Reads every file once."""
        whole = hashlib.blake2b(digest_size=16)
        for path in dict.fromkeys(sample.image for sample in self.samples if sample.image is not None):
            try:
                whole.update(self.image_key(path).encode())
            except OSError:  # whoever needs the image says so
                whole.update(b"unreadable")
        return whole.hexdigest()

    def image_key(self, path: Path) -> str:
        """Of an image file's content, wherever it lies: 32 hexadecimal digits. Read at the first call; OSError where it cannot be."""
        if path not in self._image_keys:
            self._image_keys[path] = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        return self._image_keys[path]

    def labelled(self, batch: dict) -> list[int]:
        """How many labelled tokens of each of a batch's samples the loss adds up; a first token never is one."""
        labels = batch["labels"] != IGNORE_INDEX
        if "cu_seqlens" in batch:
            return [int(labels[0, a:b].sum()) for a, b in pairwise(batch["cu_seqlens"].tolist())]
        return labels[:, 1:].sum(1).tolist()

    def identity(self) -> dict:
        """What, beside the samples, must not change between a run and its resumption."""
        return {}

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, path: Path) -> torch.Tensor:
        """float32 [3, S, S] of one image, through the cache. ValueError naming the file where it can't be decoded."""
        return self.preprocess.scale(self.cache.get(path, lambda: self.preprocess.pixels(path, self.max_pixels)))

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several at once, as data loaders ask for them: items of one image share its tensor."""
        images, items = {}, []
        for index in indices:
            item = self._item(range(len(self))[index])  # -1 is the last, and asks what it asks
            path = item["sample"].image
            if self.load_images and self.preprocess is not None and path is not None:
                if path not in images:
                    images[path] = self.pixels(path)
                item["pixel_values"] = images[path]
            items.append(item)
        return items


def batch_images(items: Sequence[dict]) -> dict:
    """{"images", "image_index", "pixel_values"} of a batch: the U distinct paths in order of appearance; int64 [B], each item's
    place among them, -1 where it has no image; float32 [U, 3, S, S] (absent where no item carries pixels)."""
    first: dict[Path, dict] = {}  # each image's first item
    for item in items:
        if item["sample"].image is not None:
            first.setdefault(item["sample"].image, item)
    place = {path: u for u, path in enumerate(first)}
    index = torch.tensor([place.get(item["sample"].image, -1) for item in items], dtype=torch.int64)
    batch = {"images": list(first), "image_index": index}
    if first and all("pixel_values" in item for item in first.values()):
        batch["pixel_values"] = torch.stack([item["pixel_values"] for item in first.values()])
    return batch
