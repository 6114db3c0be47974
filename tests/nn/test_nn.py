"""fastpeft.nn against plain formulas in float64: values, and gradients for every subset of what may require one."""

import copy
import doctest
import importlib
import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft as fp

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def lora_linear(x, p, m):
    return F.linear(x, p["weight"], p["bias"]) + m.lora_alpha / math.sqrt(m.r) * (x @ p["lora_A"].T @ p["lora_B"].T)


def layer_norm(x, p, m):
    dims = tuple(range(-len(m.normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + m.eps).sqrt() * p["weight"]
    return y + p["bias"] if "bias" in p else y


def rms_norm(x, p, m):
    eps = torch.finfo(F64).eps if m.eps is None else m.eps
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p["weight"]


def mm_adapter(x, p, m):
    weights = ((x @ p["router_weight"].T + p["router_bias"]) / m.temperature).softmax(-1)
    a = x @ p["w_down"].T + p["b_down"]
    ups = [torch.block_diag(*p["w_up"][e].chunk(m.groups)) for e in range(2)]
    experts = [a @ up.T + p["b_up"][e] for e, up in enumerate(ups)]
    return x + m.scale * sum(weights[..., e : e + 1] * expert for e, expert in enumerate(experts))


LABELS = torch.tensor([[0, 4, -100], [6, -100, 2]])


def head_loss(x, p, m):
    return F.cross_entropy(F.linear(x, p["weight"], p["bias"]).flatten(0, 1), LABELS.flatten(), label_smoothing=m.label_smoothing)


MODULES = {
    "LoRALinear": (lambda **to: fp.nn.LoRALinear(8, 6, r=3, lora_alpha=5, use_rslora=True, **to), lora_linear, ()),
    "LayerNorm": (lambda **to: fp.nn.LayerNorm(8, **to), layer_norm, ()),
    "LayerNorm of two dimensions": (lambda **to: fp.nn.LayerNorm((3, 8), bias=False, eps=1e-3, **to), layer_norm, ()),
    "RMSNorm": (lambda **to: fp.nn.RMSNorm(8, **to), rms_norm, ()),
    "MMAdapter": (lambda **to: fp.nn.MMAdapter(8, h=4, scale=0.7, dropout=0.0, temperature=2.0, **to), mm_adapter, ()),
    "LinearCrossEntropy": (lambda **to: fp.nn.LinearCrossEntropy(8, 7, True, label_smoothing=0.1, **to), head_loss, (LABELS,)),
}


def drawn(module, std=0.5):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_every_subset_of_gradients(name):
    make, formula, more = MODULES[name]
    module = drawn(make(dtype=F64))
    x = torch.randn(2, 3, 8, dtype=F64)
    wide = torch.randn(2, 3, 16, dtype=F64)
    strided = wide[..., ::2].copy_(x)
    leaves = {"x": x, **dict(module.named_parameters())}
    for wanted in itertools.chain.from_iterable(itertools.combinations(leaves, n) for n in range(len(leaves) + 1)):
        for key, leaf in leaves.items():
            leaf.requires_grad_(key in wanted)
        inputs = strided.detach().requires_grad_("x" in wanted)
        got = module(inputs, *more)
        want = formula(x, dict(module.named_parameters()), module)
        torch.testing.assert_close(got, want)
        assert got.requires_grad == bool(wanted)
        if wanted:
            g = torch.randn_like(want)
            mine = [inputs if key == "x" else leaves[key] for key in wanted]
            found = torch.autograd.grad(got, mine, g)
            for key, a, b in zip(wanted, found, torch.autograd.grad(want, [leaves[key] for key in wanted], g)):
                torch.testing.assert_close(a, b, msg=lambda m, of=(wanted, key): f"{of}: {m}")


def excitor_attention(x, p, m, mask=None, causal=True, visual=None):
    """Equations 1-9, token by token: S = (T W_q)(prompt)^T with W_q = w_up w_down, one softmax over prompts and image."""
    B, M, C = x.shape
    H, G, d = m.num_heads, m.num_key_value_heads, C // m.num_heads
    q, k, v = (F.linear(x, p[f"{n}_proj.weight"], p[f"{n}_proj.bias"]).unflatten(-1, (-1, d)).transpose(1, 2) for n in "qkv")
    k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    w = {n.removeprefix("excitor."): t for n, t in p.items() if n.startswith("excitor.")}
    read = x @ w["w_down"].T @ w["w_up"].T
    keys, values = (w["prompt"].expand(B, -1, -1) for _ in range(2))
    if visual is not None:
        keys = torch.cat([keys, visual @ w["wk_down"].T @ w["wk_up"].T], 1)
        values = torch.cat([values, visual @ w["wv_down"].T @ w["wv_up"].T], 1)
    extra = (read @ keys.mT / math.sqrt(C)).softmax(-1) @ values
    k = k + w["gate"][:, None, None] * extra.unflatten(-1, (H, d)).transpose(1, 2)
    scores = q @ k.mT / math.sqrt(d)
    if causal:
        scores = scores.masked_fill(torch.ones(M, M, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None].bool(), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(y, p["o_proj.weight"], p["o_proj.bias"])


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seeing", [True, False])
def test_excitor_attention(kv_heads, causal, seeing):
    module = fp.nn.ExcitorAttention(16, 4, num_key_value_heads=kv_heads, bias=True, num_prompts=5, r=3, visual_dim=6 if seeing else None)
    module = drawn(module.double(), 0.3)
    x, mask = torch.randn(2, 5, 16, dtype=F64), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    visual = torch.randn(2, 3, 6, dtype=F64) if seeing else None
    leaves = {"x": x, **({"visual": visual} if seeing else {}), **dict(module.named_parameters())}
    for wanted in [*((name,) for name in leaves), tuple(leaves), tuple(n for n in leaves if "excitor" in n)]:
        for key, leaf in leaves.items():
            leaf.requires_grad_(key in wanted)
        got = module(x, mask, is_causal=causal, visual=visual)
        want = excitor_attention(x, dict(module.named_parameters()), module, mask, causal, visual)
        torch.testing.assert_close(got, want)
        g = torch.randn_like(want)
        pairs = zip(wanted, *(torch.autograd.grad(y, [leaves[key] for key in wanted], g) for y in (got, want)))
        for key, a, b in pairs:
            torch.testing.assert_close(a, b, msg=lambda m, of=(wanted, key): f"{of}: {m}")


def test_excitor_attention_without_a_gate_is_attention_and_rotates_what_it_should():
    module = fp.nn.ExcitorAttention(16, 4, gate_std=0.0, num_prompts=5, r=3, dtype=F64)
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {f"excitor.{n}" for n in ("w_down", "w_up", "prompt", "gate")}
    x = torch.randn(2, 5, 16, dtype=F64)
    angles = torch.arange(5.0, dtype=F64)[:, None] * torch.tensor([1.0, 0.1], dtype=F64).repeat(2)
    cos, sin = angles.cos()[None], angles.sin()[None]

    def rotated(t):
        return t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin

    q, k, v = (getattr(module, f"{n}_proj")(x).unflatten(-1, (4, 4)).transpose(1, 2) for n in "qkv")
    want = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    torch.testing.assert_close(module(x, position_embeddings=(cos, sin)), module.o_proj(want.transpose(1, 2).flatten(2)))


ALL = {**{name: make for name, (make, *_) in MODULES.items()}, "ExcitorAttention": lambda **to: fp.nn.ExcitorAttention(8, 2, r=2, **to)}


def call(name, module, x):
    return module(x, *MODULES[name][2]) if name in MODULES else module(x)


@pytest.mark.parametrize("name", ALL)
def test_copies_pickles_and_states(name):
    module = ALL[name]()
    x = torch.randn(2, 3, 8)
    want = call(name, drawn(module), x)
    fresh = ALL[name]()
    fresh.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        torch.testing.assert_close(call(name, twin, x), want, rtol=0, atol=0)
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in module.parameters()]


@pytest.mark.parametrize("name", ALL)
def test_compiles_to_one_graph(name):
    module, x = drawn(ALL[name]()), torch.randn(2, 3, 8)
    torch._dynamo.reset()
    got = torch.compile(lambda x: call(name, module, x), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, call(name, module, x))
    trained = [p for p in module.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(y.sum(), trained) for y in (got, call(name, module, x)))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_dtype_device_and_reset(name):
    half = ALL[name](dtype=torch.bfloat16)
    base = [p for n, p in half.named_parameters() if "lora" not in n and "excitor" not in n]
    assert base and all(p.dtype == torch.bfloat16 for p in base)
    assert call(name, half, torch.randn(2, 3, 8, dtype=torch.bfloat16)).isfinite().all()
    assert all(p.is_meta for p in ALL[name](device="meta").parameters())
    torch.manual_seed(5)
    first = ALL[name]().state_dict()
    module = drawn(ALL[name]())
    torch.manual_seed(5)
    module.reset_parameters()
    if name not in ("ExcitorAttention",):  # which draws in another order
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, first[key], rtol=0, atol=0, msg=key)
    assert all((p == 0.5).sum() == 0 and p.isfinite().all() for p in module.parameters())
    assert "8" in repr(module)


def test_options_of_pytorchs_norms():
    for mine, theirs in ((fp.nn.LayerNorm, nn.LayerNorm), (fp.nn.RMSNorm, nn.RMSNorm)):
        for options in ({"elementwise_affine": False}, {"eps": 0.1}, {}):
            for shape in (8, (3, 8)):
                x = torch.randn(2, 3, 8, dtype=F64)
                torch.testing.assert_close(mine(shape, dtype=F64, **options)(x), theirs(shape, dtype=F64, **options)(x))
        assert isinstance(mine(8), theirs)
        with pytest.raises(ValueError, match=r"must end in \(8,\)"):
            mine(8)(torch.randn(2, 7))
    x = torch.randn(4, 8).bfloat16() * 1e-4  # where eps decides
    torch.testing.assert_close(fp.nn.RMSNorm(8, dtype=torch.bfloat16)(x), nn.RMSNorm(8, dtype=torch.bfloat16)(x), rtol=0, atol=0)


def test_lora_on_a_layer_of_a_model():
    linear = nn.Linear(8, 6).eval()
    layer = fp.nn.LoRALinear.from_linear(linear, r=2, lora_alpha=6)
    x = torch.randn(3, 8)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.scaling == 3.0 and layer.lora_A.dtype == torch.float32
    assert fp.nn.LoRALinear.from_linear(nn.Linear(8, 6).bfloat16()).lora_A.dtype == torch.float32
    assert fp.nn.LoRALinear.from_linear(nn.Linear(8, 6, device="meta")).lora_B.is_meta
    pruned = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    for wrong in (nn.Conv2d(8, 6, 1), layer, pruned, nn.utils.spectral_norm(nn.Linear(8, 6)), "linear"):
        with pytest.raises(TypeError, match="from_linear takes a plain"):
            fp.nn.LoRALinear.from_linear(wrong)
        with pytest.raises(TypeError, match="from_linear takes a plain"):
            fp.nn.LinearCrossEntropy.from_linear(layer)
    for bad, name in (({"r": 0}, "r must"), ({"lora_alpha": math.nan}, "lora_alpha"), ({"lora_dropout": 1.0}, "lora_dropout")):
        with pytest.raises(ValueError, match=name):
            fp.nn.LoRALinear(8, 6, **bad)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_merging(dtype):
    layer = drawn(fp.nn.LoRALinear(8, 6, r=2, lora_dropout=0.5, dtype=dtype)).eval()
    x = torch.randn(3, 8, dtype=dtype)
    want, base = layer(x), layer.weight.clone()
    error = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]  # the merged weight is rounded once
    close = {"rtol": error, "atol": error}
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and plain.weight is not layer.weight and not layer.merged
    torch.testing.assert_close(plain(x), want, **close)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.merge().merge()
    assert layer.merged and "merged" in repr(layer)
    torch.testing.assert_close(layer.train()(x), want, **close)
    torch.testing.assert_close(layer.to_linear().weight, layer.weight, rtol=0, atol=0)
    fresh = fp.nn.LoRALinear(8, 6, r=2, dtype=dtype).eval()
    fresh.load_state_dict(layer.state_dict())  # of a merged layer: the base beside the adapter
    torch.testing.assert_close(fresh(x), want, **close)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.reset_lora_parameters()
    layer.load_state_dict(state)  # into a merged layer
    assert not layer.merged
    torch.testing.assert_close(layer.eval()(x), want, rtol=0, atol=0)
    torch.testing.assert_close(layer.merge().unmerge().unmerge().weight, base, **close)
    layer.merge().reset_parameters()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_loras_dropout():
    layer = drawn(fp.nn.LoRALinear(8, 6, r=2, lora_dropout=0.5))
    x = torch.ones(4000, 8)
    base = F.linear(x, layer.weight, layer.bias)
    branch = (layer(x) - base).mean(0)
    torch.testing.assert_close(branch, (layer.eval()(x) - base)[0], rtol=0.2, atol=0.1)
    assert (layer(x) == layer(x)).all() and layer.train()(x).std(0).min() > 0


