"""Images: every mode to the right values, damage to one clear error, a cache that stays within its bytes."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastpeft.data import ImageCache, Preprocess, _resize, load_image, load_samples
from fastpeft.data.images import FORMATS, MAX_PIXELS


def raises(text: str):
    return pytest.raises(ValueError, match=text)


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(values).save(path)
    return path


def test_official_preprocessing(photo):
    plain, official = Preprocess(24)(photo), Preprocess(24, extra_255=True)(photo)
    assert plain.shape == (3, 24, 24) and plain.dtype == torch.float32 and plain.is_contiguous()
    assert 0.2 < plain.mean() < 0.8 and plain.max() <= 1
    torch.testing.assert_close(official, plain / 255, rtol=0, atol=0)


@pytest.mark.parametrize("size", [7, 24, 80])
def test_resize_is_bilinear_with_antialias(photo, size):
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1)[None].to(torch.float64)
    expected = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)[0] / 255
    ours = Preprocess(size)(photo)
    assert (ours - expected).abs().max() < 1.01 / 255  # 8-bit rounding, twice
    aliased = F.interpolate(pixels, (size, size), mode="bilinear", antialias=False, align_corners=False)[0] / 255
    if size == 7:
        assert (ours - aliased).abs().max() > 0.1


def clip(image, size: int, **how):
    """transformers' CLIP preprocessing, the one by Pillow (the one by torchvision rounds otherwise in its resize)."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    official = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **how)
    return torch.as_tensor(np.asarray(official(image)["pixel_values"][0]))


def noise(*shape) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))


SHAPES = [(40, 60), (60, 40), (33, 33), (41, 60), (20, 33), (33, 20), (7, 10), (10, 7), (1, 1), (1, 2), (2, 1)]
SHAPES += [(20, 90), (3, 400), (400, 3), (1, 6000), (6000, 1), (2, 999), (999, 2), (19, 800), (800, 19), (20, 161)]
SHAPES += [(21, 900), (900, 21), (90, 500), (500, 90)]


@pytest.mark.parametrize("size", [20, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_clips(shape, size):
    """To the bit: enlarged and made smaller, odd margins and even ones, whatever the shape."""
    image = noise(*shape)
    expected = clip(image, size, do_rescale=False, do_normalize=False)
    pre = Preprocess(size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop=True)
    assert pre.pixels(image).dtype == torch.uint8 and torch.equal(pre.pixels(image), expected)
    normal = clip(image, size, image_mean=pre.mean, image_std=pre.std)
    torch.testing.assert_close(pre(image), normal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_window_is_pillows(interpolation, monkeypatch):
    """What is resampled of the longer side alone, at every shape that is enlarged."""
    monkeypatch.setattr(_resize, "ELONGATED", 0)
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    draw = np.random.default_rng(2)
    for high, wide, size in draw.integers(1, 60, (200, 3)).tolist():
        image, scaled = noise(high, wide), [size * side // min(high, wide) for side in (wide, high)]
        left, top = ((side - size) // 2 for side in scaled)
        expected = image.resize(scaled, how).crop((left, top, left + size, top + size))
        assert np.array_equal(_resize.resize_and_crop(image, size, interpolation), np.array(expected)), (high, wide, size)


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (400_000, 2), (5000, 40)])
def test_no_image_in_between_is_larger_than_need_be(size, monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *how: made.append(size[0] * size[1]) or resize(self, size, *how))
    image = Image.new("RGB", size, (9, 8, 7))
    pixels = Preprocess(224, interpolation="bicubic", crop=True).pixels(image)
    assert torch.equal(pixels, torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 224, 224))
    assert max(made) <= max(8 * 224 * 224, size[0] * size[1])


def test_bicubic(photo):
    ours = Preprocess(24, interpolation="bicubic")(photo)
    expected = np.array(Image.open(photo).resize((24, 24), Image.Resampling.BICUBIC))
    assert torch.equal(ours, torch.from_numpy(expected).permute(2, 0, 1) / 255) and not torch.equal(ours, Preprocess(24)(photo))
    with raises("interpolation='cubic'"):
        Preprocess(24, interpolation="cubic")


def test_normalisation(photo):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    plain, ours = Preprocess(8)(photo), Preprocess(8, mean=mean, std=std)(photo)
    for c in range(3):
        torch.testing.assert_close(ours[c], (plain[c] - mean[c]) / std[c])


def test_pixels_then_scale_is_the_call(photo):
    pre = Preprocess(8, mean=(0.1, 0.2, 0.3), std=(1, 2, 3), extra_255=True)
    pixels = pre.pixels(photo)
    assert pixels.dtype == torch.uint8 and torch.equal(pre.scale(pixels), pre(photo))
    assert torch.equal(pre.scale(pixels[None].expand(2, -1, -1, -1))[1], pre(photo))
    assert torch.equal(pre(Image.open(photo)), pre(photo))


def test_round_trip_through_json():
    pre = Preprocess(32, mean=[0.1, 0.2, 0.3], std=[1, 1, 1], extra_255=True)
    assert Preprocess.from_dict(json.loads(json.dumps(pre.to_dict()))) == pre and hash(pre)
    assert Preprocess.from_dict(Preprocess().to_dict()) == Preprocess()
    with raises("unknown preprocessing fields zoom; known are image_size, mean"):
        Preprocess.from_dict({"zoom": 1})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 4.5}, "image_size=4.5"),
        ({"image_size": True}, "image_size=True"),
        ({"mean": (0, 0, 0)}, "mean and std go together"),
        ({"mean": (0, 0), "std": (1, 1)}, "mean=.*three numbers"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "std=.*above 0"),
    ],
)
def test_bad_options(options, message):
    with raises(message):
        Preprocess(**options)


