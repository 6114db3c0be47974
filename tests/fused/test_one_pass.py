"""Fused attentions on ops.attention_inputs' one pass, where its rule takes it: the same losses and gradients as on the parts."""

import importlib

import pytest
import torch
from double import Double
from tiny_models import tiny
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft import ops
from fastpeft.fused.layout import Layout
from fastpeft.methods.excitor import ExcitorBlock, Visual

module = importlib.import_module("fastpeft.ops.attention_inputs")  # fastpeft.ops has the function under that name
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}


def both(monkeypatch, step):
    """``step`` on the parts, then in one pass, which must be taken."""
    made, calls = [], []
    count = module._made
    monkeypatch.setattr(module, "_made", lambda *a: calls.append(a) or count(*a))
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(module, "ONE_PASS", devices)
        made.append(step())
        assert bool(calls) == bool(devices)
    (loss, grads), (want, wanted) = made[1], made[0]
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    assert grads.keys() == wanted.keys()
    scale = max(grad.abs().max() for grad in wanted.values())
    assert max((grads[name] - grad).abs().max() for name, grad in wanted.items()) < 1e-10 * scale
    return calls


def step_of(model, batch):
    def step():
        model.zero_grad()
        with Double():
            loss = model(**batch).loss
            loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return step


def scattered_step(model, padded: bool):
    """A step of ``model``, whose trained parameters are drawn, on three rows."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0.0
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 6:], mask[1, :2] = 0, 0
    return step_of(model, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("plan", ["T", "LoRA", "IA3", "PTv2", "Excitor"])
def test_llama(monkeypatch, plan, padded):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.2)).double().train()
    fp.optimize(model)
    fp.adapt(model, plan)
    calls = both(monkeypatch, scattered_step(model, padded))
    if plan == "IA3":
        assert all(how.l_k is not None for _, _, _, how, _ in calls)


@pytest.mark.parametrize("padded", [False, True])
def test_excitors_keys_where_queries_and_keys_are_turned(monkeypatch, padded):
    turn = importlib.import_module("fastpeft.ops.excitor_turn")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).double().train()
    fp.optimize(model)
    fp.adapt(model, "Excitor")
    step = scattered_step(model, padded)
    want, wanted = step()
    calls, together = [], turn._together
    monkeypatch.setattr(turn, "_together", lambda *a: calls.append(a) or together(*a))
    monkeypatch.setattr(turn, "TURNS", {"cpu"})
    monkeypatch.setattr(turn, "DTYPES", (torch.float64,))
    loss, grads = step()
    assert calls
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("index", [None, [-1, -1, -1], [1, 0, 1], [1, -1, 0]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_excitors_block_turns_as_it_merges(monkeypatch, padded, index):
    """Of images that no sample, every one or some of them sees; of tokens laid out with padding."""
    turn = importlib.import_module("fastpeft.ops.excitor_turn")
    monkeypatch.setattr(turn, "TURNS", {"cpu"})
    monkeypatch.setattr(turn, "DTYPES", (torch.float64,))
    torch.manual_seed(0)
    block = ExcitorBlock(torch.nn.Linear(16, 16).double(), 4, fp.Excitor(r=3, num_prompts=5, gate_std=1.0), 6)
    layout = Layout(3, 5, torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 11, 13, 14])) if padded else None
    visual = None if index is None else Visual(torch.randn(2, 7, 6).double(), torch.tensor(index))
    hidden, angle = torch.randn(3, 5, 16).double(), torch.rand(3, 5, 1, 2).double().repeat(1, 1, 1, 2)
    q, k = (torch.randn(3, 4, 5, 4).double() for _ in range(2))
    if padded:
        hidden, angle = hidden.flatten(0, 1)[layout.place], angle.flatten(0, 1)[layout.place]
    tables, cells = (angle.cos(), angle.sin()), angle.squeeze(-2) if layout is None else layout.pad(angle.squeeze(-2))
    assert block.turns(hidden, 4, visual, tables[0]) == (index != [1, -1, 0])
    if index == [1, -1, 0]:
        return
    there = torch.ones(3, 1, 5, 1) if layout is None else layout.pad(torch.ones(11, 1))[:, None]
    want = [ops.rotary(t, cells.cos()[:, None] * there, cells.sin()[:, None] * there) for t in (q, k)]
    want[1] = block(want[1], hidden, layout, visual)
    for value, exact in zip(block.turn(q, k, hidden, layout, visual, tables), want):
        torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("flat", [True, False])
def test_a_prefix_before_the_keys(monkeypatch, flat):
    """PTv2: one pass turns queries and keys into rows behind the prefix's, without padding; where there is some, the merge stays."""
    reserved = importlib.import_module("fastpeft.ops.reserved_prefix")
    monkeypatch.setattr(reserved, "kernel_of", lambda *a: "flash")
    monkeypatch.setattr(reserved, "takes_cudnn", lambda *a: True)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.2)).double().train()
    fp.optimize(model)
    fp.adapt(model, llm=fp.PTv2(num_virtual_tokens=5))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.requires_grad else 0.0
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.ones_like(ids)
    for padded in (False, True):
        if padded:
            mask[0, 6:] = 0
        batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)} | ({"attention_mask": mask} if flat or padded else {})
        calls = both(monkeypatch, step_of(model, batch))
        assert all((how.p_k is None) == padded for _, _, _, how, _ in calls)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gemma3-text", "gpt-neox"])
def test_interface(monkeypatch, name, trained):
    """Queries and keys turned together in the attention of any model, whole heads or some channels of them, with the norms before them."""
    model, batch = tiny(name)
    for parameter, p in model.named_parameters():
        p.requires_grad_(trained or "norm" not in parameter)
    fp.optimize(model.train())
    calls = both(monkeypatch, step_of(model, batch("right")))
    assert all((how.q_norm is not None) == (name != "gpt-neox") for _, _, _, how, _ in calls)


def test_norms_whose_gradient_is_read(monkeypatch):
    """A hook on what a norm made, put there by a hook on the norm, sees its gradient: the norm stays a pass of its own."""
    model, batch = tiny("qwen3")
    fp.optimize(model.train())
    seen = []
    norm = model.model.layers[0].self_attn.q_norm
    norm.register_forward_hook(lambda module, args, y: y.register_hook(lambda grad: seen.append(grad.shape)) and None)
    calls = both(monkeypatch, step_of(model, batch("right")))
    assert len(seen) == 2 and [how.q_norm is None for _, _, _, how, _ in calls] == [True, False]
