"""Attention of any model that takes its function from transformers' interface: the model's own values and gradients in float64, what is
kept for backward, and what a caller may read of it."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from double import Double
from tiny_models import NAMES, kinds, tiny
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss

import fastpeft as fp
from fastpeft.fused.attention.interface import EAGER, OURS, THEIRS, FusedInterfaceAttention, kind_of, returns_probabilities_only

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft")


def attention_only(module, name):
    return "attention" in type(module).__name__.lower() or "attn" in name.rpartition(".")[2]


def without_dropout(model):
    for module in model.modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    return model.train()


def step(model, batch):
    """Loss and gradients, and how many bytes autograd keeps besides the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    model.zero_grad()
    with Double(), saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    with Double():  # checkpoints compute the forward once more
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


def assert_same(mine, theirs, name=""):
    (loss, gradients, _), (want, wanted, _) = mine, theirs
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10, msg=partial("{} loss: {}".format, name))
    assert gradients.keys() == wanted.keys()
    scale = max(g.abs().max() for g in wanted.values())
    for parameter, gradient in wanted.items():
        where = f"{name} {parameter}"
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-9, atol=1e-10 * scale, msg=partial("{}: {}".format, where))


def check(name, implementation=None, lora=False, filter_fn=None):
    """{kind of batch: (bytes kept, bytes of the model itself)}"""
    model, batch = tiny(name)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double()
    model = without_dropout(model)
    before = {kind: step(model, batch(kind)) for kind in kinds(name)}
    fp.optimize(model, filter_fn)
    bytes_kept = {}
    for kind, theirs in before.items():
        mine = step(model, batch(kind))
        assert_same(mine, theirs, f"{name} {kind}")
        bytes_kept[kind] = mine[2], theirs[2]
    return bytes_kept


# grouped heads; sliding windows; soft caps; sinks; images seen from both sides; position biases; cross-attention; images alone
QUICK = ["qwen3", "mistral", "gemma2", "gpt-oss", "paligemma2", "t5", "whisper", "vit", "bert"]


@pytest.mark.parametrize("name", QUICK)
def test_values_and_gradients(name):
    for mine, theirs in check(name, filter_fn=attention_only).values():
        assert mine <= theirs


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "t5"])
def test_eager(name):
    """Padding on the left included, where queries without a key attend to all alike."""
    check(name, "eager", filter_fn=attention_only)


NO_SDPA = ("gemma2", "paligemma2", "gpt-oss")  # soft caps and sinks
EVERY = [(name, how) for name in NAMES for how in ("sdpa", "eager", None) if how != "sdpa" or name not in NO_SDPA]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name, implementation", EVERY)
def test_every_model(name, implementation, lora):
    check(name, implementation, lora)


def qwen3(**config):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 60}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{"num_key_value_heads": 2, "initializer_range": 0.3, **sizes, **config}))
    model.requires_grad_(False).model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    return model.double().train()


IDS = torch.arange(3, 33).view(3, 10)


def padded():
    mask = torch.ones_like(IDS)
    mask[1, :4], mask[2, 7:] = 0, 0
    return mask


def test_bytes_kept():
    """Of each attention: q, k, v of their own heads, o, and one number a query and head; of the masks of all layers, one of the keys."""
    model, mask = qwen3(), padded()
    fp.optimize(model, attention_only)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(input_ids=IDS, attention_mask=mask)
    B, L = IDS.shape
    lse = [t for t in kept if t.shape == (B, 4, L)]
    wide = {t.untyped_storage().data_ptr() for t in kept if t.dim() == 4 and t.shape[1:] == (4, L, 8)}
    assert len(lse) == 2 and len(wide) == 4  # q and o of two layers
    assert not [t for t in kept if t.dim() == 4 and t.shape[2:] == (L, L)]
    assert len({t.untyped_storage().data_ptr() for t in kept if t.dtype == torch.bool and t.numel() == B * L}) == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dead rows", "hole", "random", "bias", "infinite", "one for all heads and samples", "as it is"])
