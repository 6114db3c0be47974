"""What optimize() says of a model: what was exchanged, everything that was left and why, coverage, losses; and lean_logits."""

import copy
import json

import pytest
import torch
import transformers as T
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

import fastpeft as fp
from fastpeft.models.lavin import lavin_config
from fastpeft.models.miss import miss_config

TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
HALF = TEXT | {"num_key_value_heads": 2}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT)),
    "gemma3": lambda: T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(text_config=HALF | {"head_dim": 16}, vision_config=EYES, mm_tokens_per_image=4)
    ),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**HALF)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**HALF)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, **SPECIAL)),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)),
    "llava": lambda: T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=T.LlamaConfig(**TEXT), vision_config=T.CLIPVisionConfig(**EYES, projection_dim=32))
    ),
    "smolvlm": lambda: T.SmolVLMForConditionalGeneration(T.SmolVLMConfig(text_config=T.LlamaConfig(**TEXT), vision_config=EYES)),
    "blip": lambda: T.BlipForQuestionAnswering(
        miss_config(tiny=True, image_size=16, vocab_size=64, hidden_size=32, heads=2, vision_layers=2, text_layers=2)
    ),
}
# classes among those left
LEFT = {
    "llama": (),
    "gemma3": ("Gemma3TextScaledWordEmbedding", "MultiheadAttention", "SiglipVisionEmbeddings"),
    "mistral": (),
    "qwen2": (),
    "gpt2": (),
    "bert": ("BertEmbeddings", "BertLMPredictionHead"),
    "llava": ("CLIPVisionEmbeddings", "LlavaMultiModalProjector"),
    "smolvlm": ("SmolVLMVisionEmbeddings",),
    "blip": ("BlipTextEmbeddings", "BlipVisionEmbeddings", "BlipTextPredictionHeadTransform"),
}


def llama(**more):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT, **more))


def left(report):
    """Of each class that was left, its reasons and their counts."""
    return {name: row["left"] for name, row in report.to_dict()["classes"].items() if row["left"]}


@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_named(kind):
    """Each parameter belongs to one class, fused or left; and what is left has a reason."""
    model = MODELS[kind]()
    report = fp.optimize(model)
    told, total = report.to_dict(), sum(p.numel() for p in model.parameters())
    assert json.loads(json.dumps(told)) == told
    assert sum(row["parameters"] for row in told["classes"].values()) == told["parameters"] == total
    assert sum(row["share"] for row in told["classes"].values()) == pytest.approx(1)
    for name, row in told["classes"].items():
        assert row["count"] == row["fused"] + row["own"] + sum(row["left"].values()), name
    classes = LEFT[kind]
    assert left(report).keys() >= set(classes) and all(f"no fused form of {name}" in left(report)[name] for name in classes)
    assert len(report.skipped) == told["skipped"] == sum(sum(reasons.values()) for reasons in left(report).values())
    assert len(report.swapped) == told["swapped"] == sum(row["fused"] for row in told["classes"].values())
    assert all(type(model.get_submodule(name)).__name__ == cls for name, cls in report.swapped)
    assert all(type(model.get_submodule(name)).__name__ in left(report) for name, _ in report.skipped)
    assert not [note for note in report.notes if "the loss of" in note]
    again = fp.optimize(model)
    assert not again.swapped and again.already_fused == report.swapped and again.skipped == report.skipped
    assert bool(again.already_fused) == (f"already fused: {len(report.swapped)}" in str(again))
    assert again.to_dict()["classes"] == told["classes"] and again.coverage == report.coverage


def linear_layers(model, names=("",)):
    """The linear layers in these modules, each once."""
    return {m for name in names for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear | Conv1D)}


def linear_parameters(layers):
    return sum(p.numel() for p in {p for m in layers for p in m.parameters(recurse=False)})


@pytest.mark.parametrize("kind", MODELS)
def test_coverage_of_linear_layers(kind):
    """Every linear layer that is called: PyTorch's attention in SigLIP's head multiplies by one without calling it."""
    model = MODELS[kind]()
    left_out = {m for name, m in model.named_modules() if name == "model.vision_tower.head.attention.out_proj"}
    total = linear_layers(model)
    report = fp.optimize(model)
    assert bool(left_out) == (kind == "gemma3") and report.coverage["layers"] == pytest.approx(1 - len(left_out) / len(total))
    assert report.coverage["linear"] == pytest.approx(1 - linear_parameters(left_out) / linear_parameters(total))
    assert f"{report.coverage['layers']:.1%} of linear layers" in str(report) and 0 <= report.coverage["parameters"] <= 1


