"""CLIP's resize and centre crop, with Pillow's values to the bit, without the whole resized image in memory.

The shorter side becomes S, then the middle S x S square is cut out. Pillow resizes along the rows, then along the columns, each time to
8 bits. For an enlarged image with a very long side, the crop discards nearly all of the result (6000 x 1 at S = 224: an image of
1,344,000 x 224, 1.2 GB). For such images this module computes only the S pixels of the longer side that stay, with the arithmetic of
Pillow's Resample.c: coefficients in double, rounded to 22 binary places, summed as integers. (When a tall image is made smaller, the
order of Pillow's passes depends on its version; Pillow itself resizes those.)
"""

from __future__ import annotations

import numpy as np

ELONGATED = 8  # times S: up to there an enlarged image is small, and Pillow's own pass is compiled
_BITS = 22  # PRECISION_BITS of Resample.c: 32 less 8 of a pixel and 2 for overshoot


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1.0, 1.0 - x, 0.0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' with a = -0.5; x >= 0."""
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}  # weight by distance, and how far it reaches


def _taps(length: int, scaled: int, first: int, count: int, interpolation: str) -> list[tuple[int, np.ndarray]]:
    """(first input, integer weights) of each of `count` outputs from `first` on, where `length` inputs become `scaled` outputs."""
    weight, reach = _FILTERS[interpolation]
    scale = length / scaled
    stretch = max(scale, 1.0)  # antialias: the filter grows with what an output covers
    taps = []
    for output in range(first, first + count):
        center = (output + 0.5) * scale
        begin, end = max(int(center - reach * stretch + 0.5), 0), min(int(center + reach * stretch + 0.5), length)
        weights = weight(np.abs((np.arange(begin, end) - center + 0.5) * (1.0 / stretch)))
        weights /= np.add.accumulate(weights)[-1]  # one after the other, as there
        taps.append((begin, np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)))
    return taps


def _resample(rows: np.ndarray, taps: list[tuple[int, np.ndarray]], origin: int) -> np.ndarray:
    """uint8 [R, N, 3] -> uint8 [R, len(taps), 3]; column 0 of `rows` is input `origin`."""
    made = np.empty((rows.shape[0], len(taps), rows.shape[2]), np.uint8)
    for at, (begin, weights) in enumerate(taps):
        seen = rows[:, begin - origin : begin - origin + len(weights)].astype(np.int64)  # [R, taps, 3]
        total = np.einsum("rnc,n->rc", seen, weights) + (1 << (_BITS - 1))
        made[:, at] = np.clip(total >> _BITS, 0, 255)
    return made


def resize_and_crop(image, size: int, interpolation: str) -> np.ndarray:
    """uint8 [size, size, 3] of an RGB `PIL.Image`: its shorter side resized to `size`, the other in proportion (rounded down), the
    middle square of that (an odd margin's larger half right or below), as transformers' CLIPImageProcessorPil.

    Memory beyond the image: 8 S^2 pixels, or the image's own size where that is more, whatever its shape.
    """
    from PIL import Image

    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    short, long = sorted(image.size)
    scaled = size * long // short
    first = (scaled - size) // 2
    upright = image.height > image.width
    if scaled <= max(long, ELONGATED * size):
        wide, high = (size, scaled) if upright else (scaled, size)
        left, top = (0, first) if upright else (first, 0)
        return np.array(image.resize((wide, high), resample).crop((left, top, left + size, top + size)))
    taps = _taps(long, scaled, first, size, interpolation)
    begin, end = taps[0][0], max(start + len(weights) for start, weights in taps)
    if upright:
        across = np.asarray(image.crop((0, begin, short, end)).resize((size, end - begin), resample))
        return np.ascontiguousarray(_resample(across.swapaxes(0, 1), taps, begin).swapaxes(0, 1))
    along = _resample(np.asarray(image.crop((begin, 0, end, short))), taps, begin)
    return np.array(Image.fromarray(along).resize((size, size), resample))
