"""optimize() and restore(): any BLIP of transformers or PEFT, whole or in part, there and back."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.activations import GELUActivation
from transformers.models.blip import modeling_blip, modeling_blip_text
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

import fastpeft as fp
from fastpeft.fused.layers.blocks import FusedBlipTextLayer
from fastpeft.fused.stack.blip import FusedBlipTextModel
from fastpeft.models.clip import vision_config
from fastpeft.models.llama import SIZES
from fastpeft.models.miss import miss_config
from fastpeft.registry import is_fused, known_classes

KINDS = tuple(  # of a MISS
    cls
    for cls in known_classes()
    if cls.__module__ in (modeling_blip.__name__, modeling_blip_text.__name__)
    or cls in (nn.LayerNorm, nn.Linear, nn.Dropout, GELUActivation)
    if not cls.__name__.startswith("BlipFor")
)
# what of a BLIP holds parameters and has no fused form
NO_FUSED_FORM = (
    modeling_blip.BlipVisionEmbeddings,
    modeling_blip_text.BlipTextEmbeddings,
    modeling_blip_text.BlipTextPredictionHeadTransform,
)


@pytest.fixture
def config(miss):
    return miss_config(tiny=True, **miss.SMALL)


def transformers_model(cls, config):
    torch.manual_seed(4)
    return cls(config).double().eval()


def ours(model):
    return [name for name, m in model.named_modules() if is_fused(m)]


def classes(model):
    return [(name, type(m)) for name, m in model.named_modules()]


def test_a_plain_blip_there_and_back(miss, config):
    model, inputs = transformers_model(BlipForQuestionAnswering, config), miss.batch()
    before, ids = classes(model), [id(p) for p in model.parameters()]
    want, wanted = miss.step(model.train(), inputs)
    report = fp.optimize(model)
    assert [name for name, _ in report.swapped] == ours(model)
    assert dict(report.swapped)["text_decoder.bert"] == "BlipTextModel"
    assert [name for name, _ in report.skipped] == [name for name, m in model.named_modules() if type(m) in NO_FUSED_FORM]
    assert [id(p) for p in model.parameters()] == ids
    loss, gradients = miss.step(model, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
    assert fp.restore(model) == []
    assert classes(model) == before
    assert miss.step(model, inputs)[0] == want


@pytest.mark.parametrize(
    "left", [*KINDS, *itertools.combinations(KINDS, len(KINDS) - 1)], ids=lambda kinds: getattr(kinds, "__name__", None)
)
def test_filters_leave_the_outputs_alone(miss, config, left):
    """Every kind of module left out alone, and every kind swapped alone: ours and transformers' run together."""
    left = (left,) if isinstance(left, type) else left
    model, inputs = transformers_model(BlipForQuestionAnswering, config), miss.batch()
    want, wanted = miss.step(model.train(), inputs)
    answers = model.eval().generate(**miss.questions(inputs), max_length=5)
    report = fp.optimize(model, filter_fn=lambda module, name: not isinstance(module, left))
    swapped = {dict(report.swapped)[name] for name in ours(model)}
    assert swapped.isdisjoint({kind.__name__ for kind in left})
    assert {reason for name, reason in report.skipped if isinstance(model.get_submodule(name), left)} == {"left out by filter_fn"}
    loss, gradients = miss.step(model.train(), inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
    assert torch.equal(model.eval().generate(**miss.questions(inputs), max_length=5), answers)


def test_filters_by_name(miss, config):
    model, inputs = transformers_model(BlipForQuestionAnswering, config), miss.batch()
    want, wanted = miss.step(model.train(), inputs)
    one = "text_encoder.encoder.layer.1.crossattention.self"
    report = fp.optimize(model, filter_fn=lambda module, name: name != one)
    skipped = {name: reason for name, reason in report.skipped if type(model.get_submodule(name)) not in NO_FUSED_FORM}
    assert skipped.pop(one) == "left out by filter_fn"
    # what hands masks down must read them below: its parents stay as well, and say why
    assert skipped.keys() == {"text_encoder", "text_encoder.encoder.layer.1", "text_encoder.encoder.layer.1.crossattention"}
    assert skipped["text_encoder"].endswith("inside it stays as it is")
    assert isinstance(model.text_decoder.bert, FusedBlipTextModel)
    loss, gradients = miss.step(model, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
    fp.optimize(model)  # the rest, later
    assert isinstance(model.text_encoder, FusedBlipTextModel)
    assert miss.step(model, inputs)[0] == pytest.approx(want, rel=1e-12)


def test_subclasses_stay(miss, config):
    class Other(modeling_blip_text.BlipTextSelfAttention):
        def forward(self, *args, **kwargs):
            context, probabilities = super().forward(*args, **kwargs)
            return context * 2, probabilities

    class OtherNorm(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) + 1

    model, inputs = transformers_model(BlipForQuestionAnswering, config), miss.batch()
    model.text_decoder.bert.encoder.layer[0].attention.self.__class__ = Other
    model.vision_model.post_layernorm.__class__ = OtherNorm
    want = miss.step(model, inputs)[0]
    report = fp.optimize(model)
    assert type(model.text_decoder.bert) is modeling_blip_text.BlipTextModel and type(model.vision_model.post_layernorm) is OtherNorm
    assert dict(report.skipped)["text_decoder.bert"] == "encoder.layer.0.attention.self inside it stays as it is"
    assert miss.step(model, inputs)[0] == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="a prefix needs fastpeft's own"):
        fp.adapt(model, dec="Prefix")


@torch.no_grad()
def test_other_models_of_the_same_modules(miss, config):
    inputs = miss.batch()
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    calls = {
        BlipForConditionalGeneration: [
            (lambda m: m(pixel_values=pixels, input_ids=ids, labels=ids), ("loss", "logits", "image_embeds")),
            (lambda m: m(pixel_values=pixels, input_ids=ids), ("logits",)),
        ],
        BlipForImageTextRetrieval: [
            (lambda m: m(pixel_values=pixels, input_ids=ids), ("itm_score", "question_embeds")),
            (lambda m: m(pixel_values=pixels, input_ids=ids, use_itm_head=False), ("itm_score",)),
        ],
        BlipModel: [
            (
                lambda m: m(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), return_loss=True),
                ("loss", "logits_per_image", "text_embeds", "image_embeds"),
            ),
        ],
    }
    for cls, cases in calls.items():
        theirs = transformers_model(cls, config)
        model = copy.deepcopy(theirs)
        assert fp.optimize(model).swapped
        for call, fields in cases:
            want, got = call(theirs), call(model)
            for field in fields:
                torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=1e-9, atol=1e-9, msg=f"{cls.__name__}.{field}")
    theirs = transformers_model(BlipForConditionalGeneration, config)
    model = copy.deepcopy(theirs)
    fp.optimize(model)
    for search in ({}, {"num_beams": 3}):
        assert torch.equal(
            *(m.generate(pixel_values=pixels, input_ids=ids[:, :4].clone(), max_length=8, **search) for m in (theirs, model))
        )


