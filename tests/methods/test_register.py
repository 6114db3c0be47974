"""A method of one's own becomes a treatment by name: in plans, YAML, counts, training, saved adapters."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import fastpeft as fp
from fastpeft import methods
from fastpeft.methods import METHODS, Method, register_method
from fastpeft.methods.base import find


@dataclass(frozen=True)
class BitFit(Method):
    """Biases are trained."""

    name: ClassVar[str] = "BitFit"

    def trains(self, root, part):
        return {name: p for name, p in root.named_parameters() if name.endswith(".bias") and part.holds(name)}

    def attach(self, root, part):
        for parameter in self.trains(root, part).values():
            parameter.requires_grad_(True)


class Shift(nn.Module):
    """What a layer puts out, plus a vector."""

    def __init__(self, layer):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
        self.handles = [layer.register_forward_hook(self.add)]

    @staticmethod
    def add(layer, args, output):
        return output + layer.shift_adapter.shift


@dataclass(frozen=True)
class Shifts(Method):
    """A trained vector is added to the output of linear layers."""

    name: ClassVar[str] = "Shifts"
    adapter_modules: ClassVar[tuple[str, ...]] = ("shift_adapter",)
    mergeable: ClassVar[bool] = False
    targets: tuple[str, ...] = ("q_proj",)

    def attach(self, root, part):
        for _, layer in list(find(root, self.targets, (nn.Linear,))):
            layer.shift_adapter = Shift(layer)

    def tensors(self, root, part):
        return {name: p.detach() for name, p in root.named_parameters() if "shift_adapter" in name.split(".")}


@pytest.fixture(autouse=True)
def registered(methods_restored):
    register_method(BitFit)
    register_method(Shifts)


def batch(model):
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def test_a_method_that_trains_the_base(tmp_path):
    model = fp.adapt(fp.build("miss-tiny"), "F/bitfit/LoRA+BitFit", r=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("query.bias") for name in trained) and all(name.endswith(".bias") or "lora" in name for name in trained)
    assert not any(name.startswith("vision_model.") for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    fp.save_adapter(model, tmp_path / "a")
    again = fp.load_adapter(fp.build("miss-tiny"), tmp_path / "a")
    assert str(again.fastpeft_plan) == "F/BitFit/LoRA+BitFit"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    fp.merge(model)  # what it trained is the base's own


def test_a_method_that_adds_modules(tmp_path):
    base = fp.build("llama-tiny")
    inputs = batch(base)
    plain = base(**inputs).loss
    (tmp_path / "plan.yaml").write_text("plan:\n  llm:\n    - Shifts: {targets: [q_proj, v_proj]}\n    - LoRA: {r: 2}\n")
    model = fp.adapt(base, tmp_path / "plan.yaml")
    shifts = [p for name, p in model.named_parameters() if name.endswith("shift_adapter.shift")]
    assert len(shifts) == 2 * model.config.num_hidden_layers and all(p.requires_grad for p in shifts)
    assert fp.count(model)["adapters"] == sum(p.numel() for name, p in model.named_parameters() if p.requires_grad)
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert all(p.grad.norm() > 0 for p in shifts)
    with torch.no_grad():
        for p in shifts:
            p.add_(0.1)
    fp.save_adapter(model, tmp_path / "a")
    again = fp.load_adapter(fp.build("llama-tiny"), tmp_path / "a")
    torch.testing.assert_close(again(**inputs).loss, model(**inputs).loss)
    with pytest.raises(ValueError, match="no weight can take in Shifts"):
        fp.merge(again)


def test_what_fails_leaves_the_model_as_it_was():
    model = fp.build("llama-tiny")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="no linear layer"):
        fp.adapt(model, llm=[Shifts(), fp.LoRA(target_modules=("nowhere",))])
    assert list(model.state_dict()) == before


def test_once_more_is_no_error_and_another_of_the_name_is():
    assert register_method(BitFit) is BitFit
    other = dataclass(frozen=True)(type("Other", (Method,), {"name": "bitfit", "attach": BitFit.attach}))
    with pytest.raises(ValueError, match="a treatment is called BitFit already"):
        register_method(other)


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({}, ValueError, "name is None"),
        ({"name": "a/b"}, ValueError, "a word that a plan can hold"),
        ({"name": "lora"}, ValueError, "a treatment is called LoRA already"),
        ({"name": "Mine", "peft_type": "LORA"}, ValueError, "leave it None"),
        ({"name": "Mine", "adapter_modules": ("excitor",)}, ValueError, "excitor belong to another method"),
        ({"name": "Mine", "adapter_modules": ("mine",)}, TypeError, "mergeable = False"),
    ],
)
def test_what_cannot_be_a_treatment_is_named(fields, error, words):
    with pytest.raises(error, match=words):
        register_method(dataclass(frozen=True)(type("Mine", (Method,), fields)))
    assert "Mine" not in METHODS


def test_what_is_no_method_is_named():
    with pytest.raises(TypeError, match="is no method"):
        register_method(nn.Linear)
    with pytest.raises(TypeError, match=r"@dataclass\(frozen=True\)"):
        register_method(type("Loose", (Method,), {"name": "Loose"}))


def test_installed_packages_announce_theirs(monkeypatch):
    del METHODS["BitFit"]
    methods._load_announced.cache_clear()
    announced = [SimpleNamespace(load=lambda: BitFit)]
    monkeypatch.setattr(methods.importlib.metadata, "entry_points", lambda group: announced if group == "fastpeft.methods" else [])
    assert fp.adapt(fp.build("miss-tiny"), "F/F/bitfit").fastpeft_plan.treatments["dec"] == (BitFit(),)
    methods._load_announced.cache_clear()


def test_a_name_nearly_right_is_guessed():
    with pytest.raises(ValueError, match=r"unknown treatment 'LORRA' \(did you mean LoRA\?\); known: F, T, LoRA"):
        fp.adapt(fp.build("miss-tiny"), "F/F/LORRA")
