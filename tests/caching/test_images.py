"""optimize(model, cache_images=...): losses, gradients and outputs as without, towers that run once for an image, and what ends it."""

from __future__ import annotations

import copy
import gc
import pickle
import pickletools
import warnings

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from vision_models import MODELS, SEEN, build, images

import fastpeft as fp
from fastpeft import features
from fastpeft.caching.attach import encodes_images
from fastpeft.caching.frozen import Wrapper
from fastpeft.caching.images import ImageCache, image_caches

MIXES = ([0, 1, 2], [0, 1, 2], [2, 3, 0], [4, 1, 4], [1])  # the same, one new, one twice, one alone


def results(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def encoder(model: nn.Module) -> nn.Module:
    """The module that sees pixels first."""
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    return convolutions[0]


class Rows:
    """Counts what an image encoder is given, in rows of its first convolution."""

    def __init__(self, model: nn.Module):
        self.count, module = 0, encoder(model)
        forward = type(module)._conv_forward
        forward = getattr(forward, "own", forward)

        def counted(this, value, *rest):
            self.count += len(value) * (this is module)
            return forward(this, value, *rest)

        counted.own = forward
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(type(module), "_conv_forward", counted)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def rows():
    made = []

    def count(model):
        made.append(Rows(model))
        return made[-1]

    yield count
    for counter in made:
        counter.patch.undo()


@pytest.mark.parametrize("name", MODELS)
def test_same_losses_and_gradients_and_no_image_is_computed_twice(name, rows):
    model, batch = build(name)
    plain, pixels = copy.deepcopy(model), images(5)
    report = fp.optimize(model, lambda module, name: False, cache_images="1GB")
    assert any("get_image_features returns is kept" in note for note in report.notes), report.notes
    (cache,) = image_caches(model)
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
    (cache,) = image_caches(model)
    for mix in ([0, 1], [0, 1], [1, 0], [2, 0]):
        given = {key: value for key, value in batch(pixels[mix]).items() if key.startswith(("pixel", "image", "batch_num"))}
        with torch.no_grad():
            mine, theirs = cache.owner.get_image_features(**given), plain.get_submodule(owner_name(model)).get_image_features(**given)
        assert type(mine).__name__ == type(theirs).__name__ and isinstance(mine, type(theirs))
        same(mine.pooler_output, theirs.pooler_output)
        assert list(mine) == list(theirs) and type(mine) is type(theirs)
        same(mine.to_tuple(), theirs.to_tuple())


def owner_name(model: nn.Module) -> str:
    (cache,) = image_caches(model)
    return next(name for name, module in model.named_modules() if module is cache.owner)


def same(mine, theirs) -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        same(list(mine.values()), list(theirs.values()))
    elif isinstance(theirs, (list, tuple)):
        assert type(mine) is type(theirs) and len(mine) == len(theirs)
        for a, b in zip(mine, theirs):
            same(a, b)
    else:
        assert mine == theirs


def cached(name: str = "llava", where="1GB"):
    model, batch = build(name)
    plain = copy.deepcopy(model)
    fp.optimize(model, lambda module, name: False, cache_images=where)
    return model, plain, batch


def agree(model, plain, batch, pixels) -> None:
    with torch.no_grad():
        same(model(**batch(pixels)).logits, plain(**batch(pixels)).logits)


CHANGES = {
    "in place": lambda tower: next(tower.parameters()).detach().mul_(1.5),
    "through data": lambda tower: next(tower.parameters()).data.mul_(1.5),
    "load_state_dict": lambda tower: tower.load_state_dict({k: v * 1.1 if "weight" in k else v for k, v in tower.state_dict().items()}),
    "a new tensor": lambda tower: setattr(first_norm(tower), "weight", nn.Parameter(first_norm(tower).weight.detach() * 2, False)),
    "another module": lambda tower: tower.encoder.layers.__setitem__(0, copy.deepcopy(tower.encoder.layers[1])),
    "configuration": None,
}


def first_norm(tower: nn.Module) -> nn.LayerNorm:
    return next(module for module in tower.modules() if isinstance(module, nn.LayerNorm))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_below_empties_the_cache(change):
    model, plain, batch = cached()
    pixels = images(3)
    agree(model, plain, batch, pixels)
    before = model(**batch(pixels)).logits.detach()
    for one in (model, plain):
        if change == "configuration":
            one.config.vision_feature_layer = one.model.config.vision_feature_layer = -1
        else:
            CHANGES[change](one.model.vision_tower)
    agree(model, plain, batch, pixels)
    assert not torch.allclose(model(**batch(pixels)).logits, before, rtol=1e-6)


def test_dtype_and_autocast_have_features_of_their_own():
    model, plain, batch = cached()
    pixels = images(2)
    agree(model, plain, batch, pixels)
    model.float(), plain.float()
    pixels = pixels.float()
    agree(model, plain, batch, pixels)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mine, theirs = (one.model.get_image_features(pixels).pooler_output[0] for one in (model, plain))
    assert torch.equal(mine, theirs)


def test_unfreezing_hooks_and_dropout_hand_the_call_over():
    model, plain, batch = cached()
    (cache,), pixels = image_caches(model), images(2)
    results(model, batch(pixels))
    tower = model.model.vision_tower
    norm = first_norm(tower)
    norm.weight.requires_grad_()
    first_norm(plain.model.vision_tower).weight.requires_grad_()
    mine, theirs = results(model, batch(pixels))[1], results(plain, batch(pixels))[1]
    same(mine, theirs)
    assert any("vision_tower" in name for name in mine)
    norm.weight.requires_grad_(False)
    seen = []
    hook = norm.register_forward_hook(lambda *_: seen.append(1))
    results(model, batch(pixels))
    assert seen
    hook.remove()
    tower.encoder.layers[0].self_attn.dropout = 0.5
    results(model, batch(pixels))
    reasons = " ".join(cache.passed)
    assert "is trained" in reasons and "has hooks" in reasons and "drops at random (dropout = 0.5)" in reasons
    model.eval()
    reused = cache.reused
    with torch.no_grad():
        model(**batch(pixels))
        model(**batch(pixels))
    assert cache.reused > reused


def test_writes_to_fixed_buffers_empty_nothing():
    model, plain, batch = cached()
    (cache,) = image_caches(model)
    for _ in range(3):
        agree(model, plain, batch, images(2))
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())  # as DistributedDataParallel does before every forward
    assert (cache.computed, cache.reused) == (2, 4)


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
        (cache,) = image_caches(model)
        assert (cache.computed, cache.reused) == (4, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, plain, batch = cached("internvl")
    (cache,) = image_caches(model)
    for one in (model, plain):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()  # hooks on the image encoder's embeddings too
    for _ in range(2):
        mine, theirs = results(model, batch(images(2))), results(plain, batch(images(2)))
        same(mine[0], theirs[0])
        same(mine[1], dict(theirs[1]))
    assert (cache.computed, cache.reused, dict(cache.passed)) == (2, 2, {})


def test_unknown_randomness_is_noticed():
    model, _, batch = cached()
    (cache,), tower = image_caches(model), model.model.vision_tower
    own = type(tower.embeddings).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tower.embeddings), "forward", lambda self, *a, **k: torch.nn.functional.dropout(own(self, *a, **k), 0.1))
        for _ in range(2):
            results(model, batch(images(2)))
    assert cache.passed == {"it draws random numbers": 2} and cache.reused == 0 and len(cache.kept) == 0


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
    cache = fp.optimize(model, lambda module, name: False, cache_images="1GB") and image_caches(model)[0]
    cache.owner.__dict__.pop(cache.method)  # its tower's own, also where the projector is frozen
    tower = next(module for module in model.modules() if encodes_images(module, model))
    tower.__dict__["forward"] = ImageCache(tower, "forward", [""], 1 << 30, None)
    for mix in ([0, 1], [2, 0], [1, 2, 0], [2]):
        mine, theirs = results(model, batch(pixels[mix])), results(plain, batch(pixels[mix]))
        same(mine[0], theirs[0])
        same(mine[1], dict(theirs[1]))
    (cache,) = image_caches(model)
    assert cache.reused >= 4, cache.note()


