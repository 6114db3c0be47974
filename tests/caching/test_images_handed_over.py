"""What ends a cache of image features, or hands a call to the model: changed weights, hooks, randomness, adapters, compiled graphs."""

from __future__ import annotations

import copy
import pickle
import pickletools

import pytest
import torch
from image_caches import agree, cached, results, same
from torch import nn
from transformers import PreTrainedModel, ViTConfig
from vision_models import build, images

import fastpeft as fp
from fastpeft.caching.frozen import Wrapper
from fastpeft.caching.images import image_caches

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
    (cache, *_), pixels = image_caches(model), images(2)
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
    cache, *_ = image_caches(model)
    for _ in range(3):
        agree(model, plain, batch, images(2))
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())  # as DistributedDataParallel does before every forward
    assert (cache.computed, cache.reused) == (2, 4)


def test_unknown_randomness_is_noticed():
    model, _, batch = cached()
    (cache,), tower = image_caches(model), model.model.vision_tower
    own = type(tower.embeddings).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tower.embeddings), "forward", lambda self, *a, **k: torch.nn.functional.dropout(own(self, *a, **k), 0.1))
        for _ in range(2):
            results(model, batch(images(2)))
    assert cache.passed == {"it draws random numbers": 2} and cache.reused == 0 and len(cache.kept) == 0


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
    (cache, *_), pixels = image_caches(model), images(3)
    expected = model[1](model[0](pixels))
    same(torch.compile(model, backend="eager", fullgraph=True)(pixels), expected)
    assert (cache.computed, cache.reused) == (3, 0)
    same(model(pixels), expected)
    assert cache.reused == 3


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
