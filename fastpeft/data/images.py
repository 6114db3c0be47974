"""Image preprocessing: decode, convert to 8-bit RGB, resize and scale, with the arithmetic of torchvision's `Resize` and `ToTensor`.

S = image_size. Pixels are kept as uint8 until the last step, so that a cache of them takes a quarter of the memory.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from fastpeft.data._resize import resize_and_crop

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow's others have decoders that run other programs (EPS: Ghostscript)
MAX_PIXELS = 50_000_000  # of an image that is decoded: as RGB 150 MB
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of an image's colours; BLIP's too
MOST_PIXELS_A_SIDE = 8192  # of what a model is given; every published one takes less than a quarter
_ROWS = 256  # of an image of more than 8 bits, scaled at a time

# Pillow's decoders raise more than OSError on damaged files, by format and by where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)


# bytes a pixel while it is decoded and made RGB, by Pillow's mode: the decoded image, what it is scaled to, and RGB's four
_BYTES = {"RGB": 4, "I": 10, "F": 10} | dict.fromkeys(("1", "L", "P"), 5)
_BYTES |= dict.fromkeys(("LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16"), 8)
_MOST_BYTES = 8  # a pixel, on average: `max_pixels` of RGBA or of 16 bits; of 32 bits somewhat fewer pixels


def _to_rgb(image):
    """Any Pillow mode to RGB. Transparency is dropped; more than 8 bits are scaled by their own range, darkest to 0."""
    if image.mode.startswith(("I", "F")):  # I;16 and its byte orders, I, F: convert() would clip them at 255
        image = _scaled(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image):
    """A grey image of more than 8 bits as one of 8, some rows at a time: all of its values as numbers would be eight times the result."""
    from PIL import Image

    boxes = [(0, top, image.width, min(top + _ROWS, image.height)) for top in range(0, image.height, _ROWS)]
    low, high = math.inf, -math.inf
    for box in boxes:
        values = np.asarray(image.crop(box))
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    low, high = (low, high) if low <= high else (0.0, 0.0)
    scaled = Image.new("L", image.size)
    for box in boxes:
        part = (np.asarray(image.crop(box)).astype(np.float64) - low) / ((high - low) or 1.0)
        part = np.clip(np.nan_to_num(part, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
        scaled.paste(Image.fromarray((part * 255 + 0.5).astype(np.uint8), "L"), box)
    return scaled


def _check_size(image, max_pixels: int) -> None:
    """ValueError for an image, opened and not yet decoded, that takes too much memory."""
    from PIL import Image

    pixels = image.width * image.height
    if pixels > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels; at most {max_pixels:,} are read")
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    if (needed := pixels * _BYTES.get(mode, 16)) > _MOST_BYTES * max_pixels:
        raise Image.DecompressionBombError(f"{needed:,} bytes to decode; at most {_MOST_BYTES * max_pixels:,} are taken")


_allowed = MAX_PIXELS


def allow_pixels(count: int) -> None:
    """How many pixels an image may have in this process and the ones that load its data, instead of MAX_PIXELS."""
    global _allowed
    _allowed = count


def allowed_pixels() -> int:
    """How many pixels an image may have here."""
    return _allowed


def load_image(image, max_pixels: int | None = None):
    """An RGB `PIL.Image` from a path or from an image already open: its first frame, as it is stored. An EXIF orientation is not applied,
    as the official loaders, which open and convert, don't.

    Grey, palette, LA, RGBA, CMYK and 16-bit images are accepted; an image of more than 8 bits is scaled by its own range. A file is
    one of `FORMATS`, whatever its name says, and has at most `max_pixels` (None: MAX_PIXELS, or what :func:`allow_pixels` said).
    ValueError naming the file where it is missing, damaged, of another format, or too large for `max_pixels` or for the memory.
    """
    from PIL import Image

    max_pixels = _allowed if max_pixels is None else max_pixels
    opened_already = isinstance(image, Image.Image)
    path = image if opened_already else Path(image)
    try:
        if opened_already:
            return _to_rgb(image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's own limit; ours is below, and an error
            if max_pixels > MAX_PIXELS and (Image.MAX_IMAGE_PIXELS or max_pixels) < max_pixels:
                Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow would refuse more than twice its own number, whatever was allowed here
            with Image.open(path, formats=FORMATS) as opened:
                _check_size(opened, max_pixels)
                opened.load()
                return _to_rgb(opened)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: image too large to decode safely ({error}): make it smaller, or raise max_pixels") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ValueError(f"{path}: not an image that Pillow can read as one of {known} (corrupt, or another kind of file)") from None
    except MemoryError:
        raise ValueError(f"{path}: not enough memory to decode this image") from None
    except _DAMAGE as error:
        raise ValueError(f"{path}: corrupt or unreadable image ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class Preprocess:
    """Settings of image preprocessing, from an image to a vision tower's input. JSON-able: an adapter stores them.

    image_size: S, for a square resize (antialiased). mean, std: per channel, or None for no normalisation.
    interpolation: "bilinear", or "bicubic", as CLIP and LaVIN have it. crop: the shorter side to S and the middle square, as CLIP,
    instead of both sides to S. With "bicubic" the pixels are those of transformers' CLIPImageProcessorPil to the bit; its
    CLIPImageProcessor resizes by torchvision, whose rounding differs by a level here and there.
    pad: first make it a square, in the middle of one of ``mean``'s colour, as LLaVA's image_aspect_ratio pad.
    extra_255: divide by 255 once more after scaling to [0, 1]: the preprocessing the official MISS and MILE checkpoints were
    trained with.
    """

    image_size: int = 480
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    extra_255: bool = False
    interpolation: str = "bilinear"
    crop: bool = False
    pad: bool = False

    def __post_init__(self):
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f'interpolation={self.interpolation!r}: use "bilinear" or "bicubic"')
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or not 1 <= self.image_size <= MOST_PIXELS_A_SIDE:
            raise ValueError(
                f"image_size={self.image_size!r}: use a positive whole number of pixels, such as 480, of at most {MOST_PIXELS_A_SIDE:,}"
            )
        if self.pad and self.mean is None:
            raise ValueError("pad=True fills with the colour of mean: give mean and std")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both, or neither")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                if len(value) != 3 or (name == "std" and min(value) <= 0):
                    raise ValueError(f"{name}={value!r}: use three numbers, one per channel (those of std above 0)")
                object.__setattr__(self, name, tuple(float(v) for v in value))

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` takes them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> Preprocess:
        """The inverse of `to_dict`. ValueError names an unknown field."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown preprocessing fields {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**values)

    def pixels(self, image, max_pixels: int | None = None) -> torch.Tensor:
        """uint8 [3, S, S] from a path or a `PIL.Image`: decoded and resized, not yet scaled. `max_pixels`, errors: as `load_image`."""
        from PIL import Image

        loaded, S = load_image(image, max_pixels), self.image_size
        resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[self.interpolation]
        try:
            if self.pad:
                loaded = self._square(loaded)
            if self.crop:
                resized = resize_and_crop(loaded, S, self.interpolation)
            else:
                resized = np.array(loaded.resize((S, S), resample))
            return torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        except MemoryError:
            size = f"{loaded.width} x {loaded.height}"
            raise ValueError(f"{image}: not enough memory to resize this image of {size} pixels to {S}") from None

    def _square(self, image):
        """An RGB image in the middle of a square of the mean colour."""
        from PIL import Image

        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def scale(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [..., 3, S, S] from the uint8 of `pixels`: to [0, 1], then the second /255 and the normalisation, if any."""
        x = pixels.to(torch.float32) / 255
        if self.extra_255:
            x = x / 255
        if self.mean is not None:
            shape = (3, 1, 1)
            x = (x - torch.tensor(self.mean, device=x.device).view(shape)) / torch.tensor(self.std, device=x.device).view(shape)
        return x

    def __call__(self, image) -> torch.Tensor:
        """float32 [3, S, S] from a path or a `PIL.Image`."""
        return self.scale(self.pixels(image))


class ImageCache:
    """The most recently used decoded images, up to `max_bytes` (0 keeps none). `hits` and `misses` count look-ups."""

    def __init__(self, max_bytes: int = 256 << 20):
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes}: use 0 (no cache) or a number of bytes")
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._items: OrderedDict[object, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key, load: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor under `key`, made by `load` where it isn't held. It is shared: don't write to it."""
        if key in self._items:
            self.hits += 1
            self._items.move_to_end(key)
            return self._items[key]
        self.misses += 1
        value = load()
        if value.nbytes <= self.max_bytes:
            self._items[key] = value
            self.bytes += value.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._items.popitem(last=False)[1].nbytes
        return value
