"""Models in bfloat16 on a CPU that lacks its arithmetic (ops/_gemm.py, switched on here): fused layers multiply in float32."""

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft import _library
from fastpeft.ops import _gemm

pytestmark = pytest.mark.skipif(_library.FORCED == "triton", reason="Triton's kernels multiply as they do on a GPU")
PATCHES = {"aten.convolution.default", "aten.convolution_backward.default"}  # of an image's patches: PyTorch's own layer


@pytest.fixture(autouse=True)
def lacking(monkeypatch):
    monkeypatch.setattr(_gemm, "LACKING", (torch.bfloat16, torch.float16))


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, use_cache=False)).train()
    ids = torch.randint(3, 60, (2, 9))
    return model, lambda m: m(input_ids=ids, labels=ids).loss


def clip():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    model = CLIPVisionModel(CLIPVisionConfig(**sizes)).train()
    pixels = torch.randn(2, 3, 16, 16)
    return model, lambda m: m(pixel_values=pixels.to(m.dtype)).last_hidden_state.float().square().mean()


@pytest.mark.parametrize("make", [llama, clip])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_optimized_model(products, make, frozen):
    """Every layer frozen below a trained norm, or everything trained: no product of a fused layer is left in 16 bit, and the gradients are
    no further from float64 than the model's own."""
    model, loss = make()
    if frozen:
        model.requires_grad_(False)
        next(module for name, module in model.named_modules() if "norm" in type(module).__name__.lower()).requires_grad_(True)
    low, exact = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().double()
    fused = copy.deepcopy(low)
    fp.optimize(fused)
    with products() as made:
        loss(fused).backward()
    assert made.seen and made.in_16_bit() <= PATCHES
    loss(low).backward()
    loss(exact).backward()
    for (name, truth), own, ours in zip(exact.named_parameters(), low.parameters(), fused.parameters()):
        assert (truth.grad is None) == (ours.grad is None), name
        if truth.grad is not None:
            size = truth.grad.abs().max().clamp_min(1e-6)
            error, before = ((p.grad.double() - truth.grad).abs().max() / size for p in (ours, own))
            assert error <= 1.5 * before + 0.01, name


def test_generation(products):
    model, _ = llama()
    model = model.bfloat16().eval()
    fp.optimize(model)
    with products() as made, torch.no_grad():
        model(input_ids=torch.randint(3, 60, (2, 9)))
    assert made.seen and not made.in_16_bit()


@pytest.mark.parametrize("plan", ["F/LoRA/LoRA", "IA3/Prefix/IA3", "LoRA/T/LayerNorm"])
def test_miss(miss, products, plan):
    model = miss.build(plan, dtype=torch.bfloat16)
    batch = {name: t.bfloat16() if t.is_floating_point() else t for name, t in miss.batch().items()}
    with products() as made:
        model(**batch).loss.backward()
    left = [op for op, dtype in made.seen if dtype == torch.bfloat16 and op in made.in_16_bit() - PATCHES]
    # the head's transform is transformers' own module, a linear layer over labelled rows
    assert made.seen and len(left) <= len(("bias", "x", "W", "dy", "W", "dy", "x")), left
