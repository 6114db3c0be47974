"""Models of images and videos after optimize, with a cache and without: losses and gradients as they were, no video computed twice."""

from __future__ import annotations

import copy

import pytest
import torch
from double import Double
from tiny_models import IMAGE, tiny

import fastpeft as fp
from fastpeft import features
from fastpeft.caching.images import image_caches

pytestmark = pytest.mark.usefixtures("one_thread")
VIDEO, START = 97, 96  # tokens of tiny_models' configurations


def rows_of(side: str, *rows: list[int]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels of rows, padded on a side; labels on text but for a row's first token."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    labels = ids.masked_fill((mask == 0) | (ids >= START), -100)
    labels[torch.arange(len(rows)), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch_of(name: str, model, side: str) -> dict:
    """A video, an image, and both."""
    generator = torch.Generator().manual_seed(5)

    def text(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name == "llava-onevision":  # two frames of a pooled token each, and a newline
        image, video = [IMAGE] * 10, [VIDEO] * 3
        seen = {"pixel_values": pixels(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}
        seen |= {"pixel_values_videos": pixels(2, 2, 3, 16, 16)}
    else:  # two frames of four tokens each; Qwen3-VL has a time before each
        image = [START, *[IMAGE] * 4]
        video = [*text(2), START, *[VIDEO] * 4] * 2 if name == "qwen3-vl" else [START, *[VIDEO] * 8]
        vision = model.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        seen = {"pixel_values": pixels(2 * 16, width), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        seen |= {"pixel_values_videos": pixels(2 * 32, width), "video_grid_thw": torch.tensor([[2, 4, 4]] * 2)}
        seen |= {"second_per_grid_ts": [1.0, 2.0]} if name == "qwen2.5-vl" else {}
    out = rows_of(side, text(2) + video + text(5), text(1) + image + text(4), text(2) + image + video + text(3))
    if name != "llava-onevision":
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE) + 2 * (out["input_ids"] == VIDEO).long()
    return out | seen


def step(model, batch):
    model.zero_grad()
    with Double():
        loss = model(**batch).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(mine, theirs):
    (loss, gradients), (want, wanted) = mine, theirs
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=0)
    assert gradients.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}")


def frozen_eyes(name: str):
    model, _ = tiny(name)
    for part, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in part for word in ("vis", "projector", "newline")))
    return model.train()


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "llava-onevision"])
def test_the_model_as_it_was(name):
    plain = frozen_eyes(name)
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=True)
    batch = batch_of(name, plain, "left")
    assert_same(step(model, batch), step(plain, batch))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "llava-onevision"])
def test_videos_are_kept(name):
    plain = frozen_eyes(name)
    model = copy.deepcopy(plain)
    report = fp.optimize(model, lean_logits=True, cache_images="1GB")
    assert any("is kept" in note for note in report.notes)
    batch = batch_of(name, plain, "right")
    wanted = step(plain, batch)
    for _ in range(2):
        assert_same(step(model, batch), wanted)
    caches = image_caches(model)
    assert all(cache.computed == cache.reused > 0 for cache in caches), [cache.note() for cache in caches]
    if "qwen" in name:  # transformers 5.17's LLaVA-OneVision tells no video's rows: they are kept by call
        assert sum(cache.computed for cache in caches) == 4 and not any(cache.passed for cache in caches)


def test_filling_takes_images_and_videos():
    """Of a batch of images alone, filling stops at their features; of both, videos are made too."""
    model = frozen_eyes("qwen2.5-vl")
    fp.optimize(model, cache_images="1GB")
    batch = batch_of("qwen2.5-vl", model, "right")
    alone = rows_of("right", [5, START, *[IMAGE] * 4, 6], [START, *[IMAGE] * 4, 8, 9, 10])
    alone |= {"mm_token_type_ids": (alone["input_ids"] == IMAGE).long(), "image_grid_thw": batch["image_grid_thw"]}
    runs = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *args: runs.append(1))
    assert features.fill(model, [alone | {"pixel_values": batch["pixel_values"] + 1.0}], progress=False) == 2 and not runs
    assert features.fill(model, [batch], progress=False) == 4
    hook.remove()
    step(model, batch)
    assert [cache.computed for cache in image_caches(model)] == [4, 2]


def test_frames_that_are_black_are_frames():
    """LLaVA-OneVision's images of several tiles are padded with empty ones; a video of black frames has them all."""
    plain = frozen_eyes("llava-onevision")
    model = copy.deepcopy(plain)
    fp.optimize(model, cache_images="1GB")
    batch = batch_of("llava-onevision", plain, "right")
    batch["pixel_values_videos"][1, 1] = 0
    for _ in range(2):
        assert_same(step(model, batch), step(plain, batch))


def test_a_stack_of_other_names_keeps_no_layers():
    model, _ = tiny("gpt2")
    report = fp.optimize(model, cache_layers="1GB")
    assert any("hidden states are not kept" in note for note in report.notes)