def test_an_adapter_below_is_told():
    peft = pytest.importorskip("peft")
    model, _ = build("llava")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    notes = fp.optimize(model, lambda module, name: False, cache_images="1GB").notes
    assert any("vision_tower" in note and "is trained" in note for note in notes) and not image_caches(model)


def test_peft_and_state_copies_and_pickles(tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = build("gemma3")
    names, printed = list(model.state_dict()), str(model)
    fp.optimize(model, lambda module, name: False, cache_images="1GB")
    pixels = images(2)
    results(model, batch(pixels))
    assert list(model.state_dict()) == names and str(model) == printed
    twin = copy.deepcopy(model)
    (mine,), (theirs,) = image_caches(model), image_caches(twin)
    assert theirs.owner is twin.model and mine.owner is model.model and len(theirs.kept) == 0
    nn.init.zeros_(twin.model.multi_modal_projector.mm_input_projection_weight)
    assert not twin.model.get_image_features(pixels).pooler_output.any() and len(mine.kept) == 2
    model.save_pretrained(tmp_path)
    loaded = pickle.loads(pickle.dumps(model))
    assert not image_caches(loaded)
    agree(loaded, model, batch, pixels)
    names = [argument for _, argument, _ in pickletools.genops(pickle.dumps(model, protocol=2)) if isinstance(argument, str)]
    assert not any("fastpeft" in name for name in names), "a pickle loads where fastpeft is not"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=".*language_model.*q_proj", r=2))
    results(adapted, batch(pixels))
    assert mine.reused
    fp.restore(model)
    assert not image_caches(model) and "get_image_features" not in model.model.__dict__


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


