"""Where image features are kept: memory within its bounds, folders that processes share, filling before training, and bad places."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from image_caches import agree, cached
from torch import nn
from vision_models import build, images

import fastpeft as fp
from fastpeft import features
from fastpeft.caching.images import image_caches


def test_memory_is_bounded_and_old_images_leave():
    model, plain, batch = cached(where="2kB")  # an image takes 4 x 32 float64: 1 kB
    cache, *_ = image_caches(model)
    pixels = images(6)
    for _ in range(3):
        for i in range(6):
            agree(model, plain, batch, pixels[i : i + 1])
    assert cache.kept.bytes <= 2000 and len(cache.kept) == 1 and cache.reused == 2
    for _ in range(10):
        agree(model, plain, batch, pixels[5:])
    assert cache.reused > 6, "the image that nobody asks for made no room"


def test_folder_is_shared_by_processes_and_runs(tmp_path, rows):
    pixels = images(6)
    first, plain, batch = cached(where=tmp_path / "kept")
    assert features.fill(first, [batch(pixels[:3]), batch(pixels[2:])], progress=False) == 6
    assert not any(p.grad is not None for p in first.parameters())
    second, _, _ = cached(where=str(tmp_path / "kept"))
    (cache,), counter = image_caches(second), rows(second)
    agree(second, plain, batch, pixels[:2])  # its first batch shows how outputs look
    counter.taken()
    with torch.no_grad():
        second(**batch(pixels[[5, 1, 3]]))
    assert counter.taken() == 0 and cache.loaded == 2
    agree(second, plain, batch, pixels[[5, 1, 3]])
    other, _, _ = cached(where=tmp_path / "kept")
    other.model.multi_modal_projector.linear_1.weight.data[0, 0] += 1e-9
    agree(other, other, batch, pixels[:2])
    with torch.no_grad():
        other(**batch(pixels[3:]))
    assert image_caches(other)[0].loaded == 0, "features of other weights"


def test_damaged_files_are_computed_again(tmp_path):
    first, plain, batch = cached(where=tmp_path)
    pixels = images(4)
    features.fill(first, [batch(pixels)], progress=False)
    for file in tmp_path.rglob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-1::-64] = bytes(value ^ 1 for value in raw[-1::-64])  # in every tensor, and in the header
        file.write_bytes(raw)
    second, _, _ = cached(where=tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        agree(second, plain, batch, pixels[:2])
        agree(second, plain, batch, pixels)


def test_the_last_features_are_written_when_the_model_goes(tmp_path):
    first, _, batch = cached(where=tmp_path)
    with torch.no_grad():
        first(**batch(images(3)))
    assert not list(tmp_path.rglob("*.safetensors"))
    del first
    gc.collect()
    assert list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "kept").mkdir()
    model, plain, batch = cached(where=tmp_path / "kept")
    cache, *_ = image_caches(model)
    agree(model, plain, batch, images(2))
    cache.kept.store.folder = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(model, plain, batch, images(2))


def test_fill_stops_where_features_are_made_and_needs_a_cache():
    model, plain, batch = cached("qwen3_vl")
    pixels = images(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model.language_model), "forward", lambda *a, **k: pytest.fail("the language model ran"))
        assert features.fill(model, [batch(pixels[:2]), batch(pixels[1:])], progress=False) == 4
    cache, *_ = image_caches(model)
    agree(model, plain, batch, pixels[[3, 0]])
    assert cache.computed == 4
    with pytest.raises(ValueError, match="cache_images"):
        features.fill(plain, [batch(pixels)])


@pytest.mark.parametrize("bad", ["4XB", "4", "", 4, True, "-1GB", ["4GB"]])
def test_a_bad_place_is_one_clear_error(bad):
    model, _ = build("llava")
    with pytest.raises((ValueError, TypeError), match="cache_images"):
        fp.optimize(model, cache_images=bad)
    assert not image_caches(model)


def test_a_file_is_no_folder_and_false_takes_the_cache_back(tmp_path):
    model, _ = build("llava")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        fp.optimize(model, cache_images=tmp_path / "file")
    fp.optimize(model, cache_images="1MB")
    fp.optimize(model)
    assert image_caches(model)
    fp.optimize(model, cache_images=False)
    assert not image_caches(model)
    text = nn.Linear(3, 3)
    assert any("no module here encodes images" in note for note in fp.optimize(text, cache_images="1MB").notes)