BERT_PARTS = ("intermediate", "output", "attention.output")
MLPS = [f"model.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize(
    "kind, fused",
    [
        ("llama", [""]),
        ("mistral", [*MLPS, "lm_head"]),
        ("gpt2", [f"transformer.h.{i}.mlp" for i in range(2)] + ["lm_head"]),
        ("bert", [*(f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in BERT_PARTS), "cls.predictions.decoder"]),
        ("blip", ["vision_model", "text_encoder", "text_decoder.bert", "text_decoder.cls.predictions.decoder"]),
    ],
)
def test_linear_layers_that_a_module_around_computes(kind, fused):
    """Without the layers' own class."""
    model = MODELS[kind]()
    report = fp.optimize(model, filter_fn=lambda module, name: not isinstance(module, nn.Linear | Conv1D))
    want, total = linear_layers(model, fused), linear_layers(model)
    assert report.coverage["layers"] == pytest.approx(len(want) / len(total))
    assert report.coverage["linear"] == pytest.approx(linear_parameters(want) / linear_parameters(total))


def test_what_is_printed_is_short():
    """A line for each class, however deep the model is."""
    few, many = (fp.optimize(T.LlamaForCausalLM(T.LlamaConfig(**TEXT | {"num_hidden_layers": n}))) for n in (2, 9))
    lines = str(many).splitlines()
    assert len(lines) == len(str(few).splitlines()) < 16 and lines[0] == f"{len(many.swapped)} modules swapped, 0 skipped"
    assert any(line.split() == ["LlamaMLP", "9", "221,184", "57.9%", "fused"] for line in lines)
    assert repr(many) == str(many)


def test_leaves():
    """PyTorch's own layers without a module around them."""
    norms = (nn.LayerNorm(4), nn.LayerNorm((2, 4)), nn.LayerNorm(4, bias=False))
    model = nn.Sequential(*norms, nn.Linear(4, 4), nn.Tanh(), nn.Embedding(3, 3))
    report = fp.optimize(model)
    assert dict(report.swapped) == {"0": "LayerNorm", "2": "LayerNorm", "3": "Linear"} and not report.notes
    assert [name for name, _ in report.skipped] == ["1", "5"] and "normalises 2 dimensions" in report.skipped[0][1]
    assert left(report)["LayerNorm"].keys() == {report.skipped[0][1]} and report.skipped[1][1] == "no fused form of Embedding"
    assert "2 fused, 1 left: normalises 2 dimensions" in str(report)
    nothing = str(fp.optimize(nn.Embedding(2, 2)))
    assert "known: " in nothing and "BlipAttention, " in nothing


def test_subclasses_and_what_they_override():
    class Louder(modeling_llama.LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(modeling_llama.LlamaDecoderLayer):
        def note(self):
            return "nothing of the layer's own is overridden"

    class Observed(modeling_llama.LlamaDecoderLayer):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    model = llama()
    model.model.layers[0].mlp.__class__ = Louder
    model.model.layers[0].__class__ = Observed
    model.model.layers[1].__class__ = Renamed
    report = fp.optimize(model)
    skipped = dict(report.skipped)
    assert skipped["model.layers.0.mlp"] == "a subclass of LlamaMLP that overrides forward"
    assert skipped["model.layers.0"] == "a subclass of LlamaDecoderLayer that overrides __call__"
    assert skipped["model"] == "layers.0 inside it stays as it is" and skipped.keys() == {"model", "model.layers.0.mlp", "model.layers.0"}
    assert dict(report.swapped)["model.layers.1"] == "Renamed"
    assert type(model.model) is modeling_llama.LlamaModel


def test_hooks_and_forwards_on_a_layer_inside():
    model = llama()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    handle = attention.q_proj.register_forward_hook(lambda *_: None)
    mlp.up_proj.forward = mlp.up_proj.forward
    report = fp.optimize(model)
    own = "has a forward of its own over its class's, as accelerate's offloading gives it"
    assert report.skipped == [("model.layers.1.mlp.up_proj", own)] and ("model.layers.0.self_attn.q_proj", "Linear") in report.swapped
    assert report.coverage["linear"] == pytest.approx(1 - 64 * 128 / linear_parameters(linear_layers(model)))
    assert report.classes["Linear"].parameters == 64 * 64 + 64 * 128  # they are called, not computed by the module around them
    handle.remove()
    assert fp.optimize(model).classes["Linear"].parameters == 64 * 128


def test_what_filters_leave():
    report = fp.optimize(llama(), filter_fn=lambda module, name: not name.endswith("mlp"))
    assert left(report) == {"LlamaMLP": {"left out by filter_fn": 2}} and report.coverage["linear"] == 1
    assert report.classes["Linear"].parameters == 2 * 3 * 64 * 128


def test_a_setting_that_does_not_fit(monkeypatch):
    """Every fused class that has ``why_not`` is asked, also those that hand masks down."""
    from fastpeft.fused.attention.llama import FusedLlamaAttention

    def why_not(module):
        return "attends to both sides" if module.layer_idx == 1 else ""

    monkeypatch.setattr(FusedLlamaAttention, "why_not", staticmethod(why_not), raising=False)
    model = llama()
    skipped = dict(fp.optimize(model).skipped)
    assert skipped["model.layers.1.self_attn"] == "attends to both sides"
    assert skipped["model.layers.1"] == "self_attn inside it stays as it is" and skipped["model"].startswith("layers.1.self_attn inside")
    assert len(skipped) == 3


def peft_llama(**options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **options))


