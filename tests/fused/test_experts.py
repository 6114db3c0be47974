"""Mixtures of experts: neither weights nor gates are kept, adapters multiply tokens, and their stacks run without padding."""

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
from fastpeft.fused.layers import experts
from fastpeft.fused.stack import any_stack, mixers, row_wise
from fastpeft.fused.stack.row_wise import is_row_wise_code

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


def adapted(name, parameters=("gate_up_proj", "down_proj"), implementation="eager", change=lambda model: None):
    """(PEFT's model, its optimised copy, batch), with an adapter on the experts' weights that does something."""
    peft = pytest.importorskip("peft")
    base, batch = tiny(name)
    base.set_experts_implementation(implementation)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=[f"experts.{p}" for p in parameters])
    plain = peft.get_peft_model(base, config).double().train()
    change(plain)
    with torch.no_grad():
        for at, p in plain.named_parameters():
            if "lora_B" in at:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(at)))
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=True)
    return plain, model, batch


@pytest.fixture
def on_tokens(monkeypatch):
    """Of each call of adapted experts, how many branches ran on tokens."""
    seen, run = [], experts.FusedExperts._run

    def counted(self, branches, *args):
        seen.append(len(branches))
        return run(self, branches, *args)

    monkeypatch.setattr(experts.FusedExperts, "_run", counted)
    return seen


BOTH = ("gate_up_proj", "down_proj")
ADAPTED = [("qwen3-moe", BOTH, "eager"), ("gpt-oss", BOTH, "batched_mm"), ("mixtral", ("down_proj",), "eager")]
MORE = [(name, BOTH, how) for name in MODELS for how in ("eager", "batched_mm")] + [("gpt-oss", (p,), "eager") for p in BOTH]


@pytest.mark.parametrize("name, weights, implementation", [*ADAPTED, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)])
def test_adapted_experts(name, weights, implementation, on_tokens):
    """PEFT adapts the weights of experts by a class that it makes while they run: ours multiplies tokens."""
    plain, model, batch = adapted(name, weights, implementation)
    for kind in ("full", "padded"):
        assert_same(step(model, batch(kind)), step(plain, batch(kind)))
    assert set(on_tokens) == {len(weights)}


def test_experts_whose_weights_are_trained():
    """In full, with an adapter on one of them."""
    plain, model, batch = adapted("mixtral", ("down_proj",), change=lambda model: model.requires_grad_(True))
    mine, theirs = step(model, batch("padded")), step(plain, batch("padded"))
    assert any("gate_up_proj" in name for name in mine[1])
    assert_same(mine, theirs)


def test_adapters_as_they_are_set(on_tokens):
    """Disabled, another one, two at once, merged: as PEFT has it; and back."""
    plain, model, batch = adapted("mixtral", change=lambda model: None)
    given = batch("padded")
    count = len(model.base_model.model.model.layers)

    def same(ours):
        on_tokens.clear()
        assert_same(step(model, given), step(plain, given))
        assert on_tokens == [ours] * count

    for m in (plain, model):
        m.base_model.disable_adapter_layers()
        m.get_input_embeddings().requires_grad_(True)
    same(0)
    for m in (plain, model):
        m.base_model.enable_adapter_layers()
    same(2)
    for m in (plain, model):
        m.merge_adapter()
    same(0)
    for m in (plain, model):
        m.unmerge_adapter()
    same(2)


def test_who_watches_adapted_experts_sees_them_as_peft_has_them(on_tokens):
    """A hook on the experts, or on a wrapper inside, gets PEFT's calls."""
    plain, model, batch = adapted("mixtral")
    for m in (plain, model):
        m.seen = []
        outer = m.base_model.model.model.layers[0].mlp.experts
        outer.register_forward_hook(lambda module, args, out, m=m: m.seen.append(out.detach()))
    assert_same(step(model, batch("full")), step(plain, batch("full")))
    torch.testing.assert_close(model.seen, plain.seen, rtol=1e-10, atol=1e-12)
    assert on_tokens == [2, 2]
    on_tokens.clear()
    for m in (plain, model):
        inner = m.base_model.model.model.layers[0].mlp.experts.base_layer
        inner.register_forward_hook(lambda module, args, out, m=m: m.seen.append(out.detach()))
    assert_same(step(model, batch("full")), step(plain, batch("full")))
    torch.testing.assert_close(model.seen, plain.seen, rtol=1e-10, atol=1e-12)
    assert on_tokens == [0, 2] or on_tokens == [2]  # PEFT's call reaches the experts, whose weights are then no parameters


