"""Which stacks may run on flattened tokens: every module row-wise or told the layout, and nobody looking."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import fastpeft as fp
from fastpeft.fused.stack.flatten import sees_no_values, why_not_flat
from fastpeft.methods.base import has_hooks


@pytest.fixture
def model():
    config = LlamaConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    model = LlamaModel(config)
    fp.optimize(model)
    return model


def reason(model):
    return why_not_flat(model, model.layers, model.norm)


PLACES = ["layers.0", "layers.1.self_attn", "layers.0.mlp", "layers.1.self_attn.q_proj", "layers.0.mlp.act_fn", "norm"]
HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_anywhere(model, place, kind):
    assert reason(model) == ""
    hook = getattr(model.get_submodule(place), kind)(lambda *args: None)
    assert reason(model) == f"{place} has hooks"
    hook.remove()
    assert reason(model) == ""


def test_hooks_on_every_module(model):
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert "every module" in reason(model) and has_hooks(model)
    hook.remove()
    assert reason(model) == "" and not has_hooks(model)


def test_a_forward_of_its_own(model):
    linear = model.layers[0].mlp.up_proj
    linear.forward = lambda x: x
    assert reason(model) == "layers.0.mlp.up_proj has a forward of its own"
    del linear.forward
    assert reason(model) == ""


def test_other_modules(model):
    class Probe(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    act = model.layers[1].mlp.act_fn
    model.layers[1].mlp.act_fn = Probe()
    assert reason(model) == "layers.1.mlp.act_fn (Probe) is not known to treat every token by itself"
    model.layers[1].mlp.act_fn = act
    assert reason(model) == ""
    model.layers[0].mlp.probe = Probe()
    assert "layers.0.mlp.probe (Probe)" in reason(model)
    del model.layers[0].mlp.probe
    fp.restore(model)
    assert "is not known" in reason(model)


def test_hooks_that_see_no_values(model):
    model.layers[0].register_forward_hook(sees_no_values(lambda *args: None))
    assert reason(model) == "" and not has_hooks(model.layers[0])
    model.layers[0].register_forward_hook(lambda *args: None)
    assert reason(model) == "layers.0 has hooks" and has_hooks(model.layers[0])


def test_transformers_collecting_hooks_sleep_between_calls(model):
    model(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True)
    assert reason(model) == ""


def test_a_copy_looks_at_itself(model):
    assert reason(model) == ""
    other = copy.deepcopy(model)
    other.norm.register_forward_hook(lambda *args: None)
    assert reason(other) == "norm has hooks" and reason(model) == ""


def test_peft_layers(model):
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    fp.optimize(made)
    assert reason(model) == ""
    made.add_adapter("dora", peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True))
    fp.optimize(made)
    assert reason(model) == ""  # weights alone decide DoRA's norms
    made.add_adapter("arrow", peft.LoraConfig(target_modules=["v_proj"], alora_invocation_tokens=[1]))
    fp.optimize(made)
    assert "layers.0.self_attn.v_proj has a LoRA of its own kind" in reason(model)
