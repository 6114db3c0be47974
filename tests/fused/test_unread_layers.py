"""Towers of which a lower layer is read: the layers above it are not computed, and nothing that a caller may read is another."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_batches import GROUPED, IMAGE, VISION, _image, _lively, _one_image_each, _with_images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.fused.stack import unread_layers
from fastpeft.fused.stack.unread_layers import FusedLowerLayersReader, readings
from fastpeft.methods.base import FSDP
from fastpeft.registry import has_form

pytestmark = pytest.mark.usefixtures("one_thread")
SEEN = VISION | {"num_hidden_layers": 4}
TEXT = T.LlamaConfig(**GROUPED)


def clip(**more) -> nn.Module:
    config = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**SEEN), text_config=TEXT, image_token_index=IMAGE, **more)
    return T.LlavaForConditionalGeneration(config)


def siglip(**more) -> nn.Module:
    vision = T.SiglipVisionConfig(**SEEN, vision_use_head=True)
    config = T.LlavaConfig(
        vision_config=vision, text_config=TEXT, image_token_index=IMAGE, vision_feature_select_strategy="full", **more
    )
    return T.LlavaForConditionalGeneration(config)


def next_tiles(**more) -> nn.Module:
    config = T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**SEEN), text_config=TEXT, image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]], **more
    )
    return T.LlavaNextForConditionalGeneration(config)


def vip(**more) -> nn.Module:
    config = T.VipLlavaConfig(vision_config=T.CLIPVisionConfig(**SEEN), text_config=TEXT, image_token_index=IMAGE, **more)
    return T.VipLlavaForConditionalGeneration(config)


MAKERS = {"clip": clip, "siglip": siglip, "next": next_tiles, "vip": vip}
LAYERS = {"clip": (-2, [1, -2], -1, 4), "siglip": (2,), "next": (-3,), "vip": ([-2, -5],)}  # a VipLLaVA of before 5.18 reads them elsewhere
NEW = hasattr(T.utils.output_capturing, "select_hidden_states")
CASES = [(name, layer) for name, layers in LAYERS.items() for layer in layers if name != "vip" or NEW]


def batch_of(model: nn.Module, dtype=torch.float64) -> dict:
    if isinstance(model, T.LlavaNextForConditionalGeneration):
        pixels = {"pixel_values": _image(rows=6).view(3, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 3)}
        given = _with_images(10, lambda: pixels)("padded", None)
    else:
        given = _with_images(4, _one_image_each)("padded", None)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}


@pytest.fixture
def left_out(monkeypatch):
    """Of each call of a model inside, how many layers it leaves out."""
    seen, own = [], unread_layers._left_out
    monkeypatch.setattr(unread_layers, "_left_out", lambda layers: (seen.append(len(layers)), own(layers))[1])
    return seen


def tower_of(model: nn.Module) -> nn.Module:
    return model.model.vision_tower


def pair(model: nn.Module, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    plain = _lively(model, dtype).train()
    fused = copy.deepcopy(plain)
    fp.optimize(fused)
    return plain, fused


@pytest.mark.parametrize("name,layer", CASES)
def test_the_model_as_it_was(name, layer, left_out):
    plain, fused = pair(MAKERS[name](vision_feature_layer=layer))
    assert has_form(fused.model, FusedLowerLayersReader)
    given = batch_of(plain)
    mine, theirs = step(fused, given), step(plain, given)
    assert_same(mine, theirs, f"{name}, {layer}")
    torch.testing.assert_close(mine[0].logits, theirs[0].logits, rtol=1e-9, atol=1e-11)
    read = max(i % 5 for i in (layer if isinstance(layer, list) else [layer]))
    assert left_out == [4 - read]
    assert not any("forward" in module.__dict__ for module in fused.modules())


def test_an_argument_and_a_features_call(left_out):
    """The layer may be given; features that a caller asks for have a last hidden state, of all layers."""
    plain, fused = pair(clip())
    given = batch_of(plain) | {"vision_feature_layer": 1}
    assert_same(step(fused, given), step(plain, given))
    assert left_out == [3]
    pixels = given["pixel_values"]
    for mine, theirs in zip(fused.get_image_features(pixels).to_tuple(), plain.get_image_features(pixels).to_tuple()):
        torch.testing.assert_close(mine, theirs)
    assert left_out == [3]


def test_flops_and_bytes():
    """One of four layers, to the FLOP; of a tower that is trained, what it keeps for backward too."""
    plain, fused = pair(clip(), torch.float32)
    given = batch_of(plain, torch.float32)
    for model in (plain, fused):
        tower_of(model).encoder.layers[-1].requires_grad_(False)
    with fp.without("labelled"), measure(fused) as mine:
        fused(**given).loss.backward()
    with measure(fused) as fewer:
        fused(**given).loss.backward()
    with FlopCounterMode(display=False) as one, torch.no_grad():
        tower_of(plain).encoder.layers[-1](torch.randn(3, 5, SEEN["hidden_size"]), None)
    assert mine.flops - fewer.flops == one.get_total_flops() > 0
    assert fewer.saved_bytes < mine.saved_bytes


def _adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double()


@pytest.mark.parametrize("reentrant", [False, *(pytest.param(how, marks=pytest.mark.slow) for how in (None, True))])
def test_adapters_checkpoints_and_generation(reentrant, left_out):
    """PEFT's adapters in layers that nobody reads get no gradient, as before."""
    plain = _adapted(_lively(clip(), torch.float64)).train()
    if reentrant is not None:
        plain.gradient_checkpointing_enable({"use_reentrant": reentrant})
        plain.enable_input_require_grads()
    fused = copy.deepcopy(plain)
    fp.optimize(fused, lean_logits=True)
    given = batch_of(plain)
    for model in (plain, fused):
        model.zero_grad()
        model(**given).loss.backward()
    assert left_out == [1]
    for (name, a), b in zip(plain.named_parameters(), fused.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6 * float(a.grad.abs().max()) + 1e-9)
    asked = {name: value[:1] for name, value in given.items() if name != "labels"}
    want = plain.eval().generate(**asked, max_new_tokens=3, do_sample=False)
    assert torch.equal(fused.eval().generate(**asked, max_new_tokens=3, do_sample=False), want)


