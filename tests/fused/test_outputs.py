"""Logits that are computed when they are read: by every way of reading them, once, with autograd attached."""

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils import _pytree
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

import fastpeft as fp
from fastpeft.fused.head.outputs import can_defer, lean_logits, with_deferred_logits

READS = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "index": lambda out: out[1],
    "negative index": lambda out: out[-2],
    "slice": lambda out: out[:2][1],
    "to_tuple": lambda out: out.to_tuple()[1],
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "get": lambda out: out.get("logits"),
    "dict": lambda out: dict(out)["logits"],
    "unpacked": lambda out: {**out}["logits"],
    "iteration": lambda out: [out[name] for name in out][1],
    "vars": lambda out: vars(out)["logits"],
    "pytree": lambda out: _pytree.tree_flatten(out)[0][1],
    "tree_map": lambda out: _pytree.tree_map(lambda x: x, out).logits,
    "copy": lambda out: copy.copy(out).logits,
    "copy method": lambda out: out.copy()["logits"],
    "union": lambda out: (out | {})["logits"],
}


@pytest.fixture
def head():
    return nn.Linear(4, 5).requires_grad_(False)


@pytest.fixture
def hidden():
    return torch.randn(2, 3, 4, requires_grad=True)


def deferred(head, hidden, cls=CausalLMOutputWithPast, calls=None):
    def compute():
        calls.append(1) if calls is not None else None
        return nn.functional.linear(hidden, head.weight, head.bias)

    output = cls(loss=hidden.sum(), logits=hidden.new_empty(0), hidden_states=(hidden,))
    return with_deferred_logits(output, compute, head)


@pytest.mark.parametrize("cls", [CausalLMOutputWithPast, LlavaCausalLMOutputWithPast])
@pytest.mark.parametrize("how", READS)
def test_every_way_of_reading(head, hidden, how, cls):
    calls = []
    out = deferred(head, hidden, cls, calls)
    assert isinstance(out, cls) and type(out).__name__ == cls.__name__ and not calls
    assert torch.equal(READS[how](out), head(hidden))
    assert torch.equal(out.logits, head(hidden)) and calls == [1] and type(out) is cls
    grad = torch.autograd.grad(out.logits.sum(), hidden)[0]
    assert torch.equal(grad, torch.autograd.grad(head(hidden).sum(), hidden)[0])


def test_what_is_not_the_logits_computes_none(head, hidden):
    calls = []
    out = deferred(head, hidden, calls=calls)
    assert len(out) == 3 and list(out) == list(out.keys()) == ["loss", "logits", "hidden_states"] and "logits" in out
    assert out.loss is out[0] is out["loss"] and out[-1] is out["hidden_states"] is out.hidden_states
    assert not calls and out.past_key_values is None and out.get("loss") is out.loss and out.get("attentions", 3) == 3
    with pytest.raises(KeyError):
        out["attentions"]
    with pytest.raises(IndexError):
        out[3]
    assert calls in ([], [1])  # an error may read


@pytest.mark.parametrize("assign", [lambda out, t: setattr(out, "logits", t), lambda out, t: out.__setitem__("logits", t)])
def test_assigned_logits_replace_them(head, hidden, assign):
    calls, mine = [], torch.zeros(1)
    out = deferred(head, hidden, calls=calls)
    out.loss = torch.ones(())
    assert not calls and out["loss"] == 1
    assign(out, mine)
    assert out.logits is mine and out["logits"] is mine and out[1] is mine and not calls and len(out) == 3


def test_pickle_deepcopy_asdict(head):
    hidden = torch.randn(2, 3, 4)
    for out in (pickle.loads(pickle.dumps(deferred(head, hidden))), copy.deepcopy(deferred(head, hidden))):
        assert type(out) is CausalLMOutputWithPast and torch.equal(out.logits, head(hidden)) and len(out) == 3
    assert torch.equal(asdict(deferred(head, hidden))["logits"], head(hidden))


def test_accelerate_converts_it(head, hidden):
    operations = pytest.importorskip("accelerate.utils.operations")
    out = operations.convert_to_fp32(deferred(head.bfloat16(), hidden.bfloat16()))
    assert isinstance(out, CausalLMOutputWithPast) and out.logits.dtype == torch.float32 and out.loss.dtype == torch.float32


def test_read_elsewhere_they_are_those_of_the_call(head, hidden):
    with torch.autocast("cpu", torch.bfloat16):
        out = deferred(head, hidden)
    with torch.no_grad():
        assert out.logits.dtype == torch.bfloat16 and out.logits.requires_grad
    out = deferred(head, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert out.logits.dtype == torch.float32
    with torch.no_grad():
        out = deferred(head, hidden)
    assert not out.logits.requires_grad


def test_a_changed_head_is_an_error(head, hidden):
    out = deferred(head, hidden)
    head.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"read output\.logits before"):
        out.to_tuple()


def test_what_can_be_deferred(head):
    assert can_defer(head) and can_defer(nn.Sequential(head, nn.Dropout(0.5)).eval())
    assert not can_defer(nn.Sequential(head, nn.Dropout(0.5)))
    assert not can_defer(nn.Linear(4, 5))
    with torch.inference_mode():
        assert not can_defer(head)
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not can_defer(head)
    hook.remove()
    assert can_defer(head)
    hook = head.register_forward_hook(lambda *args: None)
    assert not can_defer(nn.Sequential(head))
    hook.remove()
    head.forward = head.forward
    assert not can_defer(head)


def test_lean_inside_and_as_before_after(head):
    model = fp.build("excitor-tiny")
    model.llm.model.lean_logits = False
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(KeyError), lean_logits(model):
        assert model.lean_logits and model.llm.lean_logits and model.llm.model.lean_logits
        raise KeyError
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
