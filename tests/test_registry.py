"""The registry of fused modules: classes by dotted paths, nothing imported for them, what is exchanged and what comes back."""

import pickle
import subprocess
import sys
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers as T
from torch import nn

import fastpeft as fp
from fastpeft import registry
from fastpeft.coverage import why_unknown
from fastpeft.fused.layers.norms import FusedLayerNorm
from fastpeft.registry import Form, exchange, form_of, fused_class, fuses, give_back, has_form, is_fused, path_of

LOADED = """
import sys
import fastpeft as fp
{what}
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("peft", "bitsandbytes") or ".modeling_" in name))
"""
BUILD = "fp.build({!r}, device='meta', pretrained=False)"


@pytest.mark.parametrize(
    "what, there, absent",
    [
        ("import fastpeft.plan, fastpeft.optimize, fastpeft.fused", (), ("blip", "llama", "clip", "llava")),
        (BUILD.format("miss"), ("blip",), ("llama", "clip", "llava")),
        (BUILD.format("llama-tiny"), ("llama",), ("blip", "clip", "llava")),
    ],
    ids=["import", "miss", "llama"],
)
def test_only_the_models_own_modules_are_imported(what, there, absent):
    done = subprocess.run([sys.executable, "-c", LOADED.format(what=what)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert all(f"transformers.models.{name}.modeling_{name}" in loaded for name in there)
    assert not [name for name in loaded if name.startswith(tuple(f"transformers.models.{name}." for name in absent))]
    assert not [name for name in loaded if name.split(".")[0] in ("peft", "bitsandbytes")]


@pytest.fixture
def forms(monkeypatch):
    """Registrations that end with the test."""
    for name in ("_FORMS", "_CODES", "_FUSED", "_REPLACED", "_FORM_OF"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_FOUND", WeakKeyDictionary())


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Tripling(nn.Module):
    def forward(self, x):
        return 3 * x


def test_one_form_of_several_classes(forms):
    calls = []

    @fuses(f"{Doubling.__module__}.Doubling", f"{Tripling.__module__}.Tripling", "nobodys.package.Module", note="noted", layout_aware=True)
    class Fused:
        """Calls the class it replaces."""

        def forward(self, x):
            calls.append(type(self).__name__)
            return super().forward(x)

    for cls, factor in ((Doubling, 2), (Tripling, 3)):
        module = cls()
        form = form_of(module)
        assert isinstance(form, Form) and form.fused is Fused and form.note == "noted" and form.layout_aware and not is_fused(module)
        assert has_form(module, Fused) and not has_form(module, FusedLayerNorm)
        exchange(module)
        assert is_fused(module) and form_of(module) is form and isinstance(module, Fused) and isinstance(module, cls)
        assert path_of(type(module)) == path_of(cls) and type(module) is fused_class(cls) is not cls
        assert module(torch.ones(1)).item() == factor and calls.pop() == cls.__name__
        give_back(module)
        assert type(module) is cls and module(torch.ones(1)).item() == factor and not calls
    assert {"Doubling", "Tripling", "Module"} <= set(registry.known_names())
    assert {Doubling, Tripling} <= set(registry.known_classes())


def test_a_class_is_registered_once(forms):
    with pytest.raises(AssertionError, match="LayerNorm has two fused forms"):
        fuses("torch.nn.modules.normalization.LayerNorm")(type("Other", (), {}))


def test_subclasses_and_namesakes():
    """A subclass has its base's form where it overrides nothing that is read; another class that goes by the same name has none."""

    class Same(nn.LayerNorm):
        extra = 1

        def reset_parameters(self):
            super().reset_parameters()

    class Other(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) + 1

    class Read(nn.LayerNorm):
        weight = property(lambda self: 2 * self._parameters["weight"])

    class Called(nn.LayerNorm):
        def __call__(self, input):
            return 0

    class Mixed(type("Anything", (), {}), nn.LayerNorm):
        pass

    assert form_of(Same(4)).fused is FusedLayerNorm and has_form(Same(4), FusedLayerNorm)
    for cls, why in ((Other, "overrides forward"), (Read, "overrides weight"), (Called, "overrides __call__"), (Mixed, "Anything")):
        assert registry.form_of_class(cls) is None and why in why_unknown(cls)
    Other.__module__, Other.__qualname__ = nn.LayerNorm.__module__, "LayerNorm"
    assert path_of(Other) is None and registry.form_of_class(Other) is None
    norm = nn.LayerNorm(4)
    fp.optimize(norm)
    wrapped = type("FSDPLayerNorm", (type(norm),), {})
    norm.__class__ = wrapped
    assert is_fused(norm) and has_form(norm, FusedLayerNorm) and registry.replaced_class(wrapped) is None
    assert registry.form_of_class(wrapped) is None


def test_a_form_may_apply_to_some_modules_only(forms):
    fuses(f"{Doubling.__module__}.Doubling", applies=lambda module: module.training)(type("Fused", (), {"forward": Doubling.forward}))
    assert form_of(Doubling()).applies is not None and form_of(Doubling().eval()) is None
    assert "Doubling" not in registry.known_names() and {"lora.Linear", "ia3.Linear", "Linear", "LayerNorm"} <= set(registry.known_names())


READ = """
import pickle, sys, torch
model = pickle.load(open({path!r}, "rb"))
from fastpeft.registry import is_fused
print(sum(map(is_fused, model.modules())), model(input_ids=torch.arange(3, 15)[None]).logits.double().sum().item())
"""


def test_a_fused_pickle_in_a_new_process(tmp_path):
    """A prefix runs in fused modules alone: the pickle brings their files along."""
    torch.manual_seed(0)
    config = T.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = T.LlamaForCausalLM(config).eval()
    fp.optimize(model)
    fp.adapt(model, "PTv2")
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(model))
    done = subprocess.run([sys.executable, "-c", READ.format(path=str(path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fused, total = done.stdout.split()[-2:]
    assert int(fused) == sum(map(is_fused, model.modules()))
    assert float(total) == pytest.approx(model(input_ids=torch.arange(3, 15)[None]).logits.double().sum().item(), rel=1e-6)
