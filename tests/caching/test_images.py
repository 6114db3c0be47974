"""optimize(model, cache_images=...): losses, gradients and outputs as without, and towers that run once for an image."""

from __future__ import annotations

import copy

import pytest
import torch
from image_caches import agree, cached, owner_name, results, same
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from vision_models import MODELS, SEEN, build, images

import fastpeft as fp
from fastpeft.caching.attach import encodes_images
from fastpeft.caching.images import ImageCache, image_caches

MIXES = ([0, 1, 2], [0, 1, 2], [2, 3, 0], [4, 1, 4], [1])  # the same, one new, one twice, one alone


@pytest.mark.parametrize("name", MODELS)
def test_same_losses_and_gradients_and_no_image_is_computed_twice(name, rows):
    model, batch = build(name)
    plain, pixels = copy.deepcopy(model), images(5)
    report = fp.optimize(model, lambda module, name: False, cache_images="1GB")
    assert any("get_image_features returns is kept" in note for note in report.notes), report.notes
    cache, *_ = image_caches(model)
    for visit, mix in enumerate(MIXES):
        counter = rows(model)
        mine, mine_gradients = results(model, batch(pixels[mix]))
        taken = counter.taken()
        theirs, gradients = results(plain, batch(pixels[mix]))
        assert (taken == 0) == (visit in (1, 4))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
        assert gradients.keys() == mine_gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(mine_gradients[key], gradient, rtol=1e-9, atol=1e-12)
    assert (cache.computed, cache.reused, dict(cache.passed)) == (5, 8, {})