KEEPS = {
    "a hook in a layer that is not read": lambda m: tower_of(m).encoder.layers[-1].mlp.register_forward_hook(lambda *a: None),
    "a hook on the norm behind": lambda m: tower_of(m).post_layernorm.register_forward_hook(lambda *a: None),
    "a hook on the tower": lambda m: tower_of(m).register_forward_hook(lambda *a: None),
    "a method of one's own": lambda m: setattr(m.model, "get_image_features", m.model.get_image_features),
    "a layer that is not there": lambda m: setattr(m.config, "vision_feature_layer", -1),
    "kept features": lambda m: fp.optimize(m, cache_images="1MB"),
}


@pytest.mark.parametrize("why", KEEPS)
def test_what_computes_every_layer(why, left_out):
    plain, fused = pair(clip(), torch.float32)
    if why == "kept features":
        tower_of(fused).requires_grad_(False)
        fused.model.multi_modal_projector.requires_grad_(False)
    KEEPS[why](fused)
    given = batch_of(plain, torch.float32)
    with torch.no_grad():
        fused(**given)
    assert left_out == [0]


def test_fsdp_calls_every_layer(left_out):
    def gather(module, args):
        pass

    gather.__module__ = FSDP
    plain, fused = pair(clip(), torch.float32)
    tower_of(fused).encoder.layers[-1].register_forward_pre_hook(gather)
    fused(**batch_of(plain, torch.float32))
    assert left_out == [0]


def test_another_thread_computes_every_layer(left_out):
    plain, fused = pair(clip(), torch.float64)
    given, found = batch_of(plain), []
    tower, pixels = tower_of(fused), batch_of(plain)["pixel_values"]

    def call(module, args):  # while the layers are left out
        thread = threading.Thread(target=lambda: found.append(tower(pixels).last_hidden_state))
        thread.start()
        thread.join()

    fused.model.multi_modal_projector.register_forward_pre_hook(call)
    fused(**given)
    assert left_out == [1]
    torch.testing.assert_close(found[0], tower_of(plain)(pixels).last_hidden_state)


class ReadsMore(nn.Module):
    """Everything that one of these methods may do to keep its tower whole."""

    def forward(self, pixels, layer=None, outputs=None):
        return self.features(pixels, layer=layer).pooler_output

    def features(self, pixels, layer=None):
        found = self.tower(pixels)
        taken = found.hidden_states[layer]
        found.pooler_output = self.project(taken)
        return found


class ReadsTheLast(ReadsMore):
    def features(self, pixels, layer=None):
        found = self.tower(pixels)
        found.pooler_output = self.project(found.hidden_states[layer]) + found.last_hidden_state
        return found


class WritesPerhaps(ReadsMore):
    def features(self, pixels, layer=None):
        found = self.tower(pixels)
        taken = found.hidden_states[layer]
        if taken.dim() == 3:
            found.pooler_output = taken
        return found


class HandsOut(ReadsMore):
    def forward(self, pixels, layer=None, outputs=None):
        return self.features(pixels, layer=layer)


class CallsTwice(ReadsMore):
    def forward(self, pixels, layer=None, outputs=None):
        return self.features(pixels, layer=layer).pooler_output + self.tower.encoder(pixels)


class GivesAnother(ReadsMore):
    def forward(self, pixels, layer=None, outputs=None):
        return self.features(pixels, layer=layer + 1).pooler_output


class TakesThrough(ReadsMore):
    def forward(self, pixels, layer=None, outputs=None):
        outputs = outputs if outputs is not None else {}
        outputs["image"] = self.features(pixels, layer=layer)
        return outputs["image"].pooler_output, outputs["image"].pooler_output


class TakesAll(TakesThrough):
    def forward(self, pixels, layer=None, outputs=None):
        outputs = outputs if outputs is not None else {}
        outputs["image"] = self.features(pixels, layer=layer)
        return outputs


def test_what_is_found_in_code(monkeypatch):
    for cls in list(globals().values()):
        if isinstance(cls, type) and issubclass(cls, ReadsMore):
            for name in {"forward", "features"} & vars(cls).keys():
                monkeypatch.setattr(vars(cls)[name], "__module__", "transformers.models.here")
    one = readings(ReadsMore)
    assert [(r.path, r.index, r.is_argument, r.kept) for r in one] == [("tower", "layer", True, frozenset())]
    assert readings(TakesThrough)[0].kept == {"outputs"}
    for cls in (ReadsTheLast, WritesPerhaps, HandsOut, CallsTwice, GivesAnother, TakesAll):
        assert readings(cls) == (), cls