def test_a_decoder_without_cross_attention(miss):
    """BlipTextModel alone, and one that is no decoder: no cross-attention in it."""
    text = miss_config(tiny=True, **miss.SMALL).text_config
    text.is_decoder = False
    theirs = modeling_blip_text.BlipTextModel(text).double().eval()
    model = copy.deepcopy(theirs)
    assert ("", "BlipTextModel") in fp.optimize(model).swapped
    ids = miss.batch()["input_ids"]
    with torch.no_grad():
        for given in ({}, {"attention_mask": torch.ones_like(ids)}):
            want, got = theirs(ids, **given), model(ids, **given)
            torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=0, atol=1e-10)
            torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=0, atol=1e-10)


def peft_model(miss, kind):
    peft = pytest.importorskip("peft")
    config = {
        "LoRA": lambda: peft.LoraConfig(r=3, target_modules=["query", "value", "qkv", "patch_embedding", "output.dense"]),
        "LoRA on the head": lambda: peft.LoraConfig(r=3, target_modules=["decoder", "query"]),
        "IA3": lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        "LayerNorm": lambda: peft.LNTuningConfig(target_modules=["LayerNorm", "layer_norm1"]),
        "DoRA": lambda: peft.LoraConfig(r=3, target_modules=["query", "value"], use_dora=True),
    }[kind]()
    torch.manual_seed(0)
    model = peft.get_peft_model(miss.plain(miss.build()), config)
    miss.scatter_trained(model)
    return miss.without_dropout(model)


