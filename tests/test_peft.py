"""Excitor through PEFT: the losses and gradients of fastpeft.adapt, PEFT's files and switches, and what is said where PEFT cannot."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastpeft as fp
from fastpeft.ops import excitor_turn as turn

peft = pytest.importorskip("peft")
ours = pytest.importorskip("fastpeft.peft")

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}
OPTIONS = {"layers": 2, "num_prompts": 5, "r": 3, "gate_std": 0.5}


def base(kv_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=kv_heads, initializer_range=0.2)).to(dtype)


def wrapped(model=None, seed=1, adapter="default", **options):
    torch.manual_seed(seed)
    config = ours.ExcitorConfig(task_type="CAUSAL_LM", **OPTIONS | options)
    return peft.get_peft_model(base() if model is None else model, config, adapter_name=adapter)


def excitors(model):
    return [p for name, p in model.named_parameters() if "excitor" in name.split(".")]


@pytest.fixture
def batch():
    torch.manual_seed(2)
    ids = torch.randint(3, 50, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where((torch.arange(8) > 2) & mask.bool(), ids, -100)}


def packed(batch):
    real = batch["attention_mask"].bool()
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    positions = torch.cat([torch.arange(int(n)) for n in real.sum(1)])[None]
    return {"input_ids": batch["input_ids"][real][None], "labels": labels[real][None], "position_ids": positions}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in excitors(model)]


@pytest.mark.parametrize("form", [dict, packed])
@pytest.mark.parametrize("more", [{}, {"gate": "layer", "rotary": True, "excitor_scale": "head"}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_computes_what_adapt_does(batch, kv_heads, more, form):
    model, twin = wrapped(base(kv_heads), **more), fp.adapt(base(kv_heads), llm=fp.Excitor(**OPTIONS | more))
    with torch.no_grad():
        for mine, theirs in zip(excitors(model), excitors(twin), strict=True):
            theirs.copy_(mine)
    fp.optimize(model)
    fp.optimize(twin)
    (loss, mine), (want, theirs) = (gradients(m.train(), form(batch)) for m in (model, twin))
    assert torch.equal(loss, want) and all(map(torch.equal, mine, theirs)) and all(g.any() for g in mine)
    assert [p.requires_grad for p in model.parameters()].count(True) == len(mine)
    assert model.get_nb_trainable_parameters()[0] == fp.count(twin)["trainable"]


def test_options_are_excitors_own():
    assert ours.ExcitorConfig().method == fp.Excitor() and fp.ExcitorConfig is ours.ExcitorConfig
    with pytest.raises(ValueError, match="Excitor: gate must be one of head, layer"):
        ours.ExcitorConfig(gate="token")


def test_images_reach_it():
    model, twin = fp.build("excitor-tiny", dtype=torch.float64), fp.adapt(fp.build("excitor-tiny", dtype=torch.float64), "F/Excitor")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, ours.ExcitorConfig(gate_std=0.5))
    with torch.no_grad():
        for mine, theirs in zip(excitors(model), excitors(twin), strict=True):
            theirs.copy_(mine)
    assert sum(name.endswith("wk_up") for name, p in model.named_parameters() if p.requires_grad) == 2
    ids, pixels = torch.randint(3, 400, (2, 7)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    seen = {"input_ids": ids, "pixel_values": pixels, "labels": ids}
    loss = model.eval()(**seen).loss
    assert torch.equal(loss, twin.eval()(**seen).loss) and loss != model(**seen | {"pixel_values": pixels.flip(0)}).loss


def test_generation_equals_adapts_and_its_own_without_a_cache(batch):
    model, twin = wrapped().eval(), fp.adapt(base(), llm=fp.Excitor(**OPTIONS)).eval()
    with torch.no_grad():
        for mine, theirs in zip(excitors(model), excitors(twin), strict=True):
            theirs.copy_(mine)
    how = {"attention_mask": batch["attention_mask"].flip(1), "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    want = twin.generate(batch["input_ids"], **how)
    assert torch.equal(model.generate(input_ids=batch["input_ids"], **how), want)
    assert torch.equal(model.generate(input_ids=batch["input_ids"], use_cache=False, **how), want)


@pytest.mark.parametrize("lean", [False, True])
def test_peft_saves_and_loads_it_to_the_bit(batch, tmp_path, lean):
    model = wrapped(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight += 0.1
    want = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path, adapter_name="other", low_cpu_mem_usage=lean)
    assert torch.equal(again.eval()(**batch).logits, want)
    assert not any(p.requires_grad for p in excitors(again))
    trained = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in excitors(trained))
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(config) is ours.ExcitorConfig and config.method == fp.Excitor(**OPTIONS) and config.peft_type is peft.PeftType.EXCITOR


def test_one_format_with_fastpeft(batch, tmp_path):
    model = wrapped().eval()
    want = model(**batch).logits
    model.save_pretrained(tmp_path / "peft")
    mine = fp.load_adapter(base(), tmp_path / "peft").eval()
    assert torch.equal(mine(**batch).logits, want) and mine.fastpeft_plan.treatments["llm"] == (fp.Excitor(**OPTIONS),)
    fp.save_adapter(mine, tmp_path / "mine")
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path / "mine" / "llm").eval()(**batch).logits, want)
    tensors = load_file(tmp_path / "mine/llm/adapter_model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "peft/adapter_model.safetensors").keys()
    # as it was saved before PEFT knew it
    (tmp_path / "mine/llm/adapter_model.safetensors").unlink()
    (tmp_path / "mine/llm/adapter_config.json").unlink()
    prefix = len("base_model.model.")
    old = {name[prefix:].replace("excitor_blocks.", ""): t for name, t in tensors.items()}
    assert "model.layers.2.self_attn.excitor.w_down" in old
    save_file(old, tmp_path / "mine/llm/model.safetensors")
    assert torch.equal(fp.load_adapter(base(), tmp_path / "mine").eval()(**batch).logits, want)
    save_file({name: t for name, t in old.items() if "gate" not in name}, tmp_path / "mine/llm/model.safetensors")
    with pytest.raises(ValueError, match=r"2 missing: base_model\.model\.model\.layers\.2\.self_attn\.excitor\.excitor_blocks\.gate"):
        fp.load_adapter(base(), tmp_path / "mine")


def test_layers_that_are_not_the_topmost_are_refused_by_name(tmp_path):
    wrapped(target_modules=["layers.0.self_attn"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this model and plan.*missing.*layers\.2.*unexpected.*layers\.0"):
        fp.load_adapter(base(), tmp_path)


def test_several_adapters(batch, tmp_path):
    plain = base().eval()
    with torch.no_grad():
        nothing = wrapped(gate_std=0.0).eval()(**batch).logits
        torch.testing.assert_close(nothing, plain(**batch).logits, rtol=1e-5, atol=1e-5)
    model = wrapped().eval()
    first = model(**batch).logits
    model.add_adapter("other", ours.ExcitorConfig(layers=1, num_prompts=3, r=2, gate_std=0.5))
    assert torch.equal(model(**batch).logits, first)  # added, not in use
    model.set_adapter("other")
    second = model(**batch).logits
    assert not torch.equal(first, second)
    assert {n.split("excitor_blocks.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path / "other").eval()(**batch).logits, second)
    model.base_model.set_adapter(["default", "other"])
    both = model(**batch).logits
    assert not torch.equal(both, first) and not torch.equal(both, second)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, nothing, rtol=1e-12, atol=1e-12)
        assert not any(p.requires_grad for p in excitors(model))
    assert torch.equal(model(**batch).logits, both)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(model(**batch).logits, first)
    assert not any(".other." in name for name in model.state_dict())


def test_two_in_use_add_their_keys(batch):
    """A second one with gates of zero changes nothing; two equal ones are one with twice the gates."""
    model = wrapped().eval()
    with torch.no_grad():
        first = model(**batch).logits
        model.add_adapter("other", ours.ExcitorConfig(**OPTIONS | {"gate_std": 0.0}))
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(model(**batch).logits, first, rtol=1e-12, atol=1e-12)
        for layer in model.base_model.model.model.layers[2:]:
            blocks = layer.self_attn.excitor.excitor_blocks
            blocks["other"].load_state_dict(blocks["default"].state_dict())
        twice = model(**batch).logits
        model.set_adapter("default")
        for layer in model.base_model.model.model.layers[2:]:
            layer.self_attn.excitor.excitor_blocks["default"].gate.mul_(2)
        torch.testing.assert_close(twice, model(**batch).logits, rtol=1e-10, atol=1e-12)


def test_turned_in_one_pass(batch, monkeypatch):
    """The first one in use turns queries and keys as it merges its own, the second adds; one that is hooked is called."""
    model = wrapped(base(kv_heads=4))
    model.add_adapter("other", ours.ExcitorConfig(**OPTIONS))
    model.base_model.set_adapter(["default", "other"])
    want, wanted = gradients(model, batch)
    calls, seen, together = [], [], turn._together
    monkeypatch.setattr(turn, "_together", lambda *a: calls.append(a) or together(*a))
    monkeypatch.setattr(turn, "TURNS", {"cpu"})
    monkeypatch.setattr(turn, "DTYPES", (torch.float64,))
    for hooked in (False, True):
        if hooked:
            blocks = [b for m in model.modules() if isinstance(m, ours.ExcitorLayer) for b in m.excitor_blocks.values()]
            for block in blocks:
                block.register_forward_hook(lambda *a: seen.append(a))
        loss, grads = gradients(model, batch)
        assert bool(calls) != hooked and len(seen) == hooked * 4
        torch.testing.assert_close(loss, want)
        for grad, exact in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, exact)
        calls.clear()


def test_unload_gives_the_model_back(batch):
    plain, given = base().eval(), base().eval()
    model = wrapped(given)
    assert type(given.model) is not modeling_llama.LlamaModel
    back = model.unload()
    assert back is given and torch.equal(back(**batch).logits, plain(**batch).logits)
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()] and back.state_dict().keys() == plain.state_dict().keys()


def test_no_weight_takes_it_in():
    model = wrapped()
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ValueError, match="no weight can take in Excitor"):
            merge()
    assert len(excitors(model)) == 8


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(batch, dtype, wide):
    torch.manual_seed(1)
    model = peft.get_peft_model(base(dtype=dtype), ours.ExcitorConfig(**OPTIONS), autocast_adapter_dtype=wide)
    assert {p.dtype for p in excitors(model)} == {torch.float32 if wide else dtype}
    loss, grads = gradients(model.train(), batch)
    exact = wrapped().train()
    with torch.no_grad():
        for mine, theirs in zip(excitors(model), excitors(exact), strict=True):
            theirs.copy_(mine)
    want = exact(**batch).loss
    torch.testing.assert_close(loss.double(), want.double(), rtol=0.02, atol=0)
    assert all(g.isfinite().all() for g in grads)


def test_copies_and_pickles(batch):
    model = wrapped().eval()
    want = model(**batch).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, want)
        for p in excitors(twin):
            p.data.zero_()
        layer = twin.base_model.model.model.layers[3].self_attn
        assert layer.excitor.attention is layer
    assert torch.equal(model(**batch).logits, want)


def test_injected_from_a_state_dict(batch):
    model = wrapped(target_modules=["layers.1.self_attn"]).eval()
    tensors = peft.get_peft_model_state_dict(model)
    bare = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    config = ours.ExcitorConfig(**OPTIONS | {"target_modules": ["layers.1.self_attn"]})
    other = peft.inject_adapter_in_model(config, base(), state_dict=bare)
    assert not peft.set_peft_model_state_dict(other, bare).unexpected_keys
    assert torch.equal(other.eval()(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn has an adapter already .* PEFT's perhaps: unload it first"):
        fp.adapt(other, "Excitor")
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_what_it_cannot_go_into():
    with pytest.raises(ValueError, match=r"Excitor needs a LLaMA .* and Linear has none"):
        peft.get_peft_model(nn.Linear(2, 2), ours.ExcitorConfig())
    model = base()
    with pytest.raises(ValueError, match=r"such as 'model\.layers\.3\.self_attn'; target_modules names 'model\.layers\.0\.mlp'"):
        wrapped(model, target_modules=["mlp"])
    with pytest.raises(ValueError, match=r"nope.* not found in the base model"):
        wrapped(model, target_modules=["nope"])
    assert type(model.model) is modeling_llama.LlamaModel  # nothing was changed
    with pytest.raises(ValueError, match=r"has an Excitor of fastpeft\.adapt already"):
        wrapped(fp.adapt(model, "Excitor"))


def python(code, errors=True, **env):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    return done.stdout + (done.stderr if errors else "")


def test_known_on_import():
    """Whoever is imported first; fastpeft alone loads no peft."""
    code = """
        import sys, fastpeft
        print("peft" in sys.modules)
        from peft.utils import PeftType  # a part of it first
        import peft
        print(PeftType.EXCITOR.value, "EXCITOR" in peft.PEFT_TYPE_TO_TUNER_MAPPING)
        print(len([finder for finder in sys.meta_path if "_when_imported" in repr(finder) and finder.name == "peft"]))
    """
    assert python(textwrap.dedent(code), errors=False) == "False\nEXCITOR True\n0\n"
    known = "print('EXCITOR' in peft.PEFT_TYPE_TO_TUNER_MAPPING)"
    assert python(f"import peft, fastpeft; {known}", errors=False) == "True\n"


def test_without_peft_or_with_an_old_one(tmp_path):
    told = python("import sys; sys.modules['peft'] = None; import fastpeft; print(fastpeft.Excitor()); import fastpeft.peft")
    assert told.startswith("Excitor\n") and told.endswith("pip install --upgrade 'peft>=0.18'\n")
    assert "ImportError: fastpeft.peft needs peft 0.18 or newer" in told
    with pytest.raises(ImportError, match=r"needs peft 0\.18 or newer, not 0\.9\.1: pip install"):
        ours.check_version("0.9.1")
    for version in ("0.18.0", "0.21.2", "1.0.0.dev0"):
        ours.check_version(version)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/__init__.py").write_text("__version__ = '0.5.0'\n")
    for order in ("peft, fastpeft", "fastpeft, peft"):
        told = python(f"import {order}; print('fine'); import fastpeft.peft", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
        assert told.startswith("fine\n") and "ImportError: fastpeft.peft needs peft 0.18 or newer" in told


def test_a_peft_with_another_method_of_that_name(monkeypatch):
    monkeypatch.setitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "EXCITOR", peft.LoraConfig)
    with pytest.raises(ImportError, match=r"has a method called EXCITOR already \(peft\.tuners\.lora\.config\)"):
        ours.register()
    monkeypatch.undo()
    ours.register()  # again: nothing to do
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(ImportError, match=r"not 0\.17\.1"):
        ours.register()


def test_the_new_member_is_like_the_others():
    kinds = peft.PeftType
    member = kinds.EXCITOR
    assert isinstance(member, kinds) and member is kinds("EXCITOR") is kinds["EXCITOR"] and member in kinds and list(kinds)[-1] is member
    assert member == member.name == member.value == "EXCITOR" and hash(member) == hash("EXCITOR")
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert str(member) == str(kinds.LORA).replace("LORA", "EXCITOR")
    before = len(kinds)
    ours.extend(kinds, "EXCITOR")
    assert len(kinds) == before


def test_folders_name_their_base(batch, tmp_path):
    """peft's Auto class, and transformers' own loading of PEFT's adapters."""
    base().save_pretrained(tmp_path / "base")
    model = wrapped(LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)).eval()
    want = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert torch.equal(auto.eval()(**batch).logits, want)
    if tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 20):  # transformers asks for it
        own = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
        own.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(own.eval()(**batch).logits, want)