def test_lora_linear_in_a_model_that_is_optimised():
    """q, k and v of a transformers model exchanged by hand: one joint operator, the same values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).double().requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, drawn(fp.nn.LoRALinear.from_linear(getattr(layer.self_attn, name), r=2)))
    ids = torch.randint(0, 50, (2, 7))

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.double(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (want, theirs), _, (got, mine) = step(), fp.optimize(model), step()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(theirs) == 8 and mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_mm_adapters_routing():
    adapter = drawn(fp.nn.MMAdapter(8, dropout=0.5, dtype=F64)).eval()
    x = torch.randn(2, 5, 8, dtype=F64)
    per_sample = adapter.route(x[:, 0])
    assert per_sample.shape == (2, 2) and torch.allclose(per_sample.sum(-1), torch.ones(2, dtype=F64))
    torch.testing.assert_close(adapter(x, per_sample), adapter(x, per_sample[:, None].expand(2, 5, 2)))
    torch.testing.assert_close(adapter(x[0]), adapter(x)[0])
    torch.testing.assert_close(adapter(x[1], per_sample[1]), adapter(x, per_sample)[1])
    assert not torch.equal(adapter.train()(x), adapter(x))
    torch.testing.assert_close(fp.nn.MMAdapter(8, dtype=F64)(x), x, rtol=0, atol=0)
    for bad in ({"h": 3}, {"groups": 3}, {"dropout": 1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="MMAdapter"):
            fp.nn.MMAdapter(8, **bad)
    with pytest.raises(ValueError, match="routing has shape"):
        adapter(x, per_sample[:1])


def test_linear_cross_entropy_on_a_head():
    linear = nn.Linear(8, 7)
    head = fp.nn.LinearCrossEntropy.from_linear(linear, reduction="none", ignore_index=3)
    x, labels = torch.randn(2, 3, 8), torch.tensor([[0, 1, 3], [6, 3, 2]])
    assert head.weight is linear.weight and head.bias is linear.bias
    want = F.cross_entropy(linear(x).flatten(0, 1), labels.flatten(), ignore_index=3, reduction="none").view(2, 3)
    torch.testing.assert_close(head(x, labels), want)
    torch.testing.assert_close(head.logits(x), linear(x))
    with pytest.raises(ValueError, match="reduction"):
        fp.nn.LinearCrossEntropy(8, 7, reduction="max")
    with pytest.raises(ValueError, match="label_smoothing"):
        fp.nn.LinearCrossEntropy(8, 7, label_smoothing=2.0)


@pytest.mark.parametrize("bad", [{"num_heads": 3}, {"num_heads": 4, "num_key_value_heads": 3}, {"num_heads": 0}, {"num_heads": 4, "r": 0}])
def test_excitor_attentions_sizes(bad):
    with pytest.raises(ValueError, match=r"Excitor"):
        fp.nn.ExcitorAttention(16, **bad)


def test_excitor_attentions_inputs():
    attention = fp.nn.ExcitorAttention(16, 4)
    with pytest.raises(ValueError, match="visual_dim"):
        attention(torch.randn(1, 2, 16), visual=torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match="pass \\[B, M, 16\\]"):
        attention(torch.randn(2, 16))


@pytest.mark.parametrize("name", ["linear", "norms", "loss", "adapters"])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"fastpeft.nn.{name}"))
    assert found.attempted > 0 and found.failed == 0


def test_imported_on_first_use():
    code = "import sys, fastpeft; assert 'torch' not in sys.modules; assert 'nn' in dir(fastpeft); fastpeft.nn.LoRALinear(4, 4)"
    code += "; assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def kernelize(model, mapping, device="cpu"):
    """Stand-in for ``kernels.kernelize``, by its documented rules for a layer; tests/trainers has the package's own."""
    found = 0
    for module in model.modules():
        if (name := getattr(type(module), "kernel_layer_name", None)) in mapping:
            layer = mapping[name][device].load()
            assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
            assert set(dir(layer)) - set(dir(nn.Module)) <= {"can_torch_compile", "has_backward"}
            module.forward = layer.forward.__get__(module)
            found += 1
    return found


def test_kernel_mapping(monkeypatch):
    """transformers' "RMSNorm" computes the same on our operator, and optimize leaves what was kernelized."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3))
    ids = torch.randint(0, 50, (2, 7))
    want = model(input_ids=ids, labels=ids)
    want.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    assert kernelize(model, fp.nn.kernel_mapping()) == 5
    got = model(input_ids=ids, labels=ids)
    got.loss.backward()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5)
    report = fp.optimize(model)
    assert sum("forward of its own" in reason for name, reason in report.skipped if name.endswith("norm")) == 5