@pytest.mark.parametrize("name", MODELS)
def test_every_field_that_a_caller_reads_is_the_models(name):
    model, batch = build(name)
    plain, pixels = copy.deepcopy(model), images(3)
    fp.optimize(model, lambda module, name: False, cache_images="1GB")
    cache, *_ = image_caches(model)
    for mix in ([0, 1], [0, 1], [1, 0], [2, 0]):
        given = {key: value for key, value in batch(pixels[mix]).items() if key.startswith(("pixel", "image", "batch_num"))}
        with torch.no_grad():
            mine, theirs = cache.owner.get_image_features(**given), plain.get_submodule(owner_name(model)).get_image_features(**given)
        assert type(mine).__name__ == type(theirs).__name__ and isinstance(mine, type(theirs))
        same(mine.pooler_output, theirs.pooler_output)
        assert list(mine) == list(theirs) and type(mine) is type(theirs)
        same(mine.to_tuple(), theirs.to_tuple())


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "paligemma2", "blip2"])
def test_with_everything_fused(name):
    model, batch = build(name)
    plain, pixels = copy.deepcopy(model), images(4)
    fp.optimize(plain)
    for _ in range(2):  # and once more, on a fused model with a cache
        fp.optimize(model, cache_images="1GB")
        for mix in ([0, 1], [2, 0], [1, 2, 3]):
            mine, theirs = results(model, batch(pixels[mix])), results(plain, batch(pixels[mix]))
            same(mine[0], theirs[0])
            same(mine[1], dict(theirs[1]))
        cache, *_ = image_caches(model)
        assert (cache.computed, cache.reused) == (4, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, plain, batch = cached("internvl")
    cache, *_ = image_caches(model)
    for one in (model, plain):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()  # hooks on the image encoder's embeddings too
    for _ in range(2):
        mine, theirs = results(model, batch(images(2))), results(plain, batch(images(2)))
        same(mine[0], theirs[0])
        same(mine[1], dict(theirs[1]))
    assert (cache.computed, cache.reused, dict(cache.passed)) == (2, 2, {})


def test_reentrant_checkpoints_of_what_reads_the_features():
    """They give gradients only where an input requires one: the features do, as the encoder's output did."""
    model, batch = build("blip2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("qformer" in name and name.endswith("value.weight"))
    plain, pixels = copy.deepcopy(model), images(2)
    fp.optimize(model, cache_images="1GB")
    for one in (model, plain):
        one.gradient_checkpointing_enable({"use_reentrant": True})
        one.enable_input_require_grads()
    for _ in range(2):
        mine, theirs = results(model, batch(pixels)), results(plain, batch(pixels))
        assert theirs[1] and mine[1].keys() == theirs[1].keys()
        for name, grad in theirs[1].items():  # the layers have islands of float32
            torch.testing.assert_close(mine[1][name], grad, rtol=0, atol=1e-4 * float(grad.abs().max()), msg=name)
    assert image_caches(model)[0].reused == 2


def test_with_a_trained_projector_the_tower_is_kept(rows):
    model, batch = build("llava")
    model.model.multi_modal_projector.requires_grad_()
    plain, pixels = copy.deepcopy(model), images(3)
    notes = fp.optimize(model, lambda module, name: False, cache_images="1GB").notes
    assert any("model.vision_tower.forward returns is kept" in note for note in notes)
    assert any("multi_modal_projector" in note and "is trained" in note for note in notes)
    for mix in MIXES[:3]:
        counter = rows(model)
        batch_of = batch(pixels[[i % 3 for i in mix]])
        mine = results(model, batch_of)
        taken = counter.taken()
        theirs = results(plain, batch_of)
        same(mine[0], theirs[0])
        same(mine[1], dict(theirs[1]))
    assert taken == 0, image_caches(model)[0].note()
    fp.optimize(model)  # again: the tower keeps its cache
    assert len(image_caches(model)) == 1


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"])
def test_towers_of_other_kinds(name, rows):
    model, batch = build(name)
    for part, parameter in model.named_parameters():
        if any(word in part for word in ("projector", "connector", "merger")):
            parameter.requires_grad_("qwen" not in name)
    plain, pixels = copy.deepcopy(model), images(3)
    fp.optimize(model, lambda module, name: False)  # its tower's own, also where the projector is frozen
    tower = next(module for module in model.modules() if encodes_images(module, model))
    tower.__dict__["forward"] = ImageCache(tower, "forward", [""], 1 << 30, None)
    for mix in ([0, 1], [2, 0], [1, 2, 0], [2]):
        mine, theirs = results(model, batch(pixels[mix])), results(plain, batch(pixels[mix]))
        same(mine[0], theirs[0])
        same(mine[1], dict(theirs[1]))
    cache, *_ = image_caches(model)
    assert cache.reused >= 4, cache.note()


def test_a_caller_may_write_to_what_it_gets():
    model, plain, batch = cached("internvl")
    pixels = images(2)
    for _ in range(3):
        got = model.model.get_image_features(pixels).pooler_output
        same(got, plain.model.get_image_features(pixels).pooler_output)
        got.zero_()
    one = model.model.get_image_features(pixels[:1]).pooler_output
    one.zero_()
    agree(model, plain, batch, pixels)


def test_hugging_face_trainer(tmp_path):
    """Its own batches, num_items_in_batch, accumulation and evaluation: the weights that training without the cache gives."""
    ends, pixels = [], images(4)
    for where in (None, "1GB"):
        model, batch = build("llava_onevision")
        fp.optimize(model, cache_images=where)
        rows = [{key: value[0] for key, value in batch(pixels[i : i + 1]).items()} for i in (0, 1, 2, 3)]
        rows = [row for row in rows if row["pixel_values"].shape == rows[0]["pixel_values"].shape]
        assert len(rows) > 1
        how = {"num_train_epochs": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "report_to": "none"}
        args = TrainingArguments(str(tmp_path), **how, use_cpu=True, seed=1, save_strategy="no", eval_strategy="epoch", disable_tqdm=True)
        Trainer(model, args, train_dataset=rows, eval_dataset=rows).train()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    cache, *_ = image_caches(model)
    # once one by one, and once where evaluation first shows how several share an output
    assert (cache.computed, cache.reused, dict(cache.passed)) == (2 * len(rows), 4 * len(rows), {})
    same(*ends)


def test_generation_takes_what_is_kept():
    model, plain, batch = cached("gemma3")
    (cache,), given = image_caches(model), batch(images(2))
    model.eval(), plain.eval()
    asked = {name: value for name, value in given.items() if name != "labels"}
    for _ in range(2):
        same(*(one.generate(**asked, max_new_tokens=3, do_sample=False) for one in (model, plain)))
    assert (cache.computed, cache.reused) == (2, 2)


def test_loss_arguments_are_no_part_of_an_image():
    model, _, batch = cached()
    cache, *_ = image_caches(model)
    for count in (3, 4, 5):
        model(**batch(images(2)), num_items_in_batch=torch.tensor(count))
    assert (cache.computed, cache.reused) == (2, 4)


def test_batch_dependent_features_are_kept_by_call():
    model, plain, batch = cached()
    (cache, *_), pixels = image_caches(model), images(3)
    tower = type(model.model.multi_modal_projector)
    own = tower.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "forward", lambda self, x: own(self, x - x.mean(0, keepdim=True)))
        for mix in ([0, 1], [0, 1], [0, 2], [0, 1]):
            agree(model, plain, batch, pixels[mix])
    assert cache.reused == 2 and any("depend on the others" in reason for reason in cache.passed)


def test_a_classifier_on_a_frozen_encoder(rows):
    config = ViTConfig(**SEEN, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = ViTForImageClassification(config).double().train()  # its loss sets config.problem_type
    model.vit.requires_grad_(False)
    plain, pixels, labels = copy.deepcopy(model), images(4), torch.tensor([0, 1, 1, 0])
    fp.optimize(model, cache_images="1MB")
    for mix in ([0, 1, 2], [3, 0], [2, 1, 3]):
        counter = rows(model)
        mine = results(model, {"pixel_values": pixels[mix], "labels": labels[mix]})
        taken = counter.taken()
        theirs = results(plain, {"pixel_values": pixels[mix], "labels": labels[mix]})
        same(mine[0], theirs[0])
        same(mine[1], dict(theirs[1]))
    assert taken == 0, image_caches(model)[0].note()


def test_images_of_one_and_of_two_tiles_are_kept_one_by_one():
    """Idefics3 and SmolVLM leave empty tiles out: rows of their outputs are the others'."""
    model, batch = build("idefics3")
    plain, pixels = copy.deepcopy(model), images(6)
    assert {bool(image[0, 0, 0] > 0) for image in pixels} == {True, False}
    fp.optimize(model, cache_images="1GB")
    fp.optimize(plain)
    cache, *_ = image_caches(model)
    for mix in ([0, 1, 2], [3, 4, 5], [5, 0, 3], [2, 4], [1]):
        (loss, grads), (expected, theirs) = results(model, batch(pixels[mix])), results(plain, batch(pixels[mix]))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for name, grad in theirs.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-7, atol=1e-12, msg=name)
    assert (cache.computed, cache.reused) == (6, 6), cache.note()
    assert not cache.passed
