"""A fused class answers to the name of the class it replaces: others' tools go by it. Copies are fused, pickles plain."""

import copy
import inspect
import io
import json
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers as T
from torch import nn
from transformers.activations import GELUActivation

import fastpeft as fp
from fastpeft.models.miss import miss_config
from fastpeft.registry import fused_class, is_fused, known_classes, replaced_class

TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def llama(**more):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT, initializer_range=0.2, pad_token_id=0, **more)).train()


def blip(miss):
    torch.manual_seed(0)
    return T.BlipForQuestionAnswering(miss_config(tiny=True, **miss.SMALL))


def clip(_=None):
    torch.manual_seed(0)
    return T.CLIPModel(T.CLIPConfig(text_config=TEXT | {"hidden_act": "gelu"}, vision_config=VISION))


def llava(_=None):
    torch.manual_seed(0)
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(text_config=T.LlamaConfig(**TEXT), vision_config=T.CLIPVisionConfig(**VISION, projection_dim=32))
    )


MODELS = {"llama": lambda _: llama(), "blip": blip, "clip": clip, "llava": llava}


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 90, (4, 14))


def fused(model):
    twin = copy.deepcopy(model)
    assert fp.optimize(twin).swapped
    return twin


def names(model):
    return [(name, type(m).__name__, type(m).__qualname__, type(m).__module__, m._get_name()) for name, m in model.named_modules()]


@pytest.mark.parametrize("kind", MODELS)
def test_every_name_and_what_is_printed(miss, kind):
    plain = MODELS[kind](miss)
    model = fused(plain)
    assert names(model) == names(plain) and repr(model) == repr(plain)
    assert sum(map(is_fused, model.modules())) > 10 and not any(map(is_fused, plain.modules()))
    for mine, theirs in zip(model.modules(), plain.modules()):
        assert isinstance(mine, type(theirs)) and str(type(mine)) == str(type(theirs))
    assert inspect.getsource(type(model)) == inspect.getsource(type(plain))
    mlp = next(m for m in model.modules() if type(m).__name__.endswith(("MLP", "Intermediate")))
    assert is_fused(mlp) and inspect.getsource(type(mlp)) == inspect.getsource(replaced_class(type(mlp)))
    fp.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_all_registered_classes():
    """Every class that can be fused, PEFT's and bitsandbytes' where they are installed."""
    pytest.importorskip("peft")
    known = set(known_classes())
    assert {T.models.llama.modeling_llama.LlamaMLP, nn.LayerNorm, nn.Dropout, GELUActivation} < known
    for theirs in known:
        ours = fused_class(theirs)
        assert replaced_class(ours) is theirs and issubclass(ours, theirs) and ours is not theirs
        assert (ours.__name__, ours.__qualname__, ours.__module__) == (theirs.__name__, theirs.__qualname__, theirs.__module__)


def test_own_models_keep_their_names():
    for name, cls in (("miss-tiny", "MissForQuestionAnswering"), ("llava-med-tiny", "LlavaMedForConditionalGeneration")):
        model = fp.build(name, device="meta", pretrained=False)
        assert type(model).__name__ == cls and type(model).__module__.startswith("fastpeft.models")
    model = fp.adapt(fp.build("llama-tiny", device="meta"), "LoRA")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "AdaptedLinear"  # it has parameters that a linear layer has not


def test_trainers_label_smoothing(ids, tmp_path):
    """HF Trainer shifts labels where the class's name is one of a causal language model."""
    model = llama()
    found = []
    for one in (model, fused(model)):
        arguments = T.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
        found.append(T.Trainer(one, arguments).compute_loss(one, {"input_ids": ids, "labels": ids.clone()}).item())
    assert found == [pytest.approx(6.0765, abs=1e-4)] * 2


@pytest.mark.parametrize("kind", MODELS)
def test_saved_architectures(miss, kind, tmp_path):
    plain = MODELS[kind](miss)
    fused(plain).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(plain).__name__]
    loaded = type(plain).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), plain.state_dict().values(), strict=True))