# --- modes ------------------------------------------------------------------------------------------------------------


def saved(tmp_path, image, suffix=".png"):
    path = tmp_path / f"image{suffix}"
    image.save(path)
    return np.asarray(load_image(path))


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 0), (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
    ],
)
def test_eight_bit_modes(tmp_path, mode, color, expected):
    assert (saved(tmp_path, Image.new(mode, (5, 4), color)) == expected).all()


def test_palettes(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 60, 70, 80])
    image.putpixel((1, 0), 1)
    assert saved(tmp_path, image).tolist() == [[[9, 8, 7], [60, 70, 80]]]
    image.info["transparency"] = bytes([0, 128])
    assert saved(tmp_path, image).tolist() == [[[9, 8, 7], [60, 70, 80]]]


def test_cmyk(tmp_path):
    red = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".tiff")
    assert (red == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix, dtype", [(".png", np.uint16), (".tiff", np.uint16), (".tiff", np.int32), (".tiff", np.float32)])
def test_deep_images_are_scaled_by_their_own_range(tmp_path, suffix, dtype):
    values = np.array([[1000, 2000], [3000, 5000]], dtype)  # all would be 255, clipped
    rgb = saved(tmp_path, Image.fromarray(values), suffix)
    assert rgb[..., 0].tolist() == [[0, 64], [128, 255]] and (rgb == rgb[..., :1]).all()


def test_a_deep_image_of_many_rows(tmp_path):
    values = np.random.default_rng(3).integers(5, 60_000, (600, 7), dtype=np.uint16)
    low, high = int(values.min()), int(values.max())
    expected = ((values.astype(np.float64) - low) / (high - low) * 255 + 0.5).astype(np.uint8)
    assert np.array_equal(saved(tmp_path, Image.fromarray(values))[..., 0], expected)


def test_a_flat_deep_image_is_black_not_an_error(tmp_path):
    assert (saved(tmp_path, Image.fromarray(np.full((3, 3), 700, np.uint16))) == 0).all()
    odd = np.array([[np.nan, 1.0], [2.0, np.inf]], np.float32)
    assert saved(tmp_path, Image.fromarray(odd), ".tiff")[..., 0].tolist() == [[0, 0], [255, 255]]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["png", "jpeg", "tiff", "gif", "bmp", "webp"])
def test_images_cut_anywhere(tmp_path, suffix):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(whole, suffix)
    data, path = whole.getvalue(), tmp_path / f"cut.{suffix}"
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        try:
            load_image(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 30
    rng = np.random.default_rng(2)
    for _ in range(40):  # and altered anywhere: an image or one clear error, nothing else
        noisy = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            noisy[at] = rng.integers(0, 256)
        path.write_bytes(bytes(noisy))
        try:
            assert load_image(path).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)