def test_gradients_to_the_pixels_and_torch_func_run_the_models_own():
    model, plain, _ = cached("internvl")
    pixels = images(2)
    model.model.get_image_features(pixels)
    gradients = []
    for one in (model, plain):
        x = pixels.clone().requires_grad_()
        one.model.get_image_features(x).pooler_output.square().sum().backward()
        gradients.append(x.grad)
    same(*gradients)
    with torch.inference_mode():
        same(model.model.get_image_features(pixels).pooler_output, plain.model.get_image_features(pixels).pooler_output)


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
    (cache,) = image_caches(model)
    # once one by one, and once where evaluation first shows how several share an output
    assert (cache.computed, cache.reused, dict(cache.passed)) == (2 * len(rows), 4 * len(rows), {})
    same(*ends)


class Tower(PreTrainedModel):
    config_class = ViTConfig
    main_input_name, input_modalities = "pixel_values", ("image",)

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(3, 4).requires_grad_(False)

    def forward(self, pixel_values):
        return self.linear(pixel_values.mean((-1, -2)))


def test_torch_compile_traces_the_models_own():
    model = nn.Sequential(Tower(ViTConfig()), nn.Linear(4, 2)).double()
    fp.optimize(model, lambda module, name: False, cache_images="1MB")
    (cache,), pixels = image_caches(model), images(3)
    expected = model[1](model[0](pixels))
    same(torch.compile(model, backend="eager", fullgraph=True)(pixels), expected)
    assert (cache.computed, cache.reused) == (3, 0)
    same(model(pixels), expected)
    assert cache.reused == 3


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
    (cache,) = image_caches(model)
    for count in (3, 4, 5):
        model(**batch(images(2)), num_items_in_batch=torch.tensor(count))
    assert (cache.computed, cache.reused) == (2, 4)


def test_batch_dependent_features_are_kept_by_call():
    model, plain, batch = cached()
    (cache,), pixels = image_caches(model), images(3)
    tower = type(model.model.multi_modal_projector)
    own = tower.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "forward", lambda self, x: own(self, x - x.mean(0, keepdim=True)))
        for mix in ([0, 1], [0, 1], [0, 2], [0, 1]):
            agree(model, plain, batch, pixels[mix])
    assert cache.reused == 2 and any("depend on the others" in reason for reason in cache.passed)


def test_memory_is_bounded_and_old_images_leave():
    model, plain, batch = cached(where="2kB")  # an image takes 4 x 32 float64: 1 kB
    (cache,) = image_caches(model)
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
    (cache,) = image_caches(model)
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
    (cache,) = image_caches(model)
    agree(model, plain, batch, pixels[[3, 0]])
    assert cache.computed == 4
    with pytest.raises(ValueError, match="cache_images"):
        features.fill(plain, [batch(pixels)])


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


def test_images_of_one_and_of_two_tiles_are_kept_one_by_one():
    """Idefics3 and SmolVLM leave empty tiles out: rows of their outputs are the others'."""
    model, batch = build("idefics3")
    plain, pixels = copy.deepcopy(model), images(6)
    assert {bool(image[0, 0, 0] > 0) for image in pixels} == {True, False}
    fp.optimize(model, cache_images="1GB")
    fp.optimize(plain)
    (cache,) = image_caches(model)
    for mix in ([0, 1, 2], [3, 4, 5], [5, 0, 3], [2, 4], [1]):
        (loss, grads), (expected, theirs) = results(model, batch(pixels[mix])), results(plain, batch(pixels[mix]))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for name, grad in theirs.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-7, atol=1e-12, msg=name)
    assert (cache.computed, cache.reused) == (6, 6), cache.note()
    assert not cache.passed


def test_replicas_of_data_parallel_run_their_own():
    """Their tensors are others, on other devices than the cache's module."""
    model, _ = build("gemma3")
    fp.optimize(model, cache_images="1GB")
    for one in (model, copy.deepcopy(model)):
        (cache,) = image_caches(one)
        replica = cache.owner._replicate_for_data_parallel()
        assert replica is not cache.owner and type(replica) is type(cache.owner)
        assert not any(isinstance(value, Wrapper) for value in vars(replica).values())
        assert getattr(replica, cache.method).__self__ is replica
    fp.restore(model)
    assert not any(isinstance(value, Wrapper) for module in model.modules() for value in vars(module).values())
    pickle.loads(pickle.dumps(copy.deepcopy(one)))
