"""LoRA: the definition on linear layers and convolutions, its scaling and start, and PEFT's gradients."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft as fp
from fastpeft.methods import Part
from fastpeft.models import parts_of

PART = Part("layers", "", lora=("layer",))


def attach(layer, **options):
    root = nn.Sequential()
    root.add_module("layer", layer)
    root.requires_grad_(False)
    fp.LoRA(**{"lora_alpha": 6, "r": 2} | options).attach(root, PART)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


@pytest.mark.parametrize(
    "method, scaling",
    [
        (fp.LoRA(), 8.0),
        (fp.LoRA(r=8), 4.0),
        (fp.LoRA(r=3, lora_alpha=1), 1 / 3),
        (fp.LoRA(r=16, lora_alpha=8, use_rslora=True), 2.0),
    ],
)
def test_scaling(miss, method, scaling):
    assert method.scaling == pytest.approx(scaling)
    layer = attach(nn.Linear(4, 4), r=method.r, lora_alpha=method.lora_alpha, use_rslora=method.use_rslora)
    assert layer.scaling == method.scaling


def test_start(miss):
    torch.manual_seed(0)
    layer = nn.Linear(4000, 8)
    root = nn.Sequential()
    root.add_module("layer", layer)
    fp.LoRA(r=16).attach(root, PART)
    assert torch.equal(layer.lora_B, torch.zeros(8, 16)) and layer.lora_A.shape == (16, 4000)
    bound = 1 / math.sqrt(4000)  # PEFT's kaiming_uniform_(a=sqrt(5))
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear(bias, dtype):
    layer = attach(nn.Linear(12, 7, bias=bias, dtype=dtype))
    x = torch.randn(2, 5, 12, dtype=dtype)
    W, A, B = (p.detach().double() for p in (layer.weight, layer.lora_A, layer.lora_B))
    want = F.linear(x.double(), W + 3.0 * B @ A, layer.bias.double() if bias else None)
    torch.testing.assert_close(layer(x).double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.1)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize(
    "size, options",
    [
        ((16, 24), {"kernel_size": 8, "stride": 8}),  # patches
        ((12, 6), {"kernel_size": (4, 2), "stride": (4, 2)}),
        ((17, 16), {"kernel_size": 8, "stride": 8}),  # a row left over
        ((9, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((9, 9), {"kernel_size": 3, "dilation": 2}),
    ],
)
def test_convolution(size, options):
    layer = attach(nn.Conv2d(3, 5, dtype=torch.float64, **options))
    assert layer.lora_A.shape == (2, 3, *layer.kernel_size) and layer.lora_B.shape == (5, 2, 1, 1)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)

    def reference():
        low = F.conv2d(x, layer.lora_A, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation) + 3.0 * F.conv2d(low, layer.lora_B)

    inputs, dy = (x, layer.lora_A, layer.lora_B), torch.randn_like(reference())
    want, got = reference(), layer(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="grouped convolution"):
        attach(nn.Conv2d(4, 4, 2, groups=2))


@pytest.mark.parametrize("layer, shape", [(nn.Linear(64, 8), (4000, 64)), (nn.Conv2d(4, 8, 4, 4), (500, 4, 8, 8))], ids=["linear", "conv"])
def test_dropout_falls_on_the_branch_while_training(layer, shape):
    attach(layer, lora_dropout=0.25)
    x = torch.ones(shape)
    with torch.no_grad():
        layer.eval()
        want = layer(x)
        assert torch.equal(layer(x), want)
        layer.train()
        got = layer(x)
        assert not torch.equal(got, want) and not torch.equal(layer(x), got)
        torch.testing.assert_close(got.flatten(0, -2).mean(0), want.flatten(0, -2).mean(0), rtol=0, atol=0.1)
        layer.lora_B.zero_()  # the base itself loses nothing
        torch.testing.assert_close(layer(x), layer.eval()(x))


def test_default_targets(miss):
    model = miss.build("LoRA/LoRA/LoRA", r=3)
    attached = {name for name, module in model.named_modules() if getattr(module, "lora_A", None) is not None}
    vit = {
        f"vision_model.encoder.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")
    }
    text = {
        f"{host}.encoder.layer.{i}.{attention}.self.{name}"
        for host in ("text_encoder", "text_decoder.bert")
        for i in range(2)
        for attention in ("attention", "crossattention")
        for name in ("query", "value")
    }
    assert attached == vit | text | {"vision_model.embeddings.patch_embedding"}


def test_targets_of_ones_own(miss):
    for targets in (("query", "key"), [r"query", "key"], r".*\.(query|key)"):
        model = miss.build()
        fp.adapt(model, jtm=fp.LoRA(target_modules=targets))
        names = {name.rsplit(".", 2)[1] for name, p in model.named_parameters() if p.requires_grad}
        assert names == {"query", "key"}


def test_a_rank_above_the_weights_own_is_told(miss):
    with pytest.warns(UserWarning, match=r"LoRA: r=100000 is above the rank of \d+ of \d+ weights of 'jtm'"):
        fp.adapt(miss.build(), jtm=fp.LoRA(r=100_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.adapt(miss.build(), jtm=fp.LoRA(r=1))


def test_equivalence_is_about_outputs(miss):
    part = parts_of(miss.build())[1]
    same = (fp.LoRA(lora_dropout=0.5), fp.LoRA(target_modules=("value", "query")), fp.LoRA(lora_alpha=16, use_rslora=True))
    assert all(fp.LoRA().equivalent(other, part) for other in same)
    others = (fp.LoRA(r=2), fp.LoRA(lora_alpha=1), fp.LoRA(target_modules=("query",)), fp.LoRA(target_modules="query"), fp.IA3())
    assert not any(fp.LoRA().equivalent(other, part) for other in others)


@pytest.mark.parametrize("options", [{}, {"r": 3, "lora_alpha": 7, "use_rslora": True}, {"target_modules": ("key", "dense", "fc1")}])
def test_gradients_are_those_of_peft(same_gradients_as_peft, options):
    same_gradients_as_peft("LoRA/LoRA/LoRA", **options)
