"""Quantised weights: how often an operator dequantises one, and that what it gets is the library's own weight."""

import copy
import sys

import pytest
import torch
from quantized_llama import FORMATS, llama_folder, loaded, logits_of, torchao_or_its_stand_in  # noqa: F401 - fixtures
from torch import nn
from transformers import LlamaForCausalLM

import fastpeft as fp
from fastpeft.methods.quantized import dequantize, is_held, is_quantized, weight_of
from fastpeft.ops._quantized_weight import QuantizedWeight
from fastpeft.ops.lora_linear import Projection, lora_linears


class Stored(QuantizedWeight):
    """A weight kept as it is, told how often it was formed."""

    def __init__(self, weight):
        self.weight, self.shape, self.formed = weight, weight.shape, 0

    def dense(self, dtype):
        self.formed += 1
        return self.weight.to(dtype, copy=True)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "xAB", "bias"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_op_forms_a_held_weight_twice_and_keeps_it_never(wanted, p):
    x, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((8, 6), (3, 6), (8, 3)))
    leaves = {"x": x, "A": A, "B": B, "b": b}
    for name in "xAB" if wanted == "xAB" else wanted[0]:
        leaves[name].requires_grad_()
    results, held = [], [Stored(W), Stored(W)]
    for first, second in ((W, W), held):
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):  # noqa: B023
            ys = lora_linears(x, [Projection(first, b, A, B, 0.7), Projection(second)], p)
            loss = sum(y.square().sum() for y in ys)
        results.append((loss.detach(), *torch.autograd.grad(loss, [t for t in leaves.values() if t.requires_grad])))
    assert (8, 6) not in saved
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert [h.formed for h in held] == ([2, 2] if "x" in wanted else [1, 1])  # only dx is a product with the weight


def test_a_held_weight_must_fit():
    with pytest.raises(ValueError, match=r"do not fit; pass x \[..., in\]"):
        lora_linears(torch.ones(2, 5), [Projection(Stored(torch.ones(3, 4)))])
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        lora_linears(torch.ones(2, 4), [Projection(torch.ones(3, 4, dtype=torch.float64))])


@pytest.mark.parametrize("how", FORMATS)
def test_dequantised_weights_are_the_librarys(folder, how):
    model = loaded(folder, how)
    wanted = copy.deepcopy(model)
    if how in ("torchao", "standin"):
        wanted = {name: m.weight.dequantize() for name, m in wanted.named_modules() if is_held(m)}
    else:
        wanted = {name: m.weight for name, m in wanted.dequantize().named_modules() if type(m) is nn.Linear and name != "lm_head"}
    got = {name: weight_of(m).dense(torch.float32) for name, m in model.named_modules() if is_held(m)}
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight.detach(), rtol=0, atol=0)
    dense = LlamaForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
    error = (got["model.layers.0.mlp.up_proj"] - dense).abs().max() / dense.abs().max()
    assert 0 < error < (0.25 if how in ("4bit", "fp4") else 0.01)


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_after_bitsandbytes_own_forward(folder, how):
    """Its first forward moves the scales of 8 bits, and on some CPUs lays 4 bits out anew, their maxima rounded to bfloat16."""
    model = loaded(folder, how).eval()
    before = dequantize(copy.deepcopy(model))
    logits_of(model)
    twin = dequantize(copy.deepcopy(model))
    torch.testing.assert_close(logits_of(twin), logits_of(before), rtol=0.2, atol=0.2)
    fp.optimize(model)
    torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=1e-4, atol=1e-4)


def test_without_the_libraries_nothing_is_imported():
    assert "bitsandbytes" not in sys.modules or "bitsandbytes.nn" in sys.modules
    assert not is_quantized(torch.ones(2)) and not is_held(nn.Linear(2, 2))


def test_a_format_that_cannot_be_written_out_says_so(folder):
    utils = pytest.importorskip("torchao.utils")

    class Opaque(utils.TorchAOBaseTensor):
        """As torchao's CPU layout of int4."""

        tensor_data_names, tensor_attribute_names = ("codes",), ()

        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes):
            self.codes = codes

    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(Opaque(torch.ones(128, 64, dtype=torch.int8)), requires_grad=False)
    report = fp.optimize(model)
    assert dict(report.skipped)["model.layers.0.mlp.up_proj"].startswith("torchao's Opaque cannot be written out")
    with pytest.raises(TypeError, match="Opaque cannot be written out"):
        weight_of(model.model.layers[0].mlp.up_proj)
