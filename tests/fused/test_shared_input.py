"""Layers of one input, run as one operator: which calls are found in a forward, and that values, gradients and hooks are the model's."""

from __future__ import annotations

import inspect
import traceback

import pytest
import torch
from double import Double
from tiny_models import tiny
from torch import nn

import fastpeft as fp
from fastpeft.fused.layers import shared_input
from fastpeft.fused.layers.shared_input import join_calls

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft")


class Layers(nn.Module):
    """Three linear layers with LoRA, and forwards that call them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({name: nn.Linear(6, 6, dtype=torch.float64) for name in "qkv"})
        config = peft.LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False)
        self.inner = peft.get_peft_model(self.inner, config).base_model.model
        self.inner.double()
        fp.optimize(self.inner)
        self.q, self.k, self.v = (self.inner[name] for name in "qkv")
        self.norm, self.heads = nn.LayerNorm(6, dtype=torch.float64), 2

    def straight(self, x):
        q = self.q(x).view(-1, 2, 3)
        k = self.norm(self.k(x))
        return q.sum() + 2 * k.sum() + (self.v(x) ** 2).sum()

    def alias(self, x, states=None, cache=None):
        crossing = states is not None
        q = self.q(x)
        known = False
        seen = states if crossing else x
        if crossing and cache is not None and known:
            k, v = cache
        else:
            k = self.k(seen)
            v = self.v(seen)
        return q.sum() + 2 * k.sum() + (v**2).sum()

    def perhaps(self, x, wanted=False):
        q = self.q(x)
        if wanted:
            q = q + self.k(x)
        return (q**2).sum()

    def rebound(self, x):
        x = self.q(x)
        x = self.k(x)
        return (x**2).sum()

    def changed(self, x):
        x = x * 1.0
        q = self.q(x)
        x.add_(1.0)
        return (q * self.k(x)).sum()

    def early(self, x, stop=False):
        q = self.q(x)
        if stop:
            return q.sum()
        return (q * self.k(x)).sum()

    def loop(self, x):
        total = 0.0
        for scale in (1.0, 2.0):
            total = total + scale * (self.q(x) * self.k(x)).sum()
        return total

    def failing(self, x):
        q, k = self.q(x), self.k(x)
        raise RuntimeError(f"of line {q.dim() + k.dim()}")


@pytest.fixture
def joins(monkeypatch):
    """How many layers each joint call had."""
    found, inner = [], shared_input.joined

    def joined(specs, x):
        outputs = inner(specs, x)
        found.extend([] if outputs is None else [len(specs)])
        return outputs

    monkeypatch.setattr(shared_input, "joined", joined)
    return found


def both(function, *args, **kwargs):
    """(outputs and gradients as written, joined)"""
    results = []
    for call in (function, join_calls(function)):
        module = Layers()
        leaves = [a.detach().clone().requires_grad_() for a in args]
        y = call(module, *leaves, **kwargs)
        trained = [p for p in module.parameters() if p.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y, [*leaves, *trained], allow_unused=True)])
    return results


X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
CASES = [
    (Layers.straight, (X,), {}, [3]),
    (Layers.alias, (X,), {}, [3]),
    (Layers.alias, (X, X.flip(0)), {}, [2]),  # keys and values of other states
    (Layers.alias, (X,), {"cache": (1, 2)}, [3]),
    (Layers.perhaps, (X,), {}, []),
    (Layers.perhaps, (X,), {"wanted": True}, []),
    (Layers.rebound, (X,), {}, []),
    (Layers.early, (X,), {"stop": True}, []),
    (Layers.early, (X,), {}, []),
    (Layers.loop, (X,), {}, []),
]


@pytest.mark.parametrize("function, args, kwargs, expected", CASES)
def test_which_calls_join(joins, function, args, kwargs, expected):
    theirs, ours = both(function, *args, **kwargs)
    for mine, want in zip(ours, theirs):
        assert (mine is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
    assert joins == expected


@torch.no_grad()
def test_an_input_changed_in_place_is_read_again(joins):
    module = Layers()
    torch.testing.assert_close(join_calls(Layers.changed)(module, X), Layers.changed(module, X), rtol=1e-12, atol=1e-12)
    assert joins == [2]


@pytest.mark.parametrize("hooked", ["q", "k", "v"])
def test_a_layer_with_hooks_is_called_in_its_place(joins, hooked):
    module, seen = Layers(), []
    getattr(module, hooked).register_forward_hook(lambda m, args, y: seen.append(args[0]))
    y = join_calls(Layers.straight)(module, X)
    torch.testing.assert_close(y, Layers.straight(module, X), rtol=1e-12, atol=1e-12)
    assert joins == [2] and seen[0] is X


def test_other_layers_and_other_inputs():
    """What is no module, no linear layer, or given no tensor, is called as it is."""
    module = Layers()
    module.k, module.v = nn.Identity(), nn.ReLU()
    torch.testing.assert_close(join_calls(Layers.straight)(module, X), Layers.straight(module, X), rtol=0, atol=0)
    with pytest.raises(Exception, match="str"):
        join_calls(Layers.straight)(Layers(), "words")


def test_what_a_reader_of_the_function_finds():
    ours, theirs = join_calls(Layers.alias), Layers.alias
    assert ours is not theirs
    assert inspect.signature(ours) == inspect.signature(theirs) and inspect.getsource(ours) == inspect.getsource(theirs)
    assert (ours.__name__, ours.__qualname__, ours.__module__, ours.__doc__) == ("alias", "Layers.alias", __name__, theirs.__doc__)
    with pytest.raises(RuntimeError) as raised:
        join_calls(Layers.failing)(Layers(), X)
    assert "raise RuntimeError(" in traceback.extract_tb(raised.value.__traceback__)[-1].line


def test_functions_that_stay():
    captured = X

    def closure(self, x):
        return self.q(x) + self.k(x) + captured

    made = {}
    exec("def sourceless(self, x):\n    return self.q(x) + self.k(x)", made)
    for function in (closure, made["sourceless"], Layers.rebound, Layers.loop):
        assert join_calls(function) is function


# how many layers join in each attention of a step, in order, with LoRA on all linear layers
MODELS = {
    "mistral": [3, 3],
    "qwen3": [3, 3],
    "gemma3": [3] * 4,  # images, then text
    "olmo2": [3, 3],
    "bert": [3, 2],  # in the last layer, keys and values of every token
    "vit": [3, 2],
    "siglip": [3] * 4,
    "t5": [3, 3, 3, 2, 3, 2],  # encoder; then self- and cross-attention
    "whisper": [3, 3, 3, 2, 3, 2],
}


@pytest.mark.parametrize("name", MODELS)
def test_models(joins, name):
    model, batch = tiny(name)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    trained, results = [p for p in model.parameters() if p.requires_grad], []
    for _ in range(2):
        with Double():
            loss = model(**batch("full")).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)])
        fp.optimize(model)
    scale = max(float(g.abs().max()) for g in results[0][1:] if g is not None)
    for mine, want in zip(results[1], results[0]):
        assert (mine is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-10 * scale)
    assert joins == MODELS[name]


def test_each_layer_has_its_own_dropout():
    module = Layers()
    for name in "kv":
        getattr(module, name).load_state_dict(module.q.state_dict())
    for name in "qkv":
        getattr(module, name).lora_dropout["default"] = nn.Dropout(0.5)
    outputs = shared_input.together(None, module, X, ("q", X), ("k", X), ("v", X)).of
    assert not any(torch.equal(outputs[a], outputs[b]) for a, b in ("qk", "qv", "kv"))
    module.eval()
    outputs = shared_input.together(None, module, X, ("q", X), ("k", X), ("v", X)).of
    torch.testing.assert_close(outputs["q"], outputs["k"], rtol=0, atol=1e-14)
