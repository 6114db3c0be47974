"""Adapters on disk: bit-exact round trips, PEFT in both directions, errors that change nothing, atomic saves, merging."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft as fp
from fastpeft.adapters import describe, fingerprint

peft = pytest.importorskip("peft")

PLANS = (
    "LoRA/LoRA/LoRA",
    "IA3/IA3/IA3",
    "F/Prefix/Prefix",
    "F/PTv2/PTv2",
    "LayerNorm/LayerNorm/LayerNorm",
    "T/Attention/FFN",
    "F/LoRA/T",
    "LoRA+LayerNorm/LoRA+IA3/IA3+Prefix",
)
IN_PEFT = PLANS[:5]


def snapshot(model):
    """Everything that a failed load must leave as it was."""
    tensors = {name: (t.detach().clone(), t.requires_grad) for name, t in model.named_parameters()}
    return tensors, [(name, type(m), m.training) for name, m in model.named_modules()], getattr(model, "fastpeft_plan", None)


def assert_unchanged(model, before):
    tensors, kinds, plan = before
    now = snapshot(model)
    assert now[1:] == (kinds, plan)
    assert now[0].keys() == tensors.keys()
    for name, (tensor, required) in now[0].items():
        assert torch.equal(tensor, tensors[name][0]) and required == tensors[name][1], name


@pytest.mark.parametrize("plan", PLANS)
def test_round_trip_is_exact(miss, tmp_path, plan):
    model = miss.build(plan, dtype=torch.float32)
    fp.save_adapter(model, tmp_path / "adapter")
    loaded = fp.load_adapter(miss.build(dtype=torch.float32), tmp_path / "adapter")
    assert loaded.fastpeft_plan == model.fastpeft_plan
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    again = miss.build(plan, dtype=torch.float32, scatter=0.2)  # into a model that is adapted already
    again.requires_grad_(False)  # what an adapter is does not depend on what happens to be trainable
    fp.load_adapter(again, tmp_path / "adapter")
    assert all(torch.equal(ours[name], again.state_dict()[name]) for name in ours)


@pytest.mark.parametrize("plan", PLANS)
def test_frozen_models_save_all_the_same(miss, tmp_path, plan):
    model = miss.build(plan, dtype=torch.float32)
    fp.save_adapter(model, tmp_path / "a")
    fp.save_adapter(model.requires_grad_(False), tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_what_lies_in_the_folder(miss, tmp_path):
    model = miss.build("F/LoRA+IA3/T", r=2)
    folder = fp.save_adapter(model, tmp_path / "deep/adapter", description={"note": "é"}, write_more=lambda f: (f / "more").write_text("x"))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    parts = ("jtm-IA3", "jtm-LoRA")
    peft_files = [f"{part}/adapter_{file}" for part in parts for file in ("config.json", "model.safetensors")]
    assert names == ["dec/model.safetensors", "fastpeft.json", *peft_files, "more"]
    about = describe(folder)
    assert about["plan"] == "F/LoRA+IA3/T" and about["note"] == "é" and about["format"] == 1
    assert about["base"]["model"] == "miss-tiny" and about["base"]["overrides"] == miss.SMALL
    assert about["base_fingerprint"] == fingerprint(model)
    config = json.loads((folder / "jtm-LoRA/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2 and config["target_modules"] == ["query", "value"]
    keys = load_file(folder / "jtm-LoRA/adapter_model.safetensors").keys()
    assert "base_model.model.encoder.layer.0.crossattention.self.value.lora_B.weight" in keys
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["adapter"]


@torch.no_grad()
def outputs_of_parts(model, inputs, parts):
    """What vit, jtm and dec give for the same inputs, whoever runs them; without padding, where transformers is right."""
    image = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    states = torch.randn(3, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    text = {"attention_mask": torch.ones_like(inputs["input_ids"])}
    out = {"vit": image}
    if "jtm" in parts:
        out["jtm"] = model.text_encoder(input_ids=inputs["input_ids"], encoder_hidden_states=states, **text).last_hidden_state
    if "dec" in parts:
        text = {"attention_mask": torch.ones_like(inputs["labels"])}
        out["dec"] = model.text_decoder(input_ids=inputs["labels"], encoder_hidden_states=states, use_cache=True, **text).logits
    return out


@pytest.mark.parametrize("plan", IN_PEFT)
def test_plain_peft_runs_our_adapters(miss, tmp_path, plan):
    model, inputs = miss.build(plan), miss.batch()
    fp.save_adapter(model, tmp_path / "adapter")
    theirs = miss.plain(miss.build())
    # a prefix in the encoder: transformers shares peft's plain cache with cross-attention, so only tensors can be compared there
    parts = ("vit", "dec") if "F/P" in plan else tuple(miss.PARTS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT only warns of them
        for part, path in miss.PARTS.items():
            if (tmp_path / "adapter" / part).is_dir():
                setattr(theirs, path, peft.PeftModel.from_pretrained(getattr(theirs, path), tmp_path / "adapter" / part))
    want, got = outputs_of_parts(theirs, inputs, parts), outputs_of_parts(model, inputs, parts)
    base = outputs_of_parts(miss.build(), inputs, parts)
    for part in parts:
        torch.testing.assert_close(got[part], want[part], rtol=0, atol=1e-5 if "F/P" in plan else 1e-10)
        assert part == "vit" or not torch.allclose(base[part], want[part], atol=1e-3)  # the adapter does something
    if "F/P" in plan:
        matrix = theirs.text_encoder.prompt_encoder["default"].embedding.weight
        torch.testing.assert_close(model.text_encoder.prefix_encoder.matrix().float(), matrix.float(), rtol=0, atol=1e-6)


CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"]),
    "LoRA, rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*\.(key|dense)", use_rslora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "LayerNorm": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "PTv2": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "Prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=16),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_peft_run_in_ours(miss, tmp_path, kind):
    inputs, theirs = miss.batch(), miss.plain(miss.build())
    wrapped = peft.get_peft_model(theirs.text_decoder, CONFIGS[kind]())
    miss.scatter_trained(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "dec")
    theirs.text_decoder = wrapped
    model = fp.load_adapter(miss.build(), tmp_path)
    assert str(model.fastpeft_plan) == f"F/F/{kind.split(',')[0].replace('Prefix', 'PTv2')}"
    want, got = (outputs_of_parts(m, inputs, ("dec",))["dec"] for m in (theirs, model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if "P" in kind else 1e-10)
    fp.save_adapter(model, tmp_path / "ours")  # and back again
    assert {k: t.shape for k, t in load_file(tmp_path / "ours/dec/adapter_model.safetensors").items()} == {
        k: t.shape for k, t in load_file(tmp_path / "dec/adapter_model.safetensors").items()
    }


@pytest.mark.parametrize(
    "option, value",
    [
        ("use_dora", True),
        ("modules_to_save", ["cls"]),
        ("lora_bias", True),
        ("target_parameters", ["query.weight"]),
        ("bias", "all"),
        ("init_lora_weights", "pissa_niter_4"),
        ("peft_type", "VERA"),
        ("r", None),
        ("target_modules", None),
    ],
)
def test_peft_options_that_would_change_the_mathematics_are_refused(miss, tmp_path, option, value):
    fp.save_adapter(miss.build("F/F/LoRA"), tmp_path / "a")
    (tmp_path / "a/fastpeft.json").unlink()
    path = tmp_path / "a/dec/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    model = miss.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapter_config\.json.*" + ("" if value is None else option if option != "peft_type" else value)):
        fp.load_adapter(model, tmp_path / "a")
    assert_unchanged(model, before)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.encoder.layer.1.crossattention.self.value.lora_A.weight"
DAMAGE = {
    "a key gone": (lambda t: t.pop(KEY), rf"1 missing: {KEY}"),
    "a key too many": (lambda t: t.update(surplus=torch.zeros(1)), r"1 unexpected: surplus"),
    "misshapen": (lambda t: t.update({KEY: torch.zeros(3, 32)}), rf"1 misshapen: {KEY} is \[3, 32\], expected \[4, 32\]"),
    "transposed": (lambda t: t.update({KEY: t[KEY].t().contiguous()}), rf"1 misshapen: {KEY} is \[32, 4\], expected \[4, 32\]"),
    "renamed": (lambda t: t.update({KEY + "x": t.pop(KEY)}), rf"1 missing: {KEY}; 1 unexpected: {KEY}x"),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["fresh", "adapted"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit(miss, tmp_path, damage, adapted):
    change, message = DAMAGE[damage]
    folder = fp.save_adapter(miss.build("LoRA/LoRA/Prefix"), tmp_path / "a")
    rewrite(folder / "jtm/adapter_model.safetensors", change)
    model = miss.build("LoRA/LoRA/Prefix" if adapted else None, scatter=0.2).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"jtm does not fit this model and plan; nothing was loaded\. {message}"):
        fp.load_adapter(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize("adapted", [False, True], ids=["fresh", "adapted"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "dec/adapter_model.safetensors").unlink(), r"incomplete: .*dec.adapter_model\.safetensors is missing"),
        (lambda f: shutil.rmtree(f / "jtm"), r"incomplete: .*jtm.*is missing"),
        (lambda f: (f / "jtm/adapter_model.safetensors").write_bytes(b""), r"jtm.adapter_model\.safetensors is damaged"),
        (lambda f: truncate(f / "jtm/adapter_model.safetensors"), r"jtm.adapter_model\.safetensors is damaged"),
        (lambda f: flip(f / "jtm/adapter_model.safetensors"), r"jtm.adapter_model\.safetensors is damaged: its tensors are not those"),
        (lambda f: truncate(f / "fastpeft.json"), r"fastpeft\.json is damaged or not ours"),
        (lambda f: (f / "fastpeft.json").write_text("[]"), r"fastpeft\.json is damaged or not ours"),
        (lambda f: (f / "fastpeft.json").write_text('{"format": 1}'), r"fastpeft\.json is damaged or not ours"),
        (lambda f: edit(f, format=2), r"format 2 is newer than this fastpeft reads \(1\)"),
        (lambda f: edit(f, treatments={"vit": [{"Lora": {"rank": 3}}]}), r"fastpeft\.json: part 'vit': LoRA has no option rank"),
        (lambda f: edit(f, treatments={"vision": []}), r"fastpeft\.json: no part called 'vision'"),
        (lambda f: shutil.rmtree(f), r"no adapter folder at"),
        (lambda f: (shutil.rmtree(f), f.mkdir()), r"holds no adapter"),
    ],
)
def test_folders_that_are_no_adapter(miss, tmp_path, damage, message, adapted):
    folder = fp.save_adapter(miss.build("LoRA/LoRA/Prefix"), tmp_path / "a")
    damage(folder)
    model = miss.build("LoRA/LoRA/Prefix" if adapted else None, scatter=0.2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fp.load_adapter(model, folder)
    assert_unchanged(model, before)


def flip(path):
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(folder, **fields):
    path = folder / "fastpeft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_for_another_shape_or_plan(miss, tmp_path):
    folder = fp.save_adapter(miss.build("F/LoRA/LoRA"), tmp_path / "a")
    wide = fp.build("miss-tiny", pretrained=False, **miss.SMALL | {"hidden_size": 64})
    before = snapshot(wide)
    with pytest.warns(UserWarning, match="other base weights"), pytest.raises(ValueError, match=r"16 misshapen: .* and 8 more"):
        fp.load_adapter(wide, folder)
    assert_unchanged(wide, before)
    for other in (miss.build("F/LoRA/IA3"), miss.build("F/LoRA/LoRA", r=2), miss.build("F/LoRA/LoRA", lora_alpha=8)):
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"holds F/LoRA/LoRA, and the model is adapted with"):
            fp.load_adapter(other, folder)
        assert_unchanged(other, before)
    fp.load_adapter(miss.build("F/LoRA/LoRA", lora_dropout=0.3), folder)  # matters while training only


def test_other_base_weights_are_told(miss, tmp_path):
    folder = fp.save_adapter(miss.build("F/LoRA/T"), tmp_path / "a")
    other = miss.build()
    with torch.no_grad():
        other.text_encoder.encoder.layer[1].output.dense.weight.mul_(1.1)
    with pytest.warns(UserWarning, match="other base weights"):
        fp.load_adapter(other, folder)
    trained = miss.build()
    with torch.no_grad():  # what the adapter replaces may be anything
        trained.text_decoder.cls.predictions.transform.dense.weight.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.load_adapter(trained, folder)
        fp.load_adapter(miss.build(dtype=torch.bfloat16), folder)


def test_saves_are_atomic(miss, tmp_path):
    model, other = miss.build("F/LoRA/LoRA"), miss.build("F/LoRA/LoRA", scatter=0.3)
    folder = fp.save_adapter(model, tmp_path / "adapter")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fails(draft):
        assert (draft / "jtm/adapter_model.safetensors").is_file()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fp.save_adapter(other, folder, write_more=fails)
    with pytest.raises(TypeError):
        fp.save_adapter(other, folder, description={"not": object()})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(OSError, match="disk full"):
        fp.save_adapter(other, tmp_path / "new", write_more=fails)
    assert list(tmp_path.iterdir()) == [folder]
    fp.save_adapter(other, folder)
    assert list(tmp_path.iterdir()) == [folder]
    loaded = fp.load_adapter(miss.build(), folder).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in other.state_dict().items())


def test_saving_replaces_adapters_only(miss, tmp_path):
    model = miss.build("F/LoRA/LoRA")
    (tmp_path / "thesis.txt").write_text("years of work")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="give a new or an empty folder"):
            fp.save_adapter(model, target)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    fp.save_adapter(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="not adapted: call"):
        fp.save_adapter(miss.build(), tmp_path / "b")


@pytest.mark.parametrize("plan", ["LoRA/LoRA/LoRA", "IA3/IA3/IA3", "F/LoRA+IA3/T", "LayerNorm/LoRA/FFN"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_keeps_the_outputs(miss, plan, dtype):
    model, inputs = miss.build(plan, dtype=dtype, scatter=0.05), miss.batch(padded=True, dtype=dtype)
    names = miss.build().state_dict().keys()
    with torch.no_grad():
        want, images = model(**inputs).loss, model.vision_model(inputs["pixel_values"]).last_hidden_state
        base = miss.build(dtype=dtype)(**inputs).loss
    assert fp.merge(model) is model
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, want, rtol=tolerance, atol=0)
        merged = model.vision_model(inputs["pixel_values"]).last_hidden_state
    assert (merged - images).abs().max() <= tolerance * images.abs().max()
    assert dtype == torch.bfloat16 or abs(base - want) > 10 * tolerance * abs(want)  # the adapter did something
    assert model.state_dict().keys() == names and model.fastpeft_plan is None
    assert fp.count(model)["adapters"] == 0
    fp.adapt(model, "F/LoRA/LoRA")


def test_merging_rounds_once(miss):
    model = miss.build("F/LoRA/IA3", dtype=torch.bfloat16)
    query, key = model.text_encoder.encoder.layer[0].attention.self.query, model.text_decoder.bert.encoder.layer[0].attention.self.key
    weight, rows = (m.weight.detach().double() for m in (query, key))
    want = weight + query.scaling * query.lora_B.detach().double() @ query.lora_A.detach().double()
    want_rows, want_bias = rows * key.ia3_l.detach().double()[:, None], key.bias.detach().double() * key.ia3_l.detach().double()
    fp.merge(model)
    for got, exact in ((query.weight, want), (key.weight, want_rows), (key.bias, want_bias)):
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()  # half a unit in the last of 8 bits


@pytest.mark.parametrize("plan", ["F/LoRA/Prefix", "F/PTv2/IA3", "F/LoRA/IA3+Prefix"])
def test_a_prefix_is_not_merged(miss, plan):
    model = miss.build(plan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no weight can take in"):
        fp.merge(model)
    assert_unchanged(model, before)


def test_what_merging_refuses(miss):
    with pytest.raises(ValueError, match="not adapted"):
        fp.merge(miss.build())
    model = miss.build()
    fp.adapt(model, dec=fp.LoRA(target_modules=["decoder"]))  # the head is the word embedding too
    before = snapshot(model)
    with pytest.raises(ValueError, match="shares its weight"):
        fp.merge(model)
    assert_unchanged(model, before)


def test_an_adapter_trained_on_a_merged_base_says_so(miss, tmp_path):
    model = fp.merge(miss.build("F/LoRA/LoRA"))
    merged = copy.deepcopy(model)
    folder = fp.save_adapter(fp.adapt(model, "F/F/IA3"), tmp_path / "a")
    with pytest.warns(UserWarning, match="other base weights"):
        fp.load_adapter(miss.build(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.load_adapter(merged, folder)
