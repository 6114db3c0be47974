"""What an adapter_config.json may say: every field of PEFT's configurations is read, neutral or refused, as PEFT computes it."""

import copy
import dataclasses
import inspect
import json
import warnings

import pytest
import torch

import fastpeft as fp
from fastpeft.methods import IA3, METHODS, AdaptionPrompt, Excitor, LayerNorm, LoRA, PTv2, from_peft
from fastpeft.methods.peft_config import NEUTRAL, READ, Refused, is_unset

pytestmark = pytest.mark.usefixtures("one_thread")
BASIC = {
    LoRA: {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    IA3: {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    PTv2: {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    LayerNorm: {"peft_type": "LN_TUNING", "target_modules": ["norm"]},
    AdaptionPrompt: {"peft_type": "ADAPTION_PROMPT", "target_modules": "self_attn", "adapter_len": 2, "adapter_layers": 1},
    Excitor: {"peft_type": "EXCITOR", "layers": 2},
}
# For every refused field a value that PEFT would compute something else with.
SAMPLES = {
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "lora_ga",
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["q_proj.weight"],
    "trainable_token_indices": {"embed_tokens": [1]},
    "ensure_weight_tying": True,
    "alora_invocation_tokens": [5, 6],
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {},
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
    "monteclora_config": {"num_samples": 4},
    "velora_config": {"num_groups": 2},
    "megatron_config": {"hidden_size": 8},
    "num_transformer_submodules": 2,
    "target_modules": "attn",
}
REFUSED = [(m, name) for m in BASIC for name, rule in m.peft_fields.items() if isinstance(rule, Refused)]


def config_classes():
    peft = pytest.importorskip("peft")
    from fastpeft.peft import ExcitorConfig

    return {
        LoRA: peft.LoraConfig,
        IA3: peft.IA3Config,
        PTv2: peft.PrefixTuningConfig,
        LayerNorm: peft.LNTuningConfig,
        AdaptionPrompt: peft.AdaptionPromptConfig,
        Excitor: ExcitorConfig,
    }


@pytest.mark.parametrize("method", BASIC, ids=lambda m: m.name)
def test_every_field_of_pefts_configuration_is_known(method):
    """A new PEFT may bring a field: decide in the method's table what it does to the outputs, then this passes."""
    unknown = {f.name for f in dataclasses.fields(config_classes()[method])} - method.peft_fields.keys()
    assert not unknown
    assert all(rule in (READ, NEUTRAL) or isinstance(rule, Refused) for rule in method.peft_fields.values())


def test_the_methods_of_pefts_format_all_have_a_table():
    assert {m for m in METHODS.values() if m.peft_type is not None} - {METHODS["Prefix"]} == BASIC.keys()


@pytest.mark.parametrize("method", BASIC, ids=lambda m: m.name)
def test_pefts_own_defaults_are_accepted(method):
    """What PEFT writes of a configuration in which nothing special was asked for."""
    basic = {name: value for name, value in BASIC[method].items() if name != "peft_type"}
    written = json.loads(json.dumps(config_classes()[method](**basic).to_dict(), default=list))
    assert written.keys() > basic.keys() and from_peft(written) == from_peft(BASIC[method])


@pytest.mark.parametrize("method, name", REFUSED, ids=lambda value: value if isinstance(value, str) else value.name)
def test_refused_by_name_with_value_and_fix(method, name):
    with pytest.raises(ValueError) as error:
        from_peft(BASIC[method] | {name: SAMPLES[name]})
    assert f"{method.name} adapter: {name}={SAMPLES[name]!r} is not supported; {method.peft_fields[name].fix}" == str(error.value)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
@pytest.mark.parametrize("method", BASIC, ids=lambda m: m.name)
def test_unknown_and_unset(method, value):
    assert is_unset(value) and from_peft(BASIC[method] | {"use_future_maths": value}) == from_peft(BASIC[method])


@pytest.mark.parametrize("value", [True, 0, 0.0, 1.5, "on", [0], {"rank": None}])
@pytest.mark.parametrize("method", BASIC, ids=lambda m: m.name)
def test_unknown_and_set(method, value):
    with pytest.raises(ValueError, match=r"use_future_maths=.* is not supported; fastpeft does not know this field") as error:
        from_peft(BASIC[method] | {"use_future_maths": value})
    assert repr(value) in str(error.value)


def test_all_of_them_are_named_and_long_values_cut():
    with pytest.raises(ValueError, match=r"use_dora=True .*; alora_invocation_tokens=\[1, 1, .*\.\.\. is not .*; new=7 is not") as error:
        from_peft(BASIC[LoRA] | {"use_dora": True, "alora_invocation_tokens": [1] * 1000, "new": 7})
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga", "new", 1])
def test_starts_that_change_the_base(start):
    with pytest.raises(ValueError, match=r"init_lora_weights=.* may have changed the base"):
        from_peft(BASIC[LoRA] | {"init_lora_weights": start})


@pytest.mark.parametrize(
    "method, changed, said",
    [
        (LoRA, {"lora_alpha": True}, "lora_alpha must be a number"),
        (LoRA, {"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        (LoRA, {"rank_pattern": {"q_proj": 0}}, "r must be a positive integer, not 0"),
        (LoRA, {"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\] is no mapping"),
        (LoRA, {"rank_pattern": {"(": 3}}, "no regular expression"),
        (LoRA, {"alpha_pattern": {"q_proj": None}}, "lora_alpha must be a number, not None"),
        (LoRA, {"layers_to_transform": "0"}, "layers_to_transform='0' names no layers"),
        (LoRA, {"layers_to_transform": [0, True]}, "names no layers"),
        (LoRA, {"layers_to_transform": [-1]}, "names no layers"),
        (LoRA, {"layers_to_transform": [0], "target_modules": "q_proj"}, "not a regular expression"),
        (LoRA, {"exclude_modules": 3}, "3 names no modules"),
        (LoRA, {"use_rslora": "false"}, "use_rslora must be true or false"),
        (LoRA, {"target_modules": None}, "target_modules=None names no modules"),
        (LoRA, {"target_modules": []}, r"target_modules=\[\] names no modules"),
        (IA3, {"target_modules": None}, "target_modules=None names no modules"),
        (IA3, {"feedforward_modules": 3}, "3 names no modules"),
        (PTv2, {"num_virtual_tokens": None}, "num_virtual_tokens is missing"),
        (PTv2, {"num_virtual_tokens": 2.0}, "num_virtual_tokens must be a positive integer"),
        (Excitor, {"rotary": "no"}, "rotary must be true or false"),
    ],
)
def test_read_fields_of_a_wrong_kind(method, changed, said):
    with pytest.raises(ValueError, match=said):
        from_peft(BASIC[method] | changed)


READS = {
    **dict.fromkeys(("r", "num_virtual_tokens", "adapter_len", "adapter_layers", "layers", "num_prompts"), 7),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "gate_std", "prompt_std"), 0.5),
    **dict.fromkeys(("use_rslora", "rotary"), True),
    **{"exclude_modules": ["other"], "layers_to_transform": 0, "layers_pattern": "h"},
    **{"rank_pattern": {"other": 7}, "alpha_pattern": {"other": 7}},
    **dict.fromkeys(("target_modules", "feedforward_modules"), "other"),
    **{"gate": "layer", "excitor_scale": "head", "peft_type": "VERA"},
}


@pytest.mark.parametrize("method", BASIC, ids=lambda m: m.name)
def test_read_fields_are_read_and_neutral_ones_are_not(method):
    basic = from_peft(BASIC[method])
    of_the_model = {"num_layers", "num_attention_heads", "token_dim"}  # compared with the model's when the method is attached
    for name in {name for name, rule in method.peft_fields.items() if rule == READ} - of_the_model:
        try:
            assert from_peft(BASIC[method] | {name: READS[name]}) != basic, name
        except ValueError as error:
            assert name == "peft_type", error
    odd = {name: {"anything": [1]} for name, rule in method.peft_fields.items() if rule == NEUTRAL}
    assert odd and from_peft(BASIC[method] | odd) == basic


# --- against PEFT's own loading of the same folder


def llama(dtype=torch.float64):
    torch.manual_seed(7)
    return fp.build("llama-tiny", dtype=dtype, num_key_value_heads=2, initializer_range=0.2).eval()


def trained(wrapped, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.2)
    return wrapped


NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
# PEFT saves patterns in the order of the alphabet, and the first that matches counts: others it cannot load itself
PATTERNS = {
    "rank_pattern": {"rank_pattern": {r"layers\.1\..*_proj": 7, "q_proj": 1, "self_attn.q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.mlp.down_proj": 9, "^model.layers.0.self_attn.q_proj": 2, "proj": 100}},
    "both patterns, rslora": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r".*\.mlp\..*": 3.5}, "use_rslora": True},
    "exclude_modules": {"exclude_modules": ["layers.0.self_attn.q_proj", "1.mlp.down_proj"]},
    "exclude_modules, an expression": {"exclude_modules": r".*\.1\..*", "target_modules": r".*(q|v)_proj"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform, one of a kind": {"layers_to_transform": 1, "layers_pattern": "layers", "exclude_modules": ["q_proj"]},
    "layers_to_transform, a whole name": {
        "layers_to_transform": [1], "layers_pattern": ["h", "layers"], "target_modules": ["model.layers.0.mlp.up_proj", "v_proj"]
    },
}  # fmt: skip


def configs():
    """What may be set: fields that are read, and fields that change nothing."""
    import peft

    lora = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    neutral = {"qalora_group_size": 8, "megatron_core": "other", "corda_config": {}, "lora_ga_config": {}}
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}  # an older peft has fewer
    bookkeeping = {"revision": "main", "auto_mapping": {"base_model_class": "X"}, "peft_version": "9.9", "base_model_name_or_path": "x"}
    return {
        "LoRA": peft.LoraConfig(**lora),
        "LoRA, r and alpha": peft.LoraConfig(r=5, lora_alpha=2, target_modules=["layers.1.self_attn.v_proj", "mlp.up_proj"]),
        "LoRA, rslora": peft.LoraConfig(**lora, use_rslora=True),
        "LoRA, regular expression": peft.LoraConfig(r=2, lora_alpha=3, target_modules=r".*layers\.[02]\..*_proj"),
        "LoRA, dropout": peft.LoraConfig(**lora, lora_dropout=0.4, task_type="CAUSAL_LM", **bookkeeping),
        **{f"LoRA, {s}": peft.LoraConfig(**lora | {"r": 4}, init_lora_weights=s) for s in (False, "gaussian", "orthogonal", "eva", "mica")},
        "LoRA, neutral": peft.LoraConfig(**lora, **{name: value for name, value in neutral.items() if name in known}),
        **{f"LoRA, {name}": peft.LoraConfig(**lora | more) for name, more in PATTERNS.items()},
        "IA3, excluding": peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], exclude_modules=["layers.0.mlp.down_proj"]
        ),
        "LayerNorm, excluding": peft.LNTuningConfig(target_modules=[*NORMS, "q_proj"], exclude_modules=r".*proj"),
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        "IA3, endings": peft.IA3Config(target_modules=["k_proj", "down_proj", "n_proj"], feedforward_modules=["n_proj"]),
        "IA3, expressions": peft.IA3Config(target_modules=r".*(v|down)_proj", feedforward_modules=r".*\.1\..*down_proj"),
        "PTv2": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PTv2, projected": peft.PrefixTuningConfig(
            num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=24
        ),
        "LayerNorm": peft.LNTuningConfig(target_modules=NORMS, task_type="CAUSAL_LM"),
        "AdaptionPrompt": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    }


