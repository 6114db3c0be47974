"""Mixtures of experts: what lies between their products keeps its input alone, and their stacks run without padding."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_models import tiny
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fastpeft as fp
from fastpeft.forms import digest
from fastpeft.fused import any_stack, experts, row_wise
from fastpeft.fused.row_wise import is_row_wise_code

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def unpadded(monkeypatch):
    """The shapes of hidden states that stand for a padded batch."""
    seen, of = [], any_stack._Flat.of
    monkeypatch.setattr(any_stack._Flat, "of", lambda tokens, layout: seen.append(tuple(tokens.shape)) or of(tokens, layout))
    return seen


MODELS = ("mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "granite-moe", "gpt-oss")
QUICK = [("mixtral", "batched_mm"), ("qwen2-moe", "batched_mm"), ("gpt-oss", "batched_mm"), ("gpt-oss", "eager"), ("granite-moe", "eager")]
EVERY = [(name, how) for name in MODELS for how in ("eager", "batched_mm")]


@pytest.mark.parametrize("name, implementation", [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in EVERY])
def test_the_model_as_it_was(name, implementation, unpadded):
    """Every gradient, the routers' too."""
    plain, batch = tiny(name)
    plain.set_experts_implementation(implementation)
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=True)
    for kind in ("padded", "left", "packed"):
        given = batch(kind)
        assert_same(step(model, given), step(plain, given))
        keeps = kind == "packed" or (kind == "left" and name == "gpt-oss")  # eager attention, read where a query sees no key
        assert bool(unpadded) != keeps, kind
        unpadded.clear()


def test_the_balance_of_experts_is_read_with_the_mask(unpadded):
    """A loss of the routers' logits reads them at [B, L]: the stack computes padding."""
    plain, batch = tiny("mixtral")
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=True)
    given = batch("padded")
    for asked in ({"output_router_logits": True}, {}):
        if not asked:
            plain.config.output_router_logits = model.config.output_router_logits = True
        mine, theirs = step(model, given | asked), step(plain, given | asked)
        assert_same(mine, theirs)
        torch.testing.assert_close(mine[0].aux_loss, theirs[0].aux_loss, rtol=1e-11, atol=0)
        for ours, wanted in zip(mine[0].router_logits, theirs[0].router_logits, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)
    assert not unpadded


def test_noise_of_a_batch_keeps_the_padding():
    block = tiny("mixtral")[0].model.layers[0].mlp
    assert is_row_wise_code(block)
    block.jitter_noise = 0.1
    assert not is_row_wise_code(block)


def test_adapted_experts():
    """PEFT adapts the weights of experts by a class that it makes while they run."""
    peft = pytest.importorskip("peft")
    base, batch = tiny("qwen3-moe")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    plain = peft.get_peft_model(base, config).double().train()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=True)
    for kind in ("full", "padded"):
        assert_same(step(model, batch(kind)), step(plain, batch(kind)))


def kept_by_a_gate(module, gate_up):
    """Bytes of the tensors, besides the gate's input, that backward would keep of it."""
    own, kept = gate_up.untyped_storage().data_ptr(), {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage  # alive: nothing else gets its place
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = module._apply_gate(gate_up)
    return out, sum(s.nbytes() for place, s in kept.items() if place != own)


@pytest.mark.parametrize("name, acts", [("mixtral", ("silu", "gelu", "gelu_pytorch_tanh", "relu")), ("gpt-oss", ("",))])
def test_a_gate_keeps_its_input_alone(name, acts):
    model = tiny(name)[0].train()
    module = next(m for m in model.modules() if experts.has_known_gate(type(m)))
    own = type(module)
    for act in acts:
        module.act_fn = T.activations.ACT2FN[act] if act else None
        x = torch.randn(10, 2 * module.down_proj.shape[1 if name == "gpt-oss" else 2], dtype=torch.float64)
        results = []
        for fused in (False, True):
            fp.optimize(module) if fused else fp.restore(module)
            gate_up = x.clone().requires_grad_()
            out, kept = kept_by_a_gate(module, gate_up + 0.0)
            (grad,) = torch.autograd.grad(out.square().sum(), gate_up)
            results.append((out, grad, kept))
        (out, grad, more), (ours, our_grad, kept) = results
        torch.testing.assert_close((ours, our_grad), (out, grad), rtol=1e-12, atol=1e-12)
        assert kept == 0 < more, act
    assert isinstance(module, own)


def test_a_gate_that_somebody_watches_or_trains_is_its_own():
    model, _ = tiny("mixtral")
    module, seen = model.train().model.layers[0].mlp.experts, []
    fp.optimize(model)
    hook = module.act_fn.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    module._apply_gate(torch.randn(4, 96, dtype=torch.float64, requires_grad=True))
    assert seen == [(4, 48)]
    hook.remove()

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x):
            return x * self.slope

    module.act_fn = Trained()
    module._apply_gate(torch.randn(4, 96, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert module.act_fn.slope.grad is not None


def test_the_report_counts_no_products_of_experts():
    model = tiny("mixtral")[0]
    report = fp.optimize(model)
    sizes = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters(recurse=False))
    total = sum(p.numel() for p in model.parameters())
    assert report.classes["MixtralExperts"].fused == 2 and report.coverage["parameters"] <= 1 - sizes / total


def test_second_derivatives_are_refused():
    module = tiny("gpt-oss")[0].train().model.layers[0].mlp.experts
    fp.optimize(module)
    x = torch.randn(4, 96, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module._apply_gate(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("table, method", [(experts.GATES, "_apply_gate"), (row_wise.READ, "forward")], ids=["gates", "row-wise"])
def test_code_is_known_by_its_digest(table, method):
    """Of this release of transformers: an older one may not have the class, or have it otherwise, which is then left alone."""
    known, here = 0, 0
    for code, path in table.items():
        home, _, name = path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(f"transformers.models.{home}"), name)
        except (ImportError, AttributeError):
            continue
        here += 1
        known += digest(cls, method) == code
    newest = T.__version__.startswith("5.23")
    assert known == len(table) if newest else known <= here
