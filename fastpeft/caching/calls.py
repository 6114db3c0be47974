"""One call of an image encoder, taken apart by image: each image's arguments and the key it is known by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.caching.digest import row_digests
from fastpeft.fused.head.loss import OF_THE_LOSS

GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw")  # of flat patches: time, height, width of each image or video
OF_AN_IMAGE = ("image_sizes", "pixel_attention_mask", "pixel_mask", "patch_attention_mask", "spatial_shapes")  # [N, ...] beside pixels
NOT_READ = (*OF_THE_LOSS, "labels", "logits_to_keep", "use_cache")  # handed down by models, of the text


@dataclass
class Call:
    """One call, by image. ``values``: arguments by name; ``rows``: names of those that hold an entry for each image; ``sizes``: rows of
    the flat patches that each image has, or ones; ``tiles``: of each image of several tiles, how many are not
    empty; ``whole``: kept as one."""

    values: dict[str, Any]
    pixels: str
    rows: tuple[str, ...]
    sizes: list[int]
    flat: bool = False
    tiles: tuple[int, ...] = ()
    whole: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> Call | None:
        """None where there is nothing to cache."""
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name not in NOT_READ}
        name = next((name for name in values if name.startswith("pixel_values")), next(iter(tensors), None))
        if name is None or any(t.requires_grad and torch.is_grad_enabled() for t in tensors.values()):
            return None
        call = cls(values, name, (), [1], whole=True)
        return call._by_grid(tensors) or call._by_row(tensors) or call if name in tensors else call  # else a list of images, say

    def _by_grid(self, tensors: dict[str, Tensor]) -> Call | None:
        """Flat patches [P, ...] and the grid of each image [N, 3]."""
        grid, others = next((tensors[name] for name in GRIDS if name in tensors), None), tensors.keys() - {self.pixels}
        if grid is None or grid.dim() != 2 or not len(grid) or not others <= set(GRIDS):
            return None
        sizes = grid.prod(-1).tolist()
        if sum(sizes) != len(tensors[self.pixels]) or min(sizes) < 1:
            return None
        return Call(self.values, self.pixels, (self.pixels, *sorted(others)), sizes, flat=True)

    def _by_row(self, tensors: dict[str, Tensor]) -> Call | None:
        """Images [N, ...], and beside them tensors [N, ...] of what is known to belong to each."""
        pixels, others = tensors[self.pixels], tensors.keys() - {self.pixels}
        known = {*OF_AN_IMAGE}
        if (counts := tensors.get("batch_num_images")) is not None and bool((counts == 1).all()):
            known.add("batch_num_images")
        if pixels.dim() < 3 or not len(pixels) or not others <= known:
            return None
        if any(tensors[other].dim() == 0 or len(tensors[other]) != len(pixels) for other in others):
            return None
        tiled = pixels.dim() == 5 and "video" not in self.pixels  # a video's frames are all there
        tiles = tuple((pixels != 0).flatten(2).any(-1).sum(1).tolist()) if tiled else ()
        if 0 in tiles:  # Idefics3 computes an empty image where it is alone, and leaves it out elsewhere
            return None
        return Call(self.values, self.pixels, (self.pixels, *sorted(others)), [1] * len(pixels), tiles=tiles)

    def as_whole(self) -> Call:
        return Call(self.values, self.pixels, (), [1], whole=True)

    def constants(self) -> str | None:
        """What enters beside the images' own tensors. None where something cannot be told."""
        told = []
        for name, value in sorted(self.values.items()):
            if name in self.rows or name in NOT_READ:
                continue
            if (text := as_text(value)) is None:
                return None
            told.append(f"{name}={text}")
        kind = self.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return f"{told} {cast} {self.pixels if self.whole else ''}"

    @property
    def device(self) -> torch.device:
        return next((value.device for value in self.values.values() if isinstance(value, Tensor)), torch.device("cpu"))

    def keys(self, constants: str) -> list[str]:
        """One for each image. The host waits for the digests, if a device computes them."""
        if self.whole:
            return [digest_of_text(constants)]
        drop = 2 if self.tiles else 1
        parts = []
        for name in self.rows:
            value, grids = self.values[name], name in GRIDS
            about = f"{name} {value.dtype} {tuple(value.shape[1 if self.flat or grids else min(drop, value.dim()) :])}"
            digests = row_digests(value if grids or not self.flat else self._by_image(value))
            parts.append([about.encode() + digest for digest in digests])
        return [digest_of_text(constants, *parts_of_one) for parts_of_one in zip(*parts)]

    def _by_image(self, patches: Tensor) -> Tensor:
        """[images, most patches, ...]: zeros at the end enter no digest, sizes do."""
        return nn.utils.rnn.pad_sequence(patches.split(self.sizes), batch_first=True)

    def only(self, images: list[int]) -> Call:
        """The call for some of the images."""
        index = torch.tensor(images)
        values = dict(self.values)
        for name in self.rows:
            value = values[name]
            if self.flat and name == self.pixels:
                pieces = value.split(self.sizes)
                values[name] = torch.cat([pieces[i] for i in images])
            else:
                values[name] = value[index.to(value.device)]
        tiles = tuple(self.tiles[i] for i in images) if self.tiles else ()
        return replace(self, values=values, sizes=[self.sizes[i] for i in images], tiles=tiles)


def as_text(value: Any) -> str | None:
    """Text that tells ``value``; None where no text does."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {row_digests(value.reshape(1, -1))[0].hex()}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        parts = [as_text(part) for part in value]
        return None if None in parts else f"{type(value).__name__}{parts}"
    return None


def digest_of_text(text: str, *more: bytes) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=20)
    for part in more:
        digest.update(part)
    return digest.hexdigest()