def test_adapted_experts_keep_no_weights():
    plain, model, batch = adapted("mixtral")
    of_their_size = []
    for m in (plain, model):
        held = {p.untyped_storage().data_ptr() for p in m.parameters()}
        kept = {}

        def pack(t, held=held, kept=kept):
            if t.untyped_storage().data_ptr() not in held:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            m(**batch("full"))
        sizes = {p.untyped_storage().nbytes() for name, p in m.named_parameters() if p.dim() == 3}
        assert sizes
        of_their_size.append(any(t.untyped_storage().nbytes() in sizes for t in kept.values()))
    assert of_their_size == [True, False]


def test_where_the_experts_are_transformers():
    """Nothing to keep, another dtype, an expert that is not here, a function that somebody registered."""
    module = tiny("mixtral")[0].train().model.layers[0].mlp.experts
    width = module.down_proj.shape[1]
    hidden, index = torch.randn(5, width, dtype=torch.float64), torch.randint(3, (5, 2))
    weights = torch.rand(5, 2, dtype=torch.float64)
    want = module(hidden, index, weights)
    fp.optimize(module.requires_grad_(False))
    call = (hidden.requires_grad_(), index, weights)
    assert experts.why_not_here(module, {}, call, {}) == ""
    torch.testing.assert_close(module(*call), want)
    torch.testing.assert_close(module(hidden_states=hidden, top_k_index=index, top_k_weights=weights), want)
    with torch.no_grad():
        assert experts.why_not_here(module, {}, call, {}) == "nothing is kept for backward"
    assert "dtypes" in experts.why_not_here(module, {}, (hidden.float(), index, weights), {})
    assert module.adapted({}, hidden, index.clone().fill_(3), weights) is None  # transformers' own loop leaves it out
    module.config._experts_implementation = "sonicmoe"
    assert "sonicmoe" in experts.why_not_here(module, {}, call, {})


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


def test_the_report_counts_the_products_of_experts_that_are_ours():
    for implementation, ours in (("eager", True), ("deepgemm", False)):
        model = tiny("mixtral")[0]
        model.config._experts_implementation = implementation
        report = fp.optimize(model)
        sizes = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters(recurse=False))
        share = sizes / sum(p.numel() for p in model.parameters())
        assert report.classes["MixtralExperts"].fused == 2 and (report.coverage["parameters"] > 1 - share) == ours


def test_second_derivatives_are_refused():
    module = tiny("gpt-oss")[0].train().model.layers[0].mlp.experts
    fp.optimize(module)
    x = torch.randn(4, 96, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module._apply_gate(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


TABLES = [experts.GATES, experts.LOOPS, row_wise.READ, mixers.ATTENTIONS, mixers.RECURRENCES]


@pytest.mark.parametrize("table, method", [(table, "_apply_gate" if table is experts.GATES else "forward") for table in TABLES])
def test_code_is_known_by_its_digest(table, method):
    """Of this release of transformers and the oldest, which may not have the class; another may have it otherwise, which is left alone."""
    here = {}
    for code, path in table.items():
        home, _, name = path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(f"transformers.models.{home}"), name)
        except (ImportError, AttributeError):
            continue
        here[path] = here.get(path, False) or digest(cls, method) == code
    assert any(here.values())
    if T.__version__.startswith(("5.17", "5.23")):
        assert here == dict.fromkeys(table.values() if T.__version__.startswith("5.23") else here, True)
