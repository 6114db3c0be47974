"""Excitor in a list of layers, and image encoders by size."""

import pytest
import torch

import fastpeft as fp
from fastpeft.models import resolve
from fastpeft.plan import build


def excited(model) -> list[int]:
    layers = model.model.layers
    return [n for n, layer in enumerate(layers) if getattr(layer.self_attn, "excitor", None) is not None]


def test_a_list_of_layers(tmp_path):
    model = fp.build("llama-tiny", seed=1)
    last = len(model.model.layers) - 1
    fp.adapt(model, {"llm": {"Excitor": {"layers": [last, 0]}}})
    assert excited(model) == [0, last]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "excitor" in name:
                p.normal_()
    ids = torch.randint(3, 50, (2, 9))
    fp.save_adapter(model, tmp_path / "adapter")
    again = fp.load_adapter(fp.build("llama-tiny", seed=1), tmp_path / "adapter")
    assert excited(again) == [0, last] and again.fastpeft_plan == model.fastpeft_plan
    plain = fp.build("llama-tiny", seed=1)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not torch.allclose(plain(ids).logits, model(ids).logits)


def test_a_number_and_a_list_agree():
    counted = fp.build("llama-tiny")
    fp.adapt(counted, {"llm": {"Excitor": {"layers": 1}}})
    listed = fp.build("llama-tiny")
    fp.adapt(listed, {"llm": {"Excitor": {"layers": excited(counted)}}})
    assert excited(listed) == excited(counted) and fp.count(listed) == fp.count(counted)


@pytest.mark.parametrize("layers", [[], [0, 0], [-1], [1.0], ["0"], [True]])
def test_lists_that_are_none(layers):
    with pytest.raises(ValueError, match="a list of layers holds different whole numbers"):
        fp.Excitor(layers=layers)


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="there is no layer 99"):
        fp.adapt(fp.build("llama-tiny"), {"llm": {"Excitor": {"layers": [0, 99]}}})


@pytest.mark.parametrize(
    ("model", "size", "tokens", "width"),
    [("excitor-7b", "B/16", 197, 512), ("excitor-7b", "L/14", 257, 768), ("excitor-7b", "L/14@336", 577, 768)],
)
def test_image_encoders_of_excitor(model, size, tokens, width):
    network = build(resolve(model, size), device="meta")
    images = network.encode_images(torch.empty(2, 3, *[network.config.vision_config.image_size] * 2, device="meta"))
    assert tuple(images.shape) == (2, tokens, width)


def test_lavin_takes_six_tokens_of_either():
    for size in ("B/16", "L/14"):
        assert build(resolve("lavin-7b", size), device="meta").config.visual_tokens == 6


NONE = [("miss", "L/14", "no choice"), ("excitor-7b", "H/14", "one of B/16"), ("llama-7b", "L/14", "no choice")]


@pytest.mark.parametrize(("model", "size", "says"), NONE)
def test_image_encoders_that_cannot_be(model, size, says):
    with pytest.raises(ValueError, match=says):
        resolve(model, size)