KINDS = [
    *(f"LoRA, {name}" for name in PATTERNS),
    *("IA3, excluding", "LayerNorm, excluding"),
    *("LoRA", "LoRA, r and alpha", "LoRA, rslora", "LoRA, regular expression", "LoRA, dropout", "LoRA, False", "LoRA, gaussian"),
    *("LoRA, orthogonal", "LoRA, eva", "LoRA, mica", "LoRA, neutral", "IA3", "IA3, endings", "IA3, expressions", "PTv2", "PTv2, projected"),
    *("LayerNorm", "AdaptionPrompt"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_computes_what_peft_computes(tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = configs()[kind]
    if kind == "LoRA, mica" and "mica" not in inspect.getsource(peft.LoraConfig):
        pytest.skip("this peft has no such start")
    base = llama(torch.float32 if kind == "LoRA, mica" else torch.float64)  # it starts from float32 alone
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    own = copy.deepcopy(base)
    fp.restore(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(peft.get_peft_model(copy.deepcopy(own), config)).save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(own), tmp_path).eval()
    with torch.no_grad():
        want, without = theirs(input_ids=ids).logits, base(input_ids=ids).logits
        got = fp.load_adapter(base, tmp_path)(input_ids=ids).logits
    largest = want.abs().max()
    # transformers' RMSNorm is float32, and PEFT keeps a prefix in float32
    assert (got - want).abs().max() < 1e-5 * largest < 1e-2 * (without - want).abs().max()


BLIP_KINDS = {
    "LoRA": {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], "use_rslora": True},
    "LoRA, patterns": {
        **{"r": 3, "lora_alpha": 5, "target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
        **{"exclude_modules": ["crossattention.output.dense"], "rank_pattern": {"query": 2}, "alpha_pattern": {"self.query": 4}},
    },
    "LoRA, exact names": {"r": 2, "lora_alpha": 7, "target_modules": ["bert.encoder.layer.0.attention.self.key", "output.dense"]},
    "IA3": {"target_modules": r".*(key|output\.dense)", "feedforward_modules": r".*output\.dense"},
}


@pytest.mark.parametrize("kind", BLIP_KINDS)
def test_a_blip_text_model_computes_what_peft_computes(miss, tmp_path, kind):
    peft = pytest.importorskip("peft")
    make = peft.IA3Config if kind == "IA3" else peft.LoraConfig
    own, model = miss.plain(miss.build()), miss.build()
    trained(peft.get_peft_model(copy.deepcopy(own.text_decoder), make(**BLIP_KINDS[kind]))).save_pretrained(tmp_path / "dec")
    theirs = peft.PeftModel.from_pretrained(own.text_decoder, tmp_path / "dec").eval()
    states = torch.randn(2, 6, 32, dtype=torch.float64)
    ids = torch.randint(5, 60, (2, 5))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "encoder_hidden_states": states, "use_cache": True}
    with torch.no_grad():
        want, without = theirs(**given).logits, model.text_decoder(**given).logits
        got = fp.load_adapter(model, tmp_path).text_decoder(**given).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert (without - want).abs().max() > 1e-2


WRITTEN = {
    "alora_invocation_tokens": lambda t: t | {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "layer_replication": lambda t: t | {"layer_replication": [[1, 3], [0, 2]]},  # as many layers, in another order
    "init_lora_weights": lambda t: t | {"init_lora_weights": "pissa"},
    "use_dora": lambda t: t | {"use_dora": True},
    "trainable_token_indices": lambda t: t | {"trainable_token_indices": [3]},
    "modules_to_save": lambda t: t | {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_peft_itself_wrote_is_refused(tmp_path, name):
    """The folder may have the same keys and shapes as plain LoRA's: the configuration alone tells."""
    peft = pytest.importorskip("peft")
    base, model = llama(torch.float32), llama()  # pissa starts from float32
    fp.restore(base)
    config = peft.LoraConfig(**WRITTEN[name]({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base, config).save_pretrained(tmp_path)
    before = {n: (type(m), dict(m.named_parameters(recurse=False))) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=rf"adapter_config\.json: LoRA adapter: {name}=.* is not supported; "):
        fp.load_adapter(model, tmp_path)
    after = {n: (type(m), dict(m.named_parameters(recurse=False))) for n, m in model.named_modules()}
    assert {n: (kind, {k: id(p) for k, p in own.items()}) for n, (kind, own) in after.items()} == {
        n: (kind, {k: id(p) for k, p in own.items()}) for n, (kind, own) in before.items()
    }


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "name, value", [("num_attention_heads", 1), ("num_layers", 2), ("token_dim", 3), ("num_transformer_submodules", 2)]
)
def test_a_prefix_of_another_shape(tmp_path, name, value):
    folder = fp.save_adapter(fp.adapt(llama(), "PTv2"), tmp_path / "a")
    (folder / "fastpeft.json").unlink()
    edit(folder / "llm" / "adapter_config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{name}(=| is ){value}"):
        fp.load_adapter(llama(), folder)


SELECTING = ["LoRA, rank_pattern", "LoRA, both patterns, rslora", "LoRA, layers_to_transform, one of a kind", "IA3, excluding"]


@pytest.mark.parametrize("kind", SELECTING)
def test_what_patterns_select_is_saved_for_peft_and_for_us(tmp_path, kind):
    """Loaded from PEFT, saved by us, loaded by both; merged, the same."""
    peft = pytest.importorskip("peft")
    base = llama()
    own = copy.deepcopy(base)
    fp.restore(own)
    trained(peft.get_peft_model(copy.deepcopy(own), configs()[kind])).save_pretrained(tmp_path / "theirs")
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = fp.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
        want = first(input_ids=ids).logits
        fp.save_adapter(first, tmp_path / "ours")
        again = fp.load_adapter(copy.deepcopy(base), tmp_path / "ours")
        assert again.fastpeft_plan == first.fastpeft_plan
        torch.testing.assert_close(again(input_ids=ids).logits, want, rtol=0, atol=0)
        fp.load_adapter(again, tmp_path / "theirs")  # into what is adapted so
        back = peft.PeftModel.from_pretrained(own, tmp_path / "ours" / "llm").eval()
        torch.testing.assert_close(back(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        torch.testing.assert_close(fp.merge(again)(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    other = fp.adapt(copy.deepcopy(base), llm=LoRA(r=3, lora_alpha=5, target_modules=("q_proj", "down_proj")))
    with pytest.raises(ValueError, match="options included"):
        fp.load_adapter(other, tmp_path / "theirs")
