"""Classes of transformers that somebody wraps (functools.wraps): what the wrapper does, the model's code does not tell."""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_batches import GROUPED, IMAGE, TEXT, VISION, _image, _lively, _one_image_each, _rows, _with_images
from tiny_models import NO_DROPOUT

import fastpeft as fp
from fastpeft.caching.frozen import source_of
from fastpeft.forms import as_written, cache_by_forward

pytestmark = pytest.mark.usefixtures("one_thread")


def mixed(x: torch.Tensor) -> torch.Tensor:
    return x + x.mean(1, keepdim=True)


def of_tokens(output):
    return mixed(output) if isinstance(output, torch.Tensor) else (mixed(output[0]), *output[1:])


def of_state(output):
    output.last_hidden_state = mixed(output.last_hidden_state)
    return output


def of_logits(output):
    output.loss = output.loss + output.logits.pow(2).mean()
    return output


def of_features(output):
    output.pooler_output = [each + output.last_hidden_state.mean() for each in output.pooler_output]
    return output


BERT = TEXT | NO_DROPOUT | {"num_labels": 3}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "hidden_dropout": 0.0}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "hidden_dropout": 0.0, "attention_dropout": 0.0}
SEEN = {"vision_config": T.CLIPVisionConfig(**VISION), "text_config": T.LlamaConfig(**GROUPED), "image_token_index": IMAGE}

WRAPPED = {  # a method of a class, what is done to what it returns, a model
    "llava.modeling_llava.LlavaModel.get_image_features": (of_features, lambda: T.LlavaForConditionalGeneration(T.LlavaConfig(**SEEN))),
    "mistral.modeling_mistral.MistralMLP.forward": (of_tokens, lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED))),
    "bloom.modeling_bloom.BloomBlock.forward": (of_tokens, lambda: T.BloomForCausalLM(T.BloomConfig(**BLOOM))),
    "falcon.modeling_falcon.FalconModel.forward": (of_state, lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON, alibi=False))),
    "bert.modeling_bert.BertEncoder.forward": (of_state, lambda: T.BertForTokenClassification(T.BertConfig(**BERT))),
    "bert.modeling_bert.BertForTokenClassification.forward": (of_logits, lambda: T.BertForTokenClassification(T.BertConfig(**BERT))),
    "vit.modeling_vit.ViTModel.forward": (of_state, lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=3))),
}


def batch_of(model) -> dict:
    if isinstance(model, T.ViTForImageClassification):
        return {"pixel_values": _image(), "labels": torch.tensor([0, 1, 0])}
    if isinstance(model, T.LlavaForConditionalGeneration):
        given = _with_images(4, _one_image_each)("padded", None)
        return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    ids, mask = _rows("padded")
    labels = (ids % 3).masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("path", WRAPPED)
def test_a_wrapped_method_counts(path, monkeypatch):
    """Also where a model of the class has run before it was wrapped."""
    change, make = WRAPPED[path]
    home, name, method = path.rsplit(".", 2)
    cls = getattr(importlib.import_module(f"transformers.models.{home}"), name)
    plain, own = _lively(make(), torch.float64).train(), getattr(cls, method)
    given, before = batch_of(plain), copy.deepcopy(plain)
    fp.optimize(before, lean_logits=True)
    assert_same(step(before, given), step(plain, given), path)

    @functools.wraps(own)
    def wrapper(self, *args, **kwargs):
        return change(own(self, *args, **kwargs))

    monkeypatch.setattr(cls, method, wrapper)
    fused = copy.deepcopy(plain)
    fp.optimize(fused, lean_logits=True)
    assert_same(step(fused, given), step(plain, given), path)


def test_decorators_of_transformers_are_seen_through():
    from transformers.models.mistral.modeling_mistral import MistralModel

    assert MistralModel.forward.__wrapped__ and not hasattr(as_written(MistralModel.forward), "__wrapped__")
    wrapper = functools.wraps(MistralModel.forward)(lambda *args: None)
    assert as_written(wrapper) is wrapper


def test_what_is_read_of_a_class_follows_its_forward(monkeypatch):
    class Module(torch.nn.Module):
        def forward(self):
            pass

    read = []
    name = cache_by_forward(lambda cls: (read.append(cls), cls.forward.__name__)[1])
    assert [name(Module), name(Module), len(read)] == ["forward", "forward", 1]
    monkeypatch.setattr(Module, "forward", lambda self: None)
    assert name(Module) == "<lambda>"


def test_a_layer_that_is_wrapped_later(monkeypatch):
    """What no module of ours stands for is called as it is then."""
    from transformers.models.bloom.modeling_bloom import BloomBlock

    plain = _lively(T.BloomForCausalLM(T.BloomConfig(**BLOOM)), torch.float64).train()
    fused, given, own = copy.deepcopy(plain), batch_of(plain), BloomBlock.forward
    fp.optimize(fused, lean_logits=True)
    assert_same(step(fused, given), step(plain, given))
    monkeypatch.setattr(BloomBlock, "forward", functools.wraps(own)(lambda self, *args, **kwargs: of_tokens(own(self, *args, **kwargs))))
    assert_same(step(fused, given), step(plain, given))


def test_what_is_constant_is_not_told_of_wrapped_code(monkeypatch):
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    own = CLIPVisionModel.forward
    assert source_of(CLIPVisionModel, "forward") is not None
    monkeypatch.setattr(CLIPVisionModel, "forward", functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs)))
    assert source_of(CLIPVisionModel, "forward") is None
