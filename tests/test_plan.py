"""Plans: the papers' notation, the papers' counts, what adapting does to a model and what it leaves alone."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft as fp
from fastpeft.models import parts_of
from fastpeft.plan import detach, parse

TABLES = Path(__file__).resolve().parents[2] / "shared/tables/params.json"
VIT, JTM, DEC = 86_339_328, 137_258_496, 137_881_148
ALL = VIT + JTM + DEC


@pytest.fixture(scope="module")
def count():
    """Counts of the full-size model under a plan, on meta tensors; one model serves all."""
    model = fp.build("miss", device="meta")

    def of(plan, **options):
        fp.adapt(model, plan, **options)
        counted = fp.count(model)
        detach(model)
        return counted

    return of


def test_parts_of_the_official_model():
    start = time.perf_counter()
    model = fp.build("miss", device="meta")
    counted = fp.count(model)
    assert time.perf_counter() - start < 10
    assert all(p.is_meta for p in model.parameters())
    assert {name: part["total"] for name, part in counted["parts"].items()} == {"vit": VIT, "jtm": JTM, "dec": DEC}
    assert counted["total"] == counted["base"] == ALL == 361_478_972
    assert counted["adapters"] == 0


# trainable parameters that each treatment gives vit, jtm, dec, from the papers' own rules; None where they have no row
RULES = {
    "F": (0, 0, 0),
    "T": (VIT, JTM, DEC),
    "LoRA": (4 * 148_992, 4 * 73_728, 4 * 73_728),
    "IA3": (36_864, 92_160, 92_160),
    "Prefix": (None, 14_772_480, 14_772_480),
    "PTv2": (None, 184_320, 184_320),
    "LayerNorm": (None, 56_832, 58_368),
    "Attention": (None, 56_733_696, 56_733_696),
    "FFN": (None, 56_669_184, 56_669_184),
}
ADDED = ("LoRA", "IA3", "Prefix", "PTv2")


@pytest.mark.parametrize("name, i, expected", [(name, i, n) for name, row in RULES.items() for i, n in enumerate(row) if n is not None])
def test_each_treatment_of_each_part(count, name, i, expected):
    counted = count("/".join(name if j == i else "F" for j in range(3)))
    assert counted["trainable"] == expected
    assert counted["parts"][("vit", "jtm", "dec")[i]]["trainable"] == expected
    assert counted["adapters"] == (expected if name in ADDED else 0)
    assert counted["base"] == ALL


# rows of MILE's tables (percent of base and adapters, three digits) and of the LayerNorm paper's (percent of base, two digits)
MILE = [
    ("F/LoRA/LoRA", 4, 0.163),
    ("F/LoRA/LoRA", 8, 0.325),
    ("LoRA/LoRA/LoRA", 4, 0.327),
    ("LoRA/LoRA/LoRA", 8, 0.652),
    ("F/T/LoRA", 4, 38.022),
    ("F/T/LoRA", 8, 38.072),
    ("T/LoRA/LoRA", 4, 24.009),
    ("T/LoRA/LoRA", 8, 24.133),
    ("T/T/LoRA", 4, 61.887),
    ("T/T/LoRA", 8, 61.919),
    ("F/F/Prefix", None, 3.926),
    ("F/Prefix/Prefix", None, 7.556),
    ("T/Prefix/Prefix", None, 29.636),
    ("T/T/Prefix", None, 63.354),
    ("F/IA3/IA3", None, 0.051),
    ("IA3/IA3/IA3", None, 0.061),
    ("T/IA3/IA3", None, 23.924),
    ("F/T/IA3", None, 37.987),
    ("T/T/IA3", None, 61.866),
    ("F/F/PTv2", None, 0.051),
    ("F/PTv2/PTv2", None, 0.102),
    ("T/PTv2/PTv2", None, 23.963),
    ("T/T/PTv2", None, 61.876),
]
LAYER_NORM = [
    ("T/T/T", 361_478_972, 100.0),
    ("T/LayerNorm/LayerNorm", 86_454_528, 23.92),
    ("T/LayerNorm/T", 224_277_308, 62.04),
    ("T/T/LayerNorm", 223_656_192, 61.87),
    ("T/Attention/Attention", 199_806_720, 55.27),
    ("T/Attention/T", 280_954_172, 77.72),
    ("T/T/Attention", 280_331_520, 77.55),
    ("T/FFN/FFN", 199_677_696, 55.24),
    ("T/FFN/T", 280_889_660, 77.71),
    ("T/T/FFN", 280_267_008, 77.53),
    ("T/LoRA/LoRA", 86_929_152, 24.05),
    ("T/LoRA/T", 224_515_388, 62.11),
    ("T/T/LoRA", 223_892_736, 61.94),
    ("T/Prefix/Prefix", 115_884_288, 32.06),
    ("T/Prefix/T", 238_992_956, 66.12),
    ("T/T/Prefix", 238_370_304, 65.94),
]


@pytest.mark.parametrize("plan, r, percent", MILE)
def test_rows_of_mile(count, plan, r, percent):
    assert round(count(plan, **({"r": r} if r else {}))["percent"], 3) == percent


@pytest.mark.parametrize("plan, trainable, percent", LAYER_NORM)
def test_rows_of_the_layer_norm_paper(count, plan, trainable, percent):
    counted = count(plan)
    assert counted["trainable"] == trainable
    assert round(counted["percent_of_base"], 2) == percent


def test_every_row_of_the_published_tables(count):
    if not TABLES.is_file():
        pytest.skip("no params.json beside this checkout; the rows above are in this file")
    rows = [row for row in json.loads(TABLES.read_text()) if row["model"] == "miss"]
    assert rows
    for row in rows:
        counted = count(row["plan"], **({"r": row["rank"]} if row["rank"] else {}))
        assert counted["trainable"] == row["trainable"], row
        key = "percent" if row["percent_of"] == "base+adapters" else "percent_of_base"
        digits = len(str(row["percent"]).partition(".")[2])
        assert round(counted[key], digits) == row["percent"], row


def test_parts_sum_to_the_whole(miss):
    counted = fp.count(miss.build("LoRA/Prefix+IA3/T"))
    for field in ("total", "base", "adapters", "trainable"):
        assert sum(part[field] for part in counted["parts"].values()) == counted[field]
    assert counted["percent"] == 100 * counted["trainable"] / (counted["base"] + counted["adapters"])
    assert counted["percent_of_base"] == 100 * counted["trainable"] / counted["base"]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "given",
    [
        {"plan": "f / lora/ IA3"},
        {"plan": {"jtm": "LORA", "dec": {"ia3": None}}},
        {"plan": {"vit": None, "jtm": [fp.LoRA()], "dec": fp.IA3()}},
        {"vit": "F", "jtm": fp.LoRA(), "dec": "IA3"},
        {"jtm": "LoRA", "dec": "IA3"},
    ],
    ids=["string", "mapping", "methods", "keywords", "left out"],
)
def test_ways_to_say_one_plan(miss, given):
    model = fp.adapt(miss.build(), **given)
    assert str(model.fastpeft_plan) == "F/LoRA/IA3"
    assert trained(model) == trained(miss.build("F/LoRA/IA3"))


@pytest.mark.parametrize(
    "text",
    ["plan: F/LoRA/IA3", "F/LoRA/IA3", "jtm: LoRA\ndec: IA3", "plan:\n  vit: F\n  jtm: {LoRA: {r: 2, lora_alpha: 8}}\n  dec: [IA3]"],
)
def test_plan_from_a_file(miss, tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    for given in (path, str(path)):
        plan = parse(given, parts_of(miss.build()))
        assert str(plan) == "F/LoRA/IA3"
    if "r: 2" in text:
        assert plan.treatments["jtm"] == (fp.LoRA(r=2, lora_alpha=8),)


def test_options_reach_the_methods_that_have_them(miss):
    plan = miss.build("LoRA/LoRA+Prefix/IA3", r=2, num_virtual_tokens=3).fastpeft_plan
    assert plan.treatments == {
        "vit": (fp.LoRA(r=2),),
        "jtm": (fp.LoRA(r=2), fp.Prefix(num_virtual_tokens=3)),
        "dec": (fp.IA3(),),
    }
    mixed = fp.adapt(miss.build(), jtm=fp.LoRA(r=3), dec="LoRA", r=2).fastpeft_plan  # a method given whole keeps its own
    assert mixed.treatments["jtm"] + mixed.treatments["dec"] == (fp.LoRA(r=3), fp.LoRA(r=2))


def test_options_in_brackets(miss):
    parts = parts_of(miss.build())
    said = "LoRA(r=2, target_modules=[fc1, fc2])/LoRA(r=8,lora_alpha=1e1)+Prefix( num_virtual_tokens = 3 )/"
    said += "LoRA(target_modules='.*/x+(q|v)')"
    assert parse(said, parts).treatments == {
        "vit": (fp.LoRA(r=2, target_modules=["fc1", "fc2"]),),
        "jtm": (fp.LoRA(r=8, lora_alpha=10.0), fp.Prefix(num_virtual_tokens=3)),
        "dec": (fp.LoRA(target_modules=".*/x+(q|v)"),),
    }
    assert parse(said.replace("r=2, ", "").split("/LoRA")[0] + "/F/F", parts, r=3).treatments["vit"][0].r == 3
    assert parse({"dec": "LoRA(r=5)"}, parts).treatments["dec"] == (fp.LoRA(r=5),)


def test_plan_survives_json(miss):
    parts = parts_of(miss.build())
    plan = parse({"vit": "LoRA", "jtm": fp.LoRA(r=3, target_modules=["query"]), "dec": "LayerNorm+Prefix"}, parts, r=2)
    assert parse(json.loads(json.dumps(plan.to_dict())), parts) == plan
    assert fp.adapt(miss.build(), plan).fastpeft_plan == plan


@pytest.mark.parametrize(
    "plan, options, message",
    [
        ("F/LoRA", {}, r"2 treatments.*3 parts: vit/jtm/dec"),
        ("F/LoRA/LoRA/F", {}, r"4 treatments"),
        ("F/Lora/Lroa", {}, r"part 'dec': unknown treatment 'Lroa' \(did you mean LoRA\?\); known: F, T, LoRA"),
        ("F//F", {}, r"part 'jtm': unknown treatment ''"),
        ("F/LoRA/LoRA", {"rank": 4}, r"no method of this plan takes rank"),
        ("F/IA3/IA3", {"r": 4}, r"no method of this plan takes r"),
        ("F/LoRA/LoRA", {"r": 0}, r"r must be a positive integer, not 0"),
        ("F/LoRA/LoRA", {"r": 2.0}, r"r must be a positive integer"),
        ("F/LoRA/LoRA", {"r": True}, r"r must be a positive integer"),
        ("F/LoRA/LoRA", {"lora_alpha": "32"}, r"lora_alpha must be a number"),
        ("F/LoRA/LoRA", {"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ("F/LoRA/LoRA", {"target_modules": "query("}, r"no regular expression"),
        ("F/LoRA/LoRA", {"target_modules": [1]}, r"names no modules"),
        ("F/LoRA/LoRA", {"target_modules": ["nothing"]}, r"no linear layer or convolution of 'jtm' matches"),
        ("F/Prefix/Prefix", {"num_virtual_tokens": 0}, r"Prefix: num_virtual_tokens must be a positive integer"),
        ("F/Prefix/Prefix", {"projection_dim": 1.5}, r"Prefix: projection_dim must be a positive integer"),
        ("LoRA/F/Prefix+PTv2", {}, r"part 'dec': 'Prefix\+PTv2' cannot be combined"),
        ("F/LoRA+LoRA/F", {}, r"part 'jtm': 'LoRA\+LoRA' cannot be combined"),
        ("F+LoRA/F/F", {}, r"F stands alone"),
        ("F/LoRA(r=4/F", {}, r"2 treatments"),
        ("F/F/LoRA(r=4", {}, r"'LoRA\(r=4' is no treatment with options: write LoRA\(option=value"),
        ("F/F/LoRA(4)", {}, r"is no treatment with options"),
        ("F/F/LoRA()", {}, r"is no treatment with options"),
        ("F/F/LoRA(r=4, r=5)", {}, r"has an option twice"),
        ("F/F/LoRA(rank=4)", {}, r"LoRA has no option rank"),
        ("F/F/LoRA(r=[1)", {}, r"part 'dec'"),
        ("F/F/LoRA(r=&a [*a])", {}, r"part 'dec'"),
        ("F/F/LoRA(r=many)", {}, r"r must be a positive integer, not 'many'"),
        ("LoRA/LoRA/Prefix+", {}, r"unknown treatment ''"),
        ("Prefix/F/F", {}, r"Prefix is not defined for part 'vit'"),
        ({"vti": "F"}, {}, r"no part called 'vti'; this model's parts are vit, jtm, dec"),
        ({"vit": 3}, {}, r"part 'vit': 3 is no treatment"),
        ({"vit": {"LoRA": 4}}, {}, r"4 are no options of LoRA"),
        ({"vit": {"LoRA": {"name": 4}}}, {}, r"LoRA has no option name; it has .*lora_alpha"),
        ({"vit": []}, {}, r"part 'vit'"),
        (["F", "F", "F"], {}, r"is no plan"),
        (3, {}, r"is no plan"),
        ("missing.yaml", {}, r"cannot read the plan missing.yaml"),
        (None, {}, r"give a plan such as"),
        ("F/F/F", {"vit": "F"}, r"not both"),
    ],
)
def test_errors_name_the_mistake_and_leave_the_model(miss, plan, options, message):
    model = miss.build().train()
    model.text_encoder.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        fp.adapt(model, plan, **options)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == kinds
    fp.adapt(model, "F/LoRA/Prefix")  # nothing stands in the way of a right one


@pytest.mark.parametrize("content", [b"[1, 2]", b"plan: [1", b"3", b"\xff\xfe\x00", b""])
def test_files_that_hold_no_plan(miss, tmp_path, content):
    path = tmp_path / "plan.yml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.yml"):
        fp.adapt(miss.build(), path)


def test_one_plan_at_a_time(miss):
    model = miss.build("F/LoRA/LoRA")
    with pytest.raises(ValueError, match=r"adapted already \(F/LoRA/LoRA\)"):
        fp.adapt(model, "F/LoRA/LoRA")
    with pytest.raises(ValueError, match="holds its options already"):
        fp.adapt(miss.build(), model.fastpeft_plan, r=2)


@pytest.mark.parametrize(("wrap", "name"), [(torch.nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_a_wrapper_is_named_with_what_it_wraps(wrap, name, tmp_path):
    model = wrap(fp.adapt(fp.build("llama-tiny"), "LoRA"))
    for function in (fp.count, fp.merge, lambda wrapped: fp.save_adapter(wrapped, tmp_path / "adapter")):
        with pytest.raises(ValueError, match=f"wraps a model: give the one inside, model.{name}"):
            function(model)


def test_detach_gives_the_base_back(miss):
    base, model = miss.build(), miss.build("LoRA+IA3/LoRA+Prefix/PTv2")
    detach(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values()))
    inputs = miss.batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, base(**inputs).loss)
    fp.adapt(model, "F/LoRA/LoRA")


def test_a_fresh_adapter_changes_nothing(miss):
    inputs = miss.batch()
    with torch.no_grad():
        want = miss.build()(**inputs).loss
        for plan in ("LoRA/LoRA/LoRA", "IA3/IA3/IA3", "LayerNorm/Attention/FFN"):
            torch.testing.assert_close(miss.build(plan, scatter=0)(**inputs).loss, want, rtol=1e-12, atol=0)


def test_build_depends_on_its_seed_alone():
    before = torch.get_rng_state()
    first, same, other = (fp.build("miss-tiny", pretrained=False, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["vision_model.embeddings.position_embedding"], other["vision_model.embeddings.position_embedding"])


def test_build_gives_an_optimised_model_in_evaluation(miss):
    model = fp.build("miss-tiny", pretrained=False, dtype=torch.bfloat16, **miss.SMALL)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.fastpeft_source["model"] == "miss-tiny"
    assert not fp.optimize(model).swapped  # all is fused already


def test_build_from_a_folder(miss, tmp_path):
    base = miss.build(dtype=torch.float32)
    base.save_pretrained(tmp_path / "folder")
    model = fp.build(tmp_path / "folder", dtype=torch.float64)
    inputs = miss.batch()
    with torch.no_grad():
        want = miss.build(dtype=torch.float32).double()(**inputs).loss
        torch.testing.assert_close(model(**inputs).loss, want, rtol=1e-12, atol=0)
    assert all(p.is_meta for p in fp.build(tmp_path / "folder", device="meta").parameters())
    with pytest.raises(ValueError, match=r"its shape is in its config\.json, so image_size= cannot"):
        fp.build(tmp_path / "folder", image_size=64)


def test_build_says_what_is_wrong(miss, tmp_path):
    with pytest.raises(ValueError, match=r"neither a model name \(miss, .*\) nor a folder"):
        fp.build("mis")
    with pytest.raises(ValueError, match=r"cannot read config\.json"):
        fp.build(tmp_path)
    with pytest.raises(ValueError, match="imagesize"):
        fp.build("miss-tiny", pretrained=False, imagesize=64)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert' is not supported"):
        fp.build(tmp_path)


def test_build_checks_the_weights_of_a_folder(miss, tmp_path):
    miss.build(dtype=torch.float32).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    name = "text_encoder.encoder.layer.0.output.dense.weight"

    def rewritten(changed):
        save_file(changed, weights, metadata={"format": "pt"})
        return fp.build(tmp_path)

    rewritten(tensors | {"text_encoder.embeddings.position_ids": torch.arange(128)[None]})  # older transformers saved this buffer
    with pytest.raises(ValueError, match=f"missing_keys: {name}"):
        rewritten({key: t for key, t in tensors.items() if key != name})
    with pytest.raises(ValueError, match="unexpected_keys: surplus"):
        rewritten(tensors | {"surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=name):
        rewritten(tensors | {name: torch.zeros(3, 3)})
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="did not load as BlipForQuestionAnswering"):
        fp.build(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="did not load as BlipForQuestionAnswering"):
        fp.build(tmp_path)