@pytest.mark.parametrize("kind", ["LoRA", "LoRA on the head", "IA3", "LayerNorm", "DoRA"])
def test_peft_models_train_the_same(miss, kind):
    model, inputs = peft_model(miss, kind), miss.batch()
    want, wanted = miss.step(model, inputs)
    assert wanted and all("lora" in name or "ia3" in name or "ln_tuning" in name for name in wanted)
    report = fp.optimize(model)
    assert len(report.swapped) > 20
    fused = {"LoRA": "lora.Linear", "LoRA on the head": "lora.Linear", "IA3": "ia3.Linear"}.get(kind)
    assert fused is None or fused in dict(report.swapped).values()
    assert kind != "DoRA" or ("lora.Linear" not in dict(report.swapped).values() and "DoraLinearVariant" in str(report))
    loss, gradients = miss.step(model, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)
    padded = miss.batch(padded=True)
    together = miss.step(model, padded)[0]
    assert together == pytest.approx(sum(miss.step(model, miss.alone(padded, i))[0] for i in range(3)) / 3, rel=1e-12)
    fp.restore(model)
    assert miss.step(model, inputs)[0] == pytest.approx(want, rel=1e-12)


def test_a_peft_prefix_runs_in_ours(miss):
    """PEFT hands its prefix over as a cache. In transformers' encoder cross-attention writes into that cache; ours keeps them apart."""
    peft = pytest.importorskip("peft")
    model, inputs = miss.build(), miss.batch()
    states = torch.randn(3, 6, 32, dtype=torch.float64)
    given = {"input_ids": inputs["labels"], "attention_mask": torch.ones_like(inputs["labels"]), "encoder_hidden_states": states}
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(miss.plain(model).text_decoder, config)
    miss.scatter_trained(theirs)
    theirs.eval()
    mixed = copy.deepcopy(theirs)
    fp.optimize(mixed)
    with torch.no_grad():
        torch.testing.assert_close(mixed(**given).logits, theirs(**given, use_cache=True).logits, rtol=0, atol=1e-6)
    own = fp.adapt(model, dec=fp.PTv2(num_virtual_tokens=4))
    with torch.no_grad():
        own.text_decoder.bert.prefix_encoder.embedding.weight.copy_(theirs.prompt_encoder["default"].embedding.weight)
    for network in (mixed, own.text_decoder):
        network.zero_grad()
        network(**given, labels=inputs["labels"]).loss.backward()
    got = mixed.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(own.text_decoder.bert.prefix_encoder.embedding.weight.grad, got.to(torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("plan", ["T/T/T", "LoRA/LoRA/LoRA", "IA3/IA3/IA3", "LayerNorm/Attention/FFN"])
def test_adapted_models_there_and_back(miss, plan):
    model, inputs = miss.build(plan), miss.batch()
    before, state = classes(model), list(model.state_dict())
    want = miss.step(model, inputs)[0]
    assert fp.restore(model) == [] and not ours(model)
    assert miss.step(model, inputs)[0] == pytest.approx(want, rel=1e-12)
    fp.optimize(model)
    assert classes(model) == before and list(model.state_dict()) == state
    assert miss.step(model, inputs)[0] == pytest.approx(want, rel=1e-12)


def test_what_a_prefix_needs_stays(miss):
    model, inputs = miss.build("F/F/Prefix"), miss.batch()
    want = miss.step(model, inputs)[0]
    stayed = fp.restore(model)
    assert all(name.startswith("text_decoder.bert") and "needed by the prefix in text_decoder.bert" in reason for name, reason in stayed)
    assert {name for name, _ in stayed if name.count(".") == 1} == {"text_decoder.bert"}
    assert set(ours(model)) == {name for name, _ in stayed}
    assert miss.step(model, inputs)[0] == pytest.approx(want, rel=1e-12)


def test_hooks_and_references_stay(miss, config):
    model = transformers_model(BlipForQuestionAnswering, config)
    module, calls = model.text_decoder.bert.encoder.layer[0], []
    module.register_forward_hook(lambda *_: calls.append("hook"))
    attention = model.vision_model.encoder.layers[0].self_attn
    fp.optimize(model)
    assert model.text_decoder.bert.encoder.layer[0] is module and isinstance(module, FusedBlipTextLayer)
    assert model.vision_model.encoder.layers[0].self_attn is attention and isinstance(attention, modeling_blip.BlipAttention)
    model(**miss.batch())
    assert calls == ["hook"]


def small_models(miss, config):
    """(model, inputs, what to measure) of each backbone."""
    ids = torch.randint(1, 90, (2, 7))
    llama = LlamaForCausalLM(LlamaConfig(**SIZES["llama-tiny"] | {"num_hidden_layers": 1})).double()
    yield llama, {"input_ids": ids, "labels": ids}, lambda out: out.loss
    vision = CLIPVisionModel(vision_config("tiny", num_hidden_layers=1, hidden_act="gelu")).double()
    yield vision, {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}, lambda out: out.last_hidden_state.square().mean()
    yield transformers_model(BlipForQuestionAnswering, config), miss.batch(), lambda out: out.loss


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_what_a_layer_around_would_compute_itself(miss, config, training):
    """Each linear layer, norm and activation with a hook that changes its output, as pruning and probes have them."""
    for model, inputs, measure in small_models(miss, config):
        miss.without_dropout(model).train(training)
        seen = set()

        def change(name, module, args, out, seen=seen):
            seen.add(name)
            return out * 1.1

        for name, module in model.named_modules():
            if not list(module.children()) and not isinstance(module, nn.Embedding | nn.Dropout | nn.Conv2d | LlamaRotaryEmbedding):
                module.register_forward_hook(partial(change, name))
        want, ran = measure(model(**inputs)), set(seen)
        seen.clear()
        fp.optimize(model)
        assert measure(model(**inputs)).item() == pytest.approx(want.item(), rel=1e-6)  # LlamaRMSNorm's own statistics are float32
        assert seen == ran and len(ran) > 5


def test_a_forward_of_its_own_stays():
    """accelerate puts one over a module's class; another class would change nothing, and the report says so."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES["llama-tiny"] | {"num_hidden_layers": 1})).eval()
    ids, layer = torch.randint(1, 90, (2, 7)), model.model.layers[0]
    for module in (layer.mlp, layer.self_attn.v_proj, layer.post_attention_layernorm):
        module.forward = lambda x, old=module.forward: old(x) * 1.5
    want = model(ids).logits
    report = fp.optimize(model)
    assert ("model.layers.0.mlp", "has a forward of its own over its class's, as accelerate's offloading gives it") in report.skipped
    assert type(layer.mlp) is LlamaMLP
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_dropouts_that_stay():
    """Everything dropped, or its input overwritten: PyTorch's own."""
    model = nn.Sequential(nn.Dropout(1.0), nn.Dropout(0.5, inplace=True), nn.Dropout(0.5))
    report = fp.optimize(model)
    assert report.skipped == [("0", "drops everything"), ("1", "works in place")] and report.swapped == [("2", "Dropout")]
    assert not model(torch.randn(3)).any()


def test_saving_and_loading_an_optimised_model(miss, config, tmp_path):
    model, inputs = transformers_model(BlipForQuestionAnswering, config), miss.batch()
    plain = copy.deepcopy(model)
    fp.optimize(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = BlipForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.float64)
    assert not ours(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, plain(**inputs).loss)
        fresh = transformers_model(BlipForQuestionAnswering, config)
        fp.optimize(fresh)
        fresh.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fresh(**inputs).loss, plain(**inputs).loss, rtol=1e-12, atol=0)