def test_any_mask(kind, implementation):
    """Masks [B, 1, L, L] of a caller's own, bool or numbers."""
    model = qwen3(attn_implementation=implementation)
    torch.manual_seed(2)
    seen = torch.ones(10, 10, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    if kind == "dead rows":
        seen[0, 0, 4], seen[2, 0, :3] = False, False
    elif kind == "hole":
        seen[1, 0, 5:, 2] = False
    elif kind == "one for all heads and samples":
        seen = seen[:1]
    elif kind in ("random", "infinite"):
        seen = (torch.rand(3, 1, 10, 10) < 0.4) | torch.eye(10, dtype=torch.bool)
    zero, mask = torch.zeros(seen.shape, dtype=torch.float64), seen  # "as it is": eager attention adds True as 1
    if implementation == "eager" and kind != "as it is":
        mask = zero.masked_fill(~seen, torch.finfo(torch.float64).min)
    if kind == "bias":
        mask = zero.masked_fill(~seen, -torch.inf) + torch.randn(3, 1, 10, 10, dtype=torch.float64)
    if kind == "infinite":
        mask = zero.masked_fill(~seen, -torch.inf)
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
    theirs = step(model, batch)
    fp.optimize(model, attention_only)
    assert_same(step(model, batch), theirs)
    assert_same(step(model, batch), theirs)  # the mask was read before
    mask.copy_(mask.flip(0).clone())  # and means something else now
    mine = step(model, batch)
    fp.restore(model)
    assert_same(mine, step(model, batch))


def test_nothing_of_it_can_be_read(tmp_path):
    model = qwen3()
    names = [model.config._attn_implementation, model.config.to_json_string(), repr(model.config), repr(model), list(model.state_dict())]
    signature = type(model.model.layers[0].self_attn).forward.__kwdefaults__, model.model.layers[0].self_attn.forward.__doc__
    attention, forward = model.model.layers[0].self_attn, type(model.model.layers[0].self_attn).forward
    fp.optimize(model)
    assert isinstance(attention, FusedInterfaceAttention) and attention.config is model.config
    assert names == [
        model.config._attn_implementation,
        model.config.to_json_string(),
        repr(model.config),
        repr(model),
        list(model.state_dict()),
    ]
    assert signature == (type(attention).forward.__kwdefaults__, attention.forward.__doc__)
    copied = copy.deepcopy(model)
    assert isinstance(copied.model.layers[1].self_attn, FusedInterfaceAttention) and copied.config._attn_implementation == "sdpa"
    assert b"fastpeft" not in pickle.dumps(model)
    model.save_pretrained(tmp_path)
    assert not any(b"fastpeft" in file.read_bytes() for file in tmp_path.iterdir())
    again = pickle.loads(pickle.dumps(model))
    assert type(again.model.layers[0].self_attn).forward is forward
    with Double():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)
    fp.restore(model)
    assert type(attention).forward is forward and OURS(THEIRS) not in forward.__code__.co_names


def test_implementation_set_later():
    model = qwen3()
    batch = {"input_ids": IDS, "attention_mask": padded(), "labels": IDS}
    theirs = {name: step(qwen3(attn_implementation=name), batch) for name in ("sdpa", "eager")}
    fp.optimize(model, attention_only)
    for name in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(name)
        assert_same(step(model, batch), theirs[name], name)
    called = []

    def mine(module, query, *args, **kwargs):
        called.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("of the user", mine)
    model.set_attn_implementation("of the user")
    model(IDS)
    assert len(called) == 2
    flash = qwen3()
    flash.config._attn_implementation = "flash_attention_2"
    for left, reason in (
        (qwen3(attn_implementation="of the user"), "its attention function is 'of the user', registered by someone else"),
        (flash, "its attention function is 'flash_attention_2', which stays"),
    ):
        report = fp.optimize(left)
        assert all(why.startswith(reason) for name, why in report.skipped if name.endswith("self_attn"))
        assert sum(name.endswith("self_attn") for name, _ in report.skipped) == 2


def test_by_name():
    """ "fastpeft" as an implementation that a user sets."""
    batch = {"input_ids": IDS, "attention_mask": padded(), "labels": IDS}
    mine, theirs = (step(qwen3(attn_implementation=name), batch) for name in ("fastpeft", "sdpa"))
    assert_same(mine, theirs)
    assert mine[2] < theirs[2]


def test_probabilities():
    """Where someone asks for them, or a hook reads them, the model's own eager attention runs."""
    model, seen = qwen3(attn_implementation="eager"), []
    want = model(IDS, output_attentions=True)
    fp.optimize(model, attention_only)
    assert (
        model.model.layers[0].self_attn(
            torch.randn(1, 4, 32).double().requires_grad_(),
            model.model.rotary_emb(torch.zeros(1, 4, 32).double(), torch.arange(4)[None]),
            None,
        )[1]
        is None
    )
    got = model(IDS, output_attentions=True)
    assert torch.equal(got.logits, want.logits) and all(map(torch.equal, got.attentions, want.attentions))
    model = qwen3(attn_implementation="eager")
    fp.optimize(model, attention_only)
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model(IDS)
    torch.testing.assert_close(seen[0], want.attentions[1], rtol=1e-5, atol=1e-6)
    handle.remove()


