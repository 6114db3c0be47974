"""F, T, LayerNorm, Attention, FFN: exactly which parameters are trained, and PEFT's gradients for norms."""

import pytest
from torch import nn

import fastpeft as fp
from fastpeft.models import parts_of


def trained(model, part):
    root = dict(zip(("vit", "jtm", "dec"), (p.of(model) for p in parts_of(model))))[part]
    return {name for name, p in root.named_parameters() if p.requires_grad}


def text(piece, host=""):
    return {f"{host}encoder.layer.{i}.{piece}.{p}" for i in range(2) for p in ("weight", "bias")}


def test_frozen_and_full(miss):
    model = fp.adapt(miss.build(), "F/T/F")
    assert not trained(model, "vit") and not trained(model, "dec")
    assert trained(model, "jtm") == dict(model.text_encoder.named_parameters()).keys()


@pytest.mark.parametrize("part", ["vit", "jtm", "dec"])
def test_norms(miss, part):
    model = fp.adapt(miss.build(), **{part: "LayerNorm"})
    root = next(p for p in parts_of(model) if p.name == part).of(model)
    norms = {name for name, module in root.named_modules() if isinstance(module, nn.LayerNorm)}
    assert trained(model, part) == {f"{name}.{key}" for name in norms for key in ("weight", "bias")}
    assert len(norms) == {"vit": 2 * 2 + 1, "jtm": 3 * 2 + 1, "dec": 3 * 2 + 2}[part]


@pytest.mark.parametrize("part, host", [("jtm", ""), ("dec", "bert.")])
def test_attention_with_its_norm_and_ffn_without(miss, part, host):
    linears = {f"{a}.self.{name}" for a in ("attention", "crossattention") for name in ("query", "key", "value")}
    pieces = linears | {f"{a}.output.{name}" for a in ("attention", "crossattention") for name in ("dense", "LayerNorm")}
    model = fp.adapt(miss.build(), **{part: "Attention"})
    assert trained(model, part) == set().union(*(text(piece, host) for piece in pieces))
    model = fp.adapt(miss.build(), **{part: "FFN"})
    assert trained(model, part) == text("intermediate.dense", host) | text("output.dense", host)


def test_attention_and_ffn_of_the_vision_part(miss):
    model = fp.adapt(miss.build(), vit="Attention")
    assert {name.split(".", 3)[3] for name in trained(model, "vit")} == {
        f"self_attn.{name}.{key}" for name in ("qkv", "projection") for key in ("weight", "bias")
    }
    model = fp.adapt(miss.build(), vit="FFN")
    assert {name.split(".", 3)[3] for name in trained(model, "vit")} == {
        f"mlp.{name}.{key}" for name in ("fc1", "fc2") for key in ("weight", "bias")
    }


def test_combined_with_adapters(miss):
    model = fp.adapt(miss.build(), jtm="LoRA+Attention", dec="T+IA3")
    attention = trained(fp.adapt(miss.build(), jtm="Attention"), "jtm")
    lora = trained(fp.adapt(miss.build(), jtm="LoRA"), "jtm")
    assert trained(model, "jtm") == attention | lora
    assert trained(model, "dec") == dict(model.text_decoder.named_parameters()).keys()
    parts = {p.name: p for p in parts_of(model)}
    saved = [set(m.tensors(model.text_encoder, parts["jtm"])) for m in model.fastpeft_plan.treatments["jtm"]]
    assert saved[1] == attention and not saved[0] & saved[1]  # each saves its own


def test_gradients_of_norms_are_those_of_peft(same_gradients_as_peft):
    same_gradients_as_peft("F/LayerNorm/LayerNorm")
