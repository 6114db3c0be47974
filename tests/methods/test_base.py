"""Which modules a name means, what counts as an adapter, and layers that change class in place."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft as fp
from fastpeft.methods import METHODS, is_adapter
from fastpeft.methods.adapted import AdaptedLinear, adapted
from fastpeft.methods.base import check_keys, find, matches
from fastpeft.models import parts_of


@pytest.mark.parametrize(
    "name, targets, expected",
    [
        ("layer.0.query", ("query",), True),
        ("query", ("query",), True),
        ("layer.0.myquery", ("query",), False),
        ("layer.0.query.base", ("query",), False),
        ("layer.0.output.dense", ("output.dense",), True),
        ("layer.0.intermediate.dense", ("output.dense",), False),
        ("layer.0.query", r".*\.query", True),
        ("layer.0.query", "query", False),
        ("layer.0.query", (), False),
    ],
)
def test_names_match_as_in_peft(name, targets, expected):
    assert matches(name, targets) is expected


def test_names_match_the_modules_that_peft_wraps(miss):
    peft = pytest.importorskip("peft")
    for targets in (["query", "value"], ["output.dense"], r"bert\.encoder\.layer\.1\..*key", ["layer.0.attention.self.key"]):
        decoder = miss.plain(miss.build()).text_decoder
        ours = {name for name, _ in find(decoder, targets, (nn.Linear,))}
        wrapped = peft.get_peft_model(decoder, peft.LoraConfig(target_modules=targets))
        assert ours == set(wrapped.base_model.targeted_module_names)


def test_adapters_are_told_by_name(miss):
    model = miss.build("LoRA/IA3/Prefix")
    base = dict(miss.build().named_parameters())
    assert {name for name, _ in model.named_parameters() if not is_adapter(name)} == base.keys()


def test_classes_change_in_place():
    linear = nn.Linear(3, 2)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    weight, x = linear.weight, torch.randn(4, 3)
    want = linear(x)
    assert adapted(linear) is linear and type(linear) is AdaptedLinear and linear.weight is weight
    assert adapted(linear) is linear
    assert torch.equal(linear(x), want) and len(calls) == 2
    assert linear.state_dict().keys() == {"weight", "bias"}
    linear.remove()
    assert type(linear) is nn.Linear and vars(linear).keys() == vars(nn.Linear(3, 2)).keys()
    assert torch.equal(linear(x), want)


def test_only_plain_layers_carry_adapters(miss):
    class Other(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"cannot attach to a Other; only nn\.Linear and nn\.Conv2d"):
        adapted(Other(2, 2))
    model = miss.build()
    model.text_decoder.bert.encoder.layer[1].attention.self.query.__class__ = Other
    before = [type(m) for m in model.modules()]
    with pytest.raises(TypeError):
        fp.adapt(model, "LoRA/LoRA/LoRA")
    assert [type(m) for m in model.modules()] == before  # what was attached on the way is gone again
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("plan", ["LoRA/LoRA/LoRA", "IA3/IA3/IA3", "F/Prefix/PTv2", "T/LayerNorm/FFN"])
def test_copies_pickles_and_state_dicts(miss, plan):
    model, inputs = miss.build(plan), miss.batch()
    with torch.no_grad():
        want = model(**inputs).loss
        copied = copy.deepcopy(model)
        restored = pickle.loads(pickle.dumps(model))
        fresh = miss.build(plan, scatter=0.3)
        assert fresh(**inputs).loss != want
        fresh.load_state_dict(model.state_dict())
        for other in (copied, restored, fresh):
            assert torch.equal(other(**inputs).loss, want)
        miss.scatter_trained(copied)
        assert torch.equal(model(**inputs).loss, want)  # a copy shares nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_half_precision_bases_are_float32(miss, dtype):
    model = fp.build("miss-tiny", pretrained=False, dtype=dtype, **miss.SMALL)
    fp.adapt(model, "LoRA/IA3/Prefix")
    kinds = {is_adapter(name): p.dtype for name, p in model.named_parameters()}
    assert kinds == {False: dtype, True: torch.float64 if dtype == torch.float64 else torch.float32}


def test_every_method_names_what_it_saves(miss):
    for name in METHODS:
        if name in ("Excitor", "AdaptionPrompt") or name.endswith("Adapter"):
            continue
        model = miss.build(f"F/{name}/{name}")
        for part in parts_of(model):
            (method,) = model.fastpeft_plan.treatments[part.name]
            trained = [p for p in part.of(model).parameters() if p.requires_grad]
            saved = method.tensors(part.of(model), part)
            assert bool(saved) == bool(trained)
            if method.name != "Prefix":  # which saves its projection's output as well
                assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trained)


def test_keys_that_do_not_fit_are_named():
    expected = {f"k{i}": torch.zeros(2) for i in range(12)}
    check_keys(expected, {name: torch.ones(2) for name in expected}, "here")
    with pytest.raises(ValueError, match=r"here does not fit .* 12 missing: k0, k1, k10, .* and 4 more; 1 unexpected: x"):
        check_keys(expected, {"x": torch.zeros(2)}, "here")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_merges_or_says_that_it_cannot(name):
    method = METHODS[name]()
    part, root = parts_of(fp.build("miss-tiny"))[0], nn.Linear(2, 2)
    if method.mergeable:
        assert method.merge(root, part, {}) is True  # nothing of it is attached here
    else:
        with pytest.raises(ValueError, match=f"no weight can take in {name}"):
            method.merge(root, part, {})