def test_generation_is_the_models_own():
    model = qwen3().eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": padded()}
    for cache in (None, "static"):
        want = model.generate(IDS, **options, cache_implementation=cache)
        fp.optimize(model)
        assert torch.equal(model.generate(IDS, **options, cache_implementation=cache), want)
        fp.restore(model)


def test_cache_in_training():
    """Keys of an earlier call: more keys than queries, with gradients."""
    results = []
    for fused in (False, True):
        model = qwen3()
        if fused:
            fp.optimize(model, attention_only)
        first = model(IDS[:, :6], attention_mask=padded()[:, :6], use_cache=True)
        second = model(IDS[:, 6:], attention_mask=padded(), past_key_values=first.past_key_values)
        loss = first.logits.square().mean() + second.logits.square().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_dropout():
    """Another draw than transformers', of the same distribution: its mean is attention without dropout."""
    model, _ = tiny("vit", torch.float32)
    fp.optimize(model, attention_only)
    layer = next(m for m in model.modules() if isinstance(m, FusedInterfaceAttention))
    x = torch.randn(1, 5, 24, requires_grad=True)
    want = layer(x)[0]
    rate = next(name for name in ("attention_dropout", "dropout_prob", "dropout") if isinstance(getattr(layer, name, None), float))
    setattr(layer, rate, 0.5)
    layer.train()
    many = layer(x.expand(4000, -1, -1))[0]
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(many.mean(0, keepdim=True), want, rtol=0, atol=6 * float(many.std(0).max()) / 4000**0.5)


def test_second_derivatives_are_refused():
    model = qwen3()
    fp.optimize(model, attention_only)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(model(IDS, labels=IDS).loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, batch = qwen3().float(), {"input_ids": IDS, "attention_mask": padded(), "labels": IDS}
    weight, results = model.model.layers[0].self_attn.q_proj.weight, []
    for fused in (False, True):
        if fused:
            fp.optimize(model, attention_only)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        results.append(torch.autograd.grad(model(**batch).loss, weight) if not reentrant else _by_backward(model(**batch).loss, weight))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def _by_backward(loss, weight):
    weight.grad = None
    loss.backward()
    return (weight.grad,)


def test_compiled():
    """Under torch.compile the function that was set runs, in one graph."""
    model, batch = qwen3(num_hidden_layers=1), {"input_ids": IDS, "attention_mask": padded()}
    want = model(**batch).logits
    fp.optimize(model, attention_only)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(model.model.layers[0].self_attn, backend="eager", fullgraph=True)(*_inputs(model))[0],
        model.model.layers[0].self_attn(*_inputs(model))[0],
    )
    torch.testing.assert_close(model(**batch).logits, want)


def _inputs(model):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32).double().requires_grad_()
    return x, model.model.rotary_emb(x, torch.arange(5)[None]), None


def test_eager_functions_are_known_by_their_code():
    theirs = modeling_gpt_oss.eager_attention_forward
    assert kind_of(theirs).sinks and kind_of(theirs).grouped and not kind_of(theirs).softcap
    assert kind_of(lambda module, *args, **kwargs: None) is None
    assert len(EAGER) == 15


class _ReadsProbabilities(nn.Module):
    def forward(self, attention_interface, x):
        output, weights = attention_interface(self, x)
        return output * weights.sum(), weights


def test_a_forward_that_reads_its_probabilities():
    assert not returns_probabilities_only(_ReadsProbabilities)
    assert returns_probabilities_only(type(qwen3().model.layers[0].self_attn))


# decoder, Gemma's, Qwen-VL's vision, DINOv2's, CLIP's, ViT's layers by their code, each around fused attention, norms and feed-forwards
@pytest.mark.parametrize("name", ["mistral", "gemma3-text", "qwen2.5-vl", "dinov2", "idefics3", "vit"])
def test_layers(name):
    for mine, theirs in check(name, lora=True).values():
        assert mine < 0.78 * theirs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast(implementation):
    """float32 weights under bfloat16 autocast: as near to the plain model as bfloat16 lets it, in its dtypes."""
    model, batch = qwen3(attn_implementation=implementation).float(), {"input_ids": IDS, "attention_mask": padded(), "labels": IDS}
    results = []
    for fused in (False, True):
        if fused:
            fp.optimize(model, attention_only)
        model.zero_grad()
        kept = []
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out = model(**batch)
        out.loss.backward()
        results.append((out.logits.dtype, out.loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    (dtype, loss, gradient), (want_dtype, want, wanted) = results[1], results[0]
    assert dtype == want_dtype
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=2e-2)
    assert (gradient - wanted).norm() <= 0.05 * wanted.norm()
    assert not [t for t in kept if t.shape[-2:] == (10, 10) and t.is_floating_point()]  # nor handed over, for v alone was bfloat16