def test_what_peft_saves(tmp_path):
    peft = pytest.importorskip("peft")
    files = []
    for number, model in enumerate((llama(), fused(llama()))):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))  # no task: the file says which class
        wrapped.save_pretrained(tmp_path / str(number))
        files.append(json.loads((tmp_path / str(number) / "adapter_config.json").read_text()))
    assert files[0] == files[1]
    library = "transformers.models.llama.modeling_llama"
    assert files[1]["auto_mapping"] == {"base_model_class": "LlamaForCausalLM", "parent_library": library}


def test_what_finds_layers_by_name():
    """accelerate keeps a layer whole; FSDP wraps it."""
    accelerate = pytest.importorskip("accelerate")
    plain = llama()
    model = fused(plain)
    sizes, keep = {"cpu": "360KB", "disk": "10MB"}, plain._no_split_modules
    maps = [accelerate.infer_auto_device_map(one, sizes, no_split_module_classes=keep) for one in (plain, model)]
    split = accelerate.infer_auto_device_map(plain, sizes)
    assert maps[0] == maps[1] != split and not any(name.startswith("model.layers.1.") for name in maps[1])
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    plugin.set_auto_wrap_policy(model)
    policy = plugin.auto_wrap_policy
    wrapped = [name for name, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert wrapped == ["model.layers.0", "model.layers.1"]


def test_what_transformers_looks_up_by_class(ids):
    """Attention implementations by the class's module, recorded outputs by its text, what pipelines take by its name, checkpointing."""
    model = fused(llama())
    model.set_attn_implementation("eager")
    assert type(model)._can_set_attn_implementation() and type(model).can_generate()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    recorded = _CAN_RECORD_REGISTRY.get(model.model) or _CAN_RECORD_REGISTRY.get(str(type(model.model)))  # transformers 5.17: by name
    assert recorded.keys() == {"hidden_states", "attentions"}
    hidden = model.eval()(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    model.train().gradient_checkpointing_enable()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(llama()(ids, labels=ids).loss.item(), rel=1e-5)


@torch.no_grad()
def scattered(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def clone(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_fused(miss, kind, copied):
    model = fused(MODELS[kind](miss))
    twin = copied(model)
    assert twin is not model and [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    shared = next(iter(twin.parameters())) is next(iter(model.parameters()))
    assert shared == (copied is copy.copy)


def test_a_deep_copy_keeps_what_is_shared_and_hooked(ids):
    model = fused(llama(tie_word_embeddings=True))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    model.lean_logits = True
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight and twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(twin(ids, labels=ids).loss, model(ids, labels=ids).loss) and twin.lean_logits
    pair = copy.deepcopy(nn.ModuleList([model, model.model]))
    assert pair[1] is pair[0].model


@pytest.mark.parametrize("through", [clone, saved, *(partial(lambda p, m: pickle.loads(pickle.dumps(m, p)), p) for p in range(6))])
def test_a_pickle_is_the_plain_model(ids, through):
    plain = llama()
    model = fused(plain)
    fp.optimize(model, lean_logits=True)
    twin = through(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()] and not hasattr(type(twin), "lean_logits")
    assert "lean_logits" not in twin.__dict__
    assert torch.equal(twin(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    assert len(fp.optimize(twin).swapped) == len([m for m in model.modules() if is_fused(m)])
    assert is_fused(model)  # what was pickled stays as it is


@pytest.mark.parametrize("kind", MODELS)
def test_pickles_of_every_family(miss, kind):
    """No name of fastpeft is in them: they load where it is not installed."""
    plain = MODELS[kind](miss)
    model = fused(plain)
    twin = saved(model)
    assert b"fastpeft" not in pickle.dumps(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]


LOADS = """
import sys
sys.modules["fastpeft"] = None  # as if it were not installed
import torch
model = torch.load({path!r}, weights_only=False)
ids = torch.arange(3, 15)[None]
print(type(model).__name__, float(model(input_ids=ids, labels=ids).loss))
"""


@pytest.mark.slow
def test_another_process_loads_it_without_fastpeft(tmp_path):
    model, path, ids = llama(), tmp_path / "model.pt", torch.arange(3, 15)[None]
    torch.save(fused(model), path)
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", LOADS.format(path=str(path))], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    name, loss = done.stdout.split()[-2:]
    assert name == "LlamaForCausalLM" and float(loss) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)


@pytest.mark.parametrize("plan", [None, "F/F/Prefix", "F/F/PTv2", "LoRA/IA3/LoRA"])
def test_own_models_come_back_as_they_were(miss, plan):
    """Their pickles need fastpeft anyway."""
    model, inputs = miss.build(plan), miss.batch()
    fp.restore(model.vision_model.encoder.layers[0])
    want = miss.step(model, inputs)[0] if plan else model(**inputs).loss.item()
    for through in (copy.copy, copy.deepcopy, clone, saved):
        twin = through(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert (miss.step(twin, inputs)[0] if plan else twin(**inputs).loss.item()) == want


@pytest.mark.parametrize("plan", ["F/F/Prefix", "LoRA/F/F"])
def test_adapted_models_of_transformers(miss, plan):
    """Fused comes back what has one of fastpeft's own modules inside, and what prefixes are handed down to."""
    model, inputs = blip(miss).double(), miss.batch()
    fp.optimize(model)
    scattered(fp.adapt(model, plan))
    twin, want = clone(model), model(**inputs).loss.item()
    assert twin(**inputs).loss.item() == pytest.approx(want, rel=1e-12)
    needed = twin.text_decoder.bert.encoder.layer[0] if plan == "F/F/Prefix" else twin.vision_model.encoder.layers[0].mlp
    assert is_fused(needed)
    for exchanged in (twin, model):  # the adapter's own linear layers as well
        fp.optimize(exchanged)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_peft_models_copy_and_pickle(ids):
    peft = pytest.importorskip("peft")
    for config in (
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    ):
        plain = peft.get_peft_model(llama(), config).eval()
        model = fused(plain)
        assert repr(model) == repr(plain) and names(model) == names(plain)
        want = plain(input_ids=ids, labels=ids).loss.item()
        for through in (copy.deepcopy, clone):
            twin = through(model)
            assert is_fused(twin.base_model.model if hasattr(twin.base_model, "model") else twin) == (through is copy.deepcopy)
            assert twin(input_ids=ids, labels=ids).loss.item() == pytest.approx(want, rel=1e-5)
        assert "fastpeft" not in str(pickle.dumps(model))


@pytest.mark.parametrize("plan", ["Excitor", "AdaptionPrompt", "RepAdapter", "LoRA"])
def test_adapted_llamas_pickle(ids, plan):
    options = {"Excitor": {"layers": 2}, "AdaptionPrompt": {"adapter_layers": 2}}.get(plan, {})
    torch.manual_seed(0)
    model = scattered(fp.adapt(fp.build("llama-tiny").eval(), plan, **options))
    want = model(input_ids=ids, labels=ids).loss.item()
    for through in (copy.deepcopy, clone):
        twin = through(model)
        assert twin(input_ids=ids, labels=ids).loss.item() == want
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


def test_quantised_layers_copy_and_pickle():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False), bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False))
    plain[0].load_state_dict({"weight": torch.randn(64, 64)})
    plain[1].load_state_dict({"weight": torch.randn(64, 64)})
    plain.to("cpu")
    model, x = fused(plain), torch.randn(3, 64)
    want = model(x)
    assert repr(model) == repr(plain) and torch.equal(copy.deepcopy(model)(x), want)
    twin, theirs = clone(model), clone(plain)  # bitsandbytes' weights come back as plain parameters, in either
    assert [type(m) for m in twin] == [type(m) for m in plain] and repr(twin) == repr(theirs)
    assert torch.equal(twin(x), theirs(x))


def test_a_wrapper_made_of_a_fused_class(ids):
    """fully_shard gives a module a subclass of its own: it is fused still, and what is around it may be."""
    model, plain = llama(), llama()
    fp.optimize(model, filter_fn=lambda module, name: name != "model")
    layer = model.model.layers[0]
    layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    assert type(layer).__name__ == "FSDPLlamaDecoderLayer" and is_fused(layer)
    report = fp.optimize(model)
    assert ("model", "LlamaModel") in report.swapped and ("model.layers.0", "FSDPLlamaDecoderLayer") in report.already_fused
    assert model(ids, labels=ids).loss.item() == pytest.approx(plain(ids, labels=ids).loss.item(), rel=1e-5)