def test_what_is_no_image(tmp_path):
    with raises("absent.png: no such image"):
        load_image(tmp_path / "absent.png")
    with raises("corrupt or unreadable"):
        load_image(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    with raises("text.jpg: not an image"):
        Preprocess(8)(tmp_path / "text.jpg")


def test_decompression_bombs(photo, monkeypatch, tmp_path, recwarn):
    with raises("photo.png: image too large to decode safely .53 x 37 pixels; at most 1,960"):
        load_image(photo, max_pixels=37 * 53 - 1)
    assert load_image(photo, max_pixels=37 * 53).size == (53, 37)
    assert MAX_PIXELS == 50_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 // 2 + 1)  # Pillow's own would only warn
    assert load_image(photo).size == (53, 37) and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 // 3)
    with raises("photo.png: image too large to decode safely"):
        load_image(photo)


def test_an_image_beyond_the_limit_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 5_001)).save(path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with raises("bomb.png: image too large to decode safely .* 5001 pixels; at most 50,000,000 are read.: make it smaller, or raise"):
        Preprocess(8)(path)


def test_more_pixels_than_pillow_takes_are_read_where_they_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "large.png"
    Image.new("1", (80, 80)).save(path)
    with raises("large.png: image too large to decode safely"):
        load_image(path)
    assert load_image(path, max_pixels=MAX_PIXELS + 1).size == (80, 80)


@pytest.mark.parametrize("at", ["PIL.ImageFile.ImageFile.load", "PIL.Image.Image.convert", "PIL.Image.open", "PIL.Image.Image.resize"])
@pytest.mark.parametrize("crop", [False, True])
def test_too_little_memory_is_an_error_of_the_image(tmp_path, monkeypatch, at, crop):
    path = tmp_path / "grey.png"
    Image.new("L", (60, 40)).save(path)

    def refuse(*args, **options):
        raise MemoryError

    monkeypatch.setattr(at, refuse)
    with raises(r"grey.png: not enough memory to (decode|resize) this image"):
        Preprocess(8, crop=crop).pixels(path)


def test_too_little_memory_is_counted_as_a_bad_image(slake, monkeypatch):
    from PIL import ImageFile

    load = ImageFile.ImageFile.load

    def refuse(self):
        if "xmlab2" in str(self.filename):
            raise MemoryError
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with raises("train.json: entry 1: .*xmlab2/source.jpg: not enough memory"):
        load_samples(slake, check_images=True)
    assert load_samples(slake, skip_bad=True).skipped == {"corrupt image": 1}


# --- formats ----------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.skipif(os.name != "posix", reason="a fake gs is a shell script")
@pytest.mark.parametrize("suffix", ["png", "jpg", "eps", "tiff"])
def test_no_other_program_is_started(tmp_path, suffix, monkeypatch):
    """Pillow decodes EPS with Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    gs, marker, path = tmp_path / "gs", tmp_path / "started", tmp_path / f"image.{suffix}"
    gs.write_text(f"#!/bin/sh\ntouch {marker}\n")
    gs.chmod(0o755)
    path.write_bytes(EPS)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once per process
    with raises(f"image.{suffix}: not an image that Pillow can read as one of JPEG, PNG, GIF, WEBP, BMP, TIFF"):
        load_image(path)
    assert not marker.exists()
    with contextlib.suppress(OSError):
        Image.open(path).load()
    assert marker.exists()  # so Pillow itself does


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX", "DDS", "SGI"])
def test_other_formats_are_refused_by_content(tmp_path, format):
    path = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(path, format)
    with raises("image.png: not an image that Pillow can read as one of"):
        load_image(path)


@pytest.mark.parametrize("format", [*FORMATS, "MPO"])  # MPO: JPEG files of several pictures, as telephones write
def test_the_formats(tmp_path, format):
    path = tmp_path / "image.x"
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 12), (0, 0, 255))]} if format == "MPO" else {}
    Image.new("RGB", (16, 12), (200, 100, 50)).save(path, format, **more)
    assert np.abs(np.array(load_image(path)).astype(int) - (200, 100, 50)).max() <= 12


def test_exif_orientation_is_not_applied(tmp_path):
    """As the official loaders, which open and convert."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (30, 20)


# --- cache ------------------------------------------------------------------------------------------------------------


def test_cache_is_bounded_and_counts():
    cache = ImageCache(max_bytes=250)
    made = []

    def load(key):
        return cache.get(key, lambda: made.append(key) or torch.full((100,), key, dtype=torch.uint8))

    for key in (1, 2, 1, 3, 1, 2):  # 3 puts 2 out, the least recently used
        assert load(key)[0] == key
    assert made == [1, 2, 3, 2] and (cache.hits, cache.misses, cache.bytes, len(cache)) == (2, 4, 200, 2)
    assert ImageCache(0).get(1, lambda: torch.ones(3)).sum() == 3
    cache.get("big", lambda: torch.zeros(251, dtype=torch.uint8))
    assert len(cache) == 2 and cache.bytes == 200  # what can't fit puts nothing out
    with raises("max_bytes=-1"):
        ImageCache(-1)
