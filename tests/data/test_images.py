"""Images: every mode to the right values, damage to one clear error, a cache that stays within its bytes."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastpeft.data import ImageCache, Preprocess, load_image


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


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33), (20, 90)])
def test_crop_is_clips(shape):
    """Against transformers' CLIP preprocessing (sizes whose crop falls on whole pixels: the two round halves differently)."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    official = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    expected = torch.as_tensor(np.asarray(official(image)["pixel_values"][0]))
    mean, std = official.image_mean, official.image_std
    ours = Preprocess(20, mean=tuple(mean), std=tuple(std), interpolation="bicubic", crop=True)(image)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


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


def test_decompression_bombs(photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 // 3)
    with raises("photo.png: image too large to decode safely"):
        load_image(photo)


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
