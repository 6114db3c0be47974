"""Leaves that stand anywhere: linear layers, activations, PyTorch's norms. Values, gradients, bytes kept, names of arguments."""

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, activations
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fastpeft as fp
from fastpeft.registry import is_fused

N = 12
EXACT = {"rtol": 1e-10, "atol": 1e-10}
ACTS = {
    "gelu": activations.GELUActivation,
    "gelu tanh": activations.GELUTanh,
    "new gelu": activations.NewGELUActivation,
    "fast gelu": activations.FastGELUActivation,
    "accurate gelu": activations.AccurateGELUActivation,
    "quick gelu": activations.QuickGELUActivation,
    "silu": activations.SiLUActivation,
    "nn.GELU": nn.GELU,
    "nn.GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "nn.SiLU": nn.SiLU,
    "xIELU": lambda: activations.XIELUActivation(dtype=torch.float64).requires_grad_(False),
    "mish": activations.MishActivation,
    "laplace": activations.LaplaceActivation,
    "clipped gelu": lambda: activations.ClippedGELUActivation(-1.5, 1.0),
}
LINEARS = {"Linear": nn.Linear, "Conv1D": lambda n, m: Conv1D(m, n), "FalconLinear": FalconLinear}
NORMS = {
    "LayerNorm": nn.LayerNorm,
    "LayerNorm without bias": lambda n: nn.LayerNorm(n, bias=False),
    "LayerNorm alone": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "RMSNorm": lambda n: nn.RMSNorm(n, eps=1e-5),
    "RMSNorm alone": lambda n: nn.RMSNorm(n, eps=1e-5, elementwise_affine=False),
}


def scattered(module):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p)
    return module


def step(module, x):
    """(y, gradients, bytes that only this step keeps)."""
    module.zero_grad()
    x, kept = x.clone().requires_grad_(), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module(x)
    y.float().square().sum().backward() if y.dtype != torch.float64 else y.square().sum().backward()
    held = {p.untyped_storage().data_ptr() for p in module.parameters()} | {x.untyped_storage().data_ptr()}
    return y.detach(), [x.grad, *(p.grad for p in module.parameters())], sum(n for key, n in kept.items() if key not in held)


def compare(module, dtype=torch.float64, **close):
    """Bytes kept before and after ``optimize``, of a module that then computes the same."""
    module = scattered(module).to(dtype)
    x = torch.randn(3, 5, N, dtype=torch.float64).to(dtype)
    want = step(module, x)
    ours = copy.deepcopy(module)
    fp.optimize(ours)
    assert all(is_fused(m) for m in ours.modules() if type(m).__module__ != "torch.nn.modules.container")
    got = step(ours, x)
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], **close)
    for mine, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    return want[2], got[2]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("linear", LINEARS)
def test_an_activation_and_the_linear_layer_after_it(act, linear):
    """The activation's output is formed again for the weight's gradient: of the activation its input is kept."""
    first, last = LINEARS[linear](N, 16), LINEARS[linear](16, 8)
    plain, ours = compare(nn.Sequential(first, ACTS[act](), last), rtol=1e-10, atol=1e-9)
    assert ours == 15 * 16 * 8 < plain


def test_an_activation_that_is_trained():
    """Its parameters get their gradients from PyTorch's own backward."""
    compare(nn.Sequential(nn.Linear(N, 16), activations.XIELUActivation(dtype=torch.float64), nn.Linear(16, 8)), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linear", LINEARS)
def test_a_norm_and_the_linear_layer_after_it(norm, linear):
    plain, ours = compare(nn.Sequential(NORMS[norm](N), LINEARS[linear](N, 8)), **EXACT)
    assert ours < plain - 14 * N * 8  # the norm's output, save for its statistics


@pytest.mark.parametrize("norm", NORMS)
def test_norms_in_16_bit(norm):
    compare(nn.Sequential(NORMS[norm](N)), torch.bfloat16, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("act", [nn.ReLU, activations.ReLUSquaredActivation])
@pytest.mark.parametrize("linear", LINEARS)
def test_relu_and_the_linear_layer_after_it(act, linear, monkeypatch):
    """What is above zero and a bit for each element; where the layer needs nothing of it, the bits."""
    monkeypatch.setattr(sys.modules["fastpeft.ops.relu"], "FEW", 0)
    packs = sys.modules["fastpeft.ops.relu"].PACKS
    module = nn.Sequential(LINEARS[linear](N, 16), act(), LINEARS[linear](16, 8))
    plain, ours = compare(module, rtol=1e-10, atol=1e-9)
    assert ours < 0.75 * plain if packs else ours <= plain
    module[2].requires_grad_(False)
    if act is nn.ReLU and linear == "Linear":
        plain, ours = compare(module, **EXACT)
        assert plain == 15 * 16 * 8 and (ours == 15 * 16 // 8 if packs else ours == plain)


def test_a_frozen_linear_layer_keeps_what_it_kept():
    module = nn.Sequential(nn.Linear(N, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)
    plain, ours = compare(module, **EXACT)
    assert plain == ours


def test_arguments_by_name():
    x = torch.randn(2, N)
    for module in (nn.Linear(N, 4), nn.LayerNorm(N), nn.GELU(), nn.Dropout(0.0), activations.GELUTanh()):
        want = module(input=x)
        fp.optimize(module)
        torch.testing.assert_close(module(input=x), want)
        torch.testing.assert_close(module(x), want)


def test_inputs_that_do_not_fit():
    """PyTorch's own errors, and activations that work in place or in Python stay."""
    linear = nn.Linear(N, 4)
    fp.optimize(linear)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        linear(torch.randn(2, N + 1))
    report = fp.optimize(nn.ModuleList([nn.SiLU(inplace=True), activations.GELUTanh(use_gelu_tanh_python=True), nn.RMSNorm(4)]))
    reasons = ["works in place", "is written out in Python (use_gelu_tanh_python)", "its eps is no number"]
    assert [reason for _, reason in report.skipped] == reasons and not report.swapped


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)).double().eval()


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_on_gpt2s_layers(method):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False),
        "ia3": lambda: peft.IA3Config(
            target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True, init_ia3_weights=False
        ),
    }[method]()
    model, ids = peft.get_peft_model(gpt2(), config), torch.randint(3, 50, (2, 9))
    model.double()

    def run():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want, wanted = run()
    report = fp.optimize(model)
    row = report.classes[f"{method}.Linear"]
    assert row.fused == row.modules > 3 and report.coverage["layers"] == 1
    loss, gradients = run()
    torch.testing.assert_close(loss, want, **EXACT)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], **EXACT)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids, labels=ids).loss, want, **EXACT)


def test_adapters_come_and_go_on_fused_layers():
    """fp.adapt on a model that is optimised: without its adapters each layer is fused as before."""
    from fastpeft.methods.adapted import AdaptedLinear, adapted

    linear = nn.Linear(N, 4)
    fp.optimize(linear)
    before = type(linear)
    assert type(adapted(linear)) is AdaptedLinear and linear(torch.randn(2, N)).shape == (2, 4)
    linear.remove()
    assert type(linear) is before
    fp.restore(linear)
    assert type(adapted(linear)) is AdaptedLinear
    linear.remove()
    assert type(linear) is nn.Linear
