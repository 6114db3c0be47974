"""Uses that broke the drop-in once: each compares a model with its fused copy."""

import copy

import peft
import pytest
import torch
from small_steps import SINGLE, same, step
from tiny_models import tiny
from torch import nn
from torch.nn.utils import parametrize
from transformers import BlipConfig, BlipForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.fused.head.outputs import lean_logits

IDS = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **SMALL | options)).double().train()


def blip() -> BlipForConditionalGeneration:
    torch.manual_seed(0)
    text = {"vocab_size": 96, "encoder_hidden_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    text |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "max_position_embeddings": 32}
    config = BlipConfig(text_config=SMALL | text, vision_config=SMALL | {"image_size": 32, "patch_size": 8})
    return BlipForConditionalGeneration(config).double()


def adapted(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """With every adapter away from its start, where it changes nothing."""
    model = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double() + 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def fused(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    fp.optimize(model)
    return model


class Half(nn.Module):
    """Of a user who replaces attention."""

    def forward(self, hidden_states, **_):
        return hidden_states / 2, None


@pytest.mark.parametrize("before", [True, False])
def test_an_attention_of_the_users_own_in_a_llama(before):
    model = llama()
    other = model if before else fused(model)
    for one in {model, other}:
        one.model.layers[0].self_attn = Half()
    other = fused(other)
    want, got = (m(input_ids=IDS, labels=IDS) for m in (model, other))
    torch.testing.assert_close(got.loss.float(), want.loss.float())
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lean", [True, False])
def test_a_mask_of_one_row_for_the_whole_batch(lean):
    """transformers drops it where it masks nothing."""
    model = llama()
    other = fused(model)
    fp.optimize(other, lean_logits=lean)
    want, got = (m(input_ids=IDS, attention_mask=torch.ones(1, 9), labels=IDS).loss.float() for m in (model, other))
    torch.testing.assert_close(got, want)


def test_a_cache_holds_the_values_that_ia3_scaled_in_llama():
    model = adapted(llama(num_key_value_heads=2), peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    want, got = (m(input_ids=IDS, use_cache=True) for m in (model, fused(model)))
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
    for one, other in zip(got.past_key_values.layers, want.past_key_values.layers):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)


def test_a_cache_holds_the_keys_and_values_that_ia3_scaled_in_blip():
    model = adapted(blip(), peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])).eval()
    image = torch.randn(3, 5, 64, dtype=torch.float64)
    inputs = {"input_ids": IDS, "encoder_hidden_states": image, "use_cache": True}
    want, got = (m.base_model.model.text_decoder(**inputs) for m in (model, fused(model)))
    torch.testing.assert_close(got.logits, want.logits)
    for name in ("self_attention_cache", "cross_attention_cache"):
        for one, other in zip(getattr(got.past_key_values, name).layers, getattr(want.past_key_values, name).layers):
            torch.testing.assert_close(one.keys, other.keys)
            torch.testing.assert_close(one.values, other.values)
    # the next token reads the cache
    more = [
        m.base_model.model.text_decoder(**inputs | {"input_ids": IDS[:, :1], "past_key_values": out.past_key_values}).logits
        for m, out in ((model, want), (fused(model), got))
    ]
    torch.testing.assert_close(more[1], more[0])


def test_logits_first_read_in_inference_mode_keep_their_gradient():
    model = llama()
    model.lm_head.requires_grad_(False)
    fp.optimize(model)
    output = model(input_ids=IDS, labels=IDS)
    with torch.inference_mode():
        assert output.logits.shape == (3, 9, 96)
    output.logits.square().mean().backward()
    assert all(p.grad is not None for p in model.model.parameters())


def of_item(output):
    """A method that is bound before the logits are read."""
    output.__setitem__("logits", output["logits"] * 2)
    return output


def of_none(output):
    output.logits = None
    return output


def without_attribute(output):
    del output.logits
    return output


@pytest.mark.parametrize("change", [of_item, of_none, without_attribute])
def test_outputs_whose_logits_are_changed_by_hand(change):
    model = llama()
    model.lm_head.requires_grad_(False)
    want, got = (change(m(input_ids=IDS, labels=IDS)) for m in (model, fused(model)))
    assert list(got) == list(want)
    assert hasattr(got, "logits") == hasattr(want, "logits")
    assert (getattr(got, "logits", None) is None) == (getattr(want, "logits", None) is None)
    torch.testing.assert_close(got["logits"], want["logits"], atol=1e-5, rtol=1e-5)


def test_lean_logits_of_a_model_that_is_given_back_inside():
    model = fused(llama())
    with lean_logits(model):
        fp.restore(model)
    assert model(input_ids=IDS, labels=IDS).logits is not None
    fp.optimize(model)
    with lean_logits(model):
        fp.optimize(model, lean_logits=False)
    assert model(input_ids=IDS, labels=IDS).logits is not None


def test_a_copy_of_a_wrapper_is_a_wrapper():
    """PEFT's models and torch.compile's hand unknown attributes on to what they wrap."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], init_lora_weights=False)
    model = fused(peft.get_peft_model(llama(), config))
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and type(twin.base_model) is type(model.base_model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert twin.peft_config.keys() == model.peft_config.keys()
    torch.testing.assert_close(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    compiled = torch.compile(model)
    assert type(copy.deepcopy(compiled)) is type(compiled)


@pytest.mark.parametrize("name", ["dinov2", "llama", "olmoe"])
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_router_logits"])
def test_outputs_that_hooks_collect_under_checkpointing(name, asked):
    """In backward, nothing is collected: the layers that run again must take the form that they took before."""
    model, given = tiny(name)
    model.set_attn_implementation("eager")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    other = fused(model)
    same(*(step(m, given("full"), **{asked: True}) for m in (other, model)), **SINGLE)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 1.5 * weight


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_that_are_parametrized_after_the_exchange(name):
    """``torch.nn.utils.parametrize`` makes a class of the fused one: GPT-2's weights lie [in, out] in it, too."""
    plain, batch = tiny(name)
    model = fused(plain.train())
    for root in (plain, model):
        for layer in [m for m in root.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2]:
            parametrize.register_parametrization(layer, "weight", Scaled())
    same(step(model, batch("padded")), step(plain, batch("padded")), **SINGLE)