@pytest.mark.parametrize(
    "options, why",
    [
        ({"use_dora": True}, "PEFT computes its variant of LoRA (DoraLinearVariant)"),
        ({"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, "PEFT computes its variant of LoRA (ALoraLinearVariant)"),
        ({"lora_bias": True}, "its LoRA has a bias"),
    ],
    ids=["DoRA", "aLoRA", "bias"],
)
def test_what_peft_always_computes_is_not_swapped(options, why):
    model = peft_llama(**options)
    report = fp.optimize(model)
    assert left(report)["lora.Linear"] == {why: 4} and "lora.Linear" not in dict(report.swapped).values()
    assert report.to_dict()["classes"]["lora.Linear"]["fused"] == 0
    assert report.coverage["linear"] == 1 and report.classes["Linear"].parameters > 2 * 64 * (64 + 128)  # those that PEFT's layer calls


def test_an_adapter_that_may_be_used_is_swapped():
    """One of two adapters is plain LoRA: which is in use is decided at each call."""
    peft = pytest.importorskip("peft")
    model = peft_llama(use_dora=True)
    model.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    report = fp.optimize(model)
    assert report.to_dict()["classes"]["lora.Linear"]["fused"] == 4


def test_hooks_under_an_adapter():
    model = peft_llama()
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: None)
    model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    assert left(fp.optimize(model))["lora.Linear"] == {
        "its base layer has hooks, or a forward of its own": 1,
        "its LoRA has hooks, or a forward of its own": 1,
    }


def test_what_has_no_size_or_head_yet():
    """Parameters that are made at the first call, and a model that has no head to ask for."""

    class Odd(T.LlamaModel):
        def get_output_embeddings(self):
            raise NotImplementedError("none")

    report = fp.optimize(nn.ModuleDict({"lazy": nn.LazyLinear(3), "odd": Odd(T.LlamaConfig(**TEXT)), "norm": nn.LayerNorm(3)}))
    skipped = dict(report.skipped)
    assert skipped["lazy"] == "no fused form of LazyLinear" and report.to_dict()["classes"]["LazyLinear"]["parameters"] == 0
    assert dict(report.swapped)["odd"] == "Odd"


def test_two_classes_of_one_name():
    class LlamaMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight

    report = fp.optimize(nn.ModuleList([modeling_llama.LlamaMLP(T.LlamaConfig(**TEXT)), LlamaMLP()]))
    alike = [name for name in report.classes if name.endswith("LlamaMLP")]
    assert len(alike) == 2 and len(report.classes) == 4
    assert "transformers.models.llama.modeling_llama.LlamaMLP" in report.classes


def test_shared_parameters_count_once():
    model = llama(tie_word_embeddings=True)
    report = fp.optimize(model)
    assert report.parameters == sum(p.numel() for p in model.parameters()) == sum(row.parameters for row in report.classes.values())


def test_own_models_are_not_left():
    model = fp.build("llava-med-tiny", pretrained=False)
    report = fp.optimize(model)
    assert left(report).keys() == {"CLIPVisionEmbeddings"} and not report.swapped and not report.notes
    rows = report.to_dict()["classes"]
    assert rows["LlavaMedForConditionalGeneration"]["own"] == rows["Connector"]["own"] == 1


@pytest.mark.parametrize("function", [fp.optimize, fp.restore])
@pytest.mark.parametrize("bad", ["x", None, T.LlamaForCausalLM, {"model": 1}], ids=str)
def test_anything_but_a_model(function, bad):
    with pytest.raises(TypeError, match=f"{function.__name__} takes a model, a torch.nn.Module, not .*fastpeft.build makes one"):
        function(bad)


@pytest.mark.parametrize("bad, name", [({"filter_fn": "mlp"}, "filter_fn"), ({"lean_logits": "yes"}, "lean_logits")])
def test_bad_options(bad, name):
    model = llama()
    with pytest.raises(TypeError, match=f"optimize: {name} must be "):
        fp.optimize(model, **bad)
    assert type(model) is T.LlamaForCausalLM


def lean(model):
    return [name for name, module in model.named_modules() if module.__dict__.get("lean_logits")]


@pytest.mark.parametrize(
    "make, where",
    [
        (llama, [""]),
        (MODELS["blip"], ["text_decoder"]),
        (lambda: fp.build("llava-med-tiny", pretrained=False), [""]),
        (lambda: fp.build("miss-tiny", pretrained=False), ["", "text_decoder"]),
        (lambda: fp.build("lavin-tiny", pretrained=False), ["", "llm"]),
        (lambda: fp.build("excitor-tiny", pretrained=False), ["", "llm"]),
    ],
    ids=["llama", "blip", "llava-med", "miss", "lavin", "excitor"],
)
def test_lean_logits(make, where):
    model = make()
    assert lean(model) == []
    fp.optimize(model)
    assert lean(model) == []
    said = fp.optimize(model, lean_logits=True).notes
    assert lean(model) == where and any("returns no logits" in note for note in said) and not any("when they are read" in n for n in said)
    fp.optimize(model)
    assert lean(model) == where and lean(copy.deepcopy(model)) == where
    assert any("when they are read" in note for note in fp.optimize(model, lean_logits=False).notes) and lean(model) == []
    fp.optimize(model, lean_logits=True)
    fp.restore(model)
    assert lean(model) == []


def test_notes_on_logits():
    (note,) = (note for note in fp.optimize(llama()).notes if "logits" in note)
    assert "logits of a training step are formed when they are read" in note
    (note,) = (note for note in fp.optimize(llama(), lean_logits=True).notes if "logits" in note)
    assert "returns no logits" in note
    assert "returns no logits" in " ".join(fp.optimize(MODELS["mistral"](), lean_logits=True).notes)
    notes = fp.optimize(T.ViTForImageClassification(T.ViTConfig(**EYES)), lean_logits=True).notes
    assert any("lean_logits changes nothing here" in note for note in notes)


def test_a_loss_that_stays_its_own():
    """Somebody's loss function takes logits; who knows which of them it reads."""
    model = MODELS["mistral"]()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    report = fp.optimize(model)
    assert report.notes == ["the loss of MistralForCausalLM stays its own: it forms the logits of every position"]
    assert left(report)["MistralForCausalLM"] == {"its loss_function is its own, and takes logits": 1}
    del model._loss_function
    assert ("", "MistralForCausalLM") in fp.optimize(model).swapped


def scattered(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    "name, plan", [("lavin-tiny", "MMAdapter/T/MMAdapter"), ("lavin-tiny", "RepAdapter/F/RepAdapter"), ("excitor-tiny", "F/Excitor")]
)
def test_what_an_adapter_needs_stays(name, plan):
    """An adapter between layers, and one that reads images: their modules, and those that hand them their inputs, stay, by name."""
    model = scattered(fp.adapt(fp.build(name, pretrained=False, dtype=torch.float64), plan))
    torch.manual_seed(2)
    ids, size = torch.randint(5, 90, (2, 12)), model.config.vision_config.image_size
    batch = {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(1, 3, size, size, dtype=torch.float64)}
    batch["image_index"] = torch.tensor([0, -1])
    if name.startswith("lavin"):
        places = torch.zeros(2, 12, dtype=torch.bool)
        places[0, 2 : 2 + lavin_config(name).visual_tokens] = True
        batch["image_mask"] = places
    want = model(**batch).loss.item()
    stayed = dict(fp.restore(model))
    kind, word = ("mm_adapter", "its adapter") if name.startswith("lavin") else ("excitor", "its Excitor")
    attached = [n for n, m in model.named_modules() if getattr(m, kind, None) is not None]
    assert attached and all(stayed[n] == f"needed by {word}" for n in attached)
    assert {"llm", "llm.model", "llm.model.layers.0.self_attn"} <= stayed.keys() and "llm.model.layers.0.mlp" not in stayed
    assert model(**batch).loss.item() == pytest.approx(want, rel=1e-6)  # transformers' own norms are in float32
    fp.optimize(model)
    assert model(**batch).loss.item() == pytest.approx(want, rel=1e-12)
