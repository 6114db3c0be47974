"""(IA)^3: the definition, zeros, its place in attention, and PEFT's gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft as fp
from fastpeft.methods import Part
from fastpeft.models import parts_of

PART = Part("layers", "", ia3=("layer",), ia3_feedforward=())


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_definition(feedforward, lora):
    layer, root = nn.Linear(6, 4, dtype=torch.float64), nn.Sequential()
    root.add_module("layer", layer)
    root.requires_grad_(False)
    if lora:
        fp.LoRA(r=2, target_modules=("layer",)).attach(root, PART)
        nn.init.normal_(layer.lora_B)
    fp.IA3(feedforward_modules=("layer",) if feedforward else ()).attach(root, PART)
    assert torch.equal(layer.ia3_l, torch.ones(6 if feedforward else 4))
    with torch.no_grad():
        layer.ia3_l.normal_()[0] = 0.0  # nothing divides by it
    weight = layer.weight + (layer.scaling * layer.lora_B @ layer.lora_A if lora else 0)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    want = F.linear(x * layer.ia3_l, weight, layer.bias) if feedforward else F.linear(x, weight, layer.bias) * layer.ia3_l
    got, dy = layer(x), torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, (x, layer.ia3_l), dy), torch.autograd.grad(want, (x, layer.ia3_l), dy)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_default_targets(miss):
    model = miss.build("IA3/IA3/IA3")
    inputs = {name for name, m in model.named_modules() if getattr(m, "ia3_l", None) is not None and m.ia3_feedforward}
    outputs = {name for name, m in model.named_modules() if getattr(m, "ia3_l", None) is not None} - inputs
    assert {name.split(".", 1)[1] for name in inputs if "vision" in name} == {f"encoder.layers.{i}.mlp.fc2" for i in range(2)}
    layers = [f"{host}.encoder.layer.{i}" for host in ("text_encoder", "text_decoder.bert") for i in range(2)]
    dense = {f"{layer}.{where}output.dense" for layer in layers for where in ("attention.", "crossattention.", "")}
    assert {name for name in inputs if "vision" not in name} == dense
    assert outputs == {f"{layer}.{a}.self.{kv}" for layer in layers for a in ("attention", "crossattention") for kv in ("key", "value")}


def test_one_of_key_and_value_alone(miss):
    inputs = miss.batch()
    for target in ("key", "value"):
        model = miss.build()
        fp.adapt(model, jtm=fp.IA3(target_modules=(target,), feedforward_modules=()))
        miss.scatter_trained(model)
        loss, gradients = miss.step(model, inputs)
        want, theirs = miss.step(miss.plain(model), inputs)
        assert loss == pytest.approx(want, rel=1e-12) and loss != pytest.approx(miss.step(miss.build("F/F/T", scatter=0), inputs)[0])
        miss.assert_same(gradients, theirs)


def test_equivalence_is_about_outputs(miss):
    part = parts_of(miss.build())[1]
    assert fp.IA3().equivalent(fp.IA3(target_modules=("output.dense", "value", "key")), part)
    assert not fp.IA3().equivalent(fp.IA3(target_modules=("key",)), part)
    assert not fp.IA3().equivalent(fp.LoRA(), part)
    assert not fp.IA3(target_modules="ab").equivalent(fp.IA3(target_modules="ba"), part)  # regular expressions, not sets of letters


def test_nothing_to_attach_to(miss):
    with pytest.raises(ValueError, match="no linear layer of 'jtm' matches"):
        fp.adapt(miss.build(), jtm=fp.IA3(target_modules=("nothing",)))


def test_gradients_are_those_of_peft(same_gradients_as_peft):
    same_gradients_as_peft("IA3/IA3/IA3")
