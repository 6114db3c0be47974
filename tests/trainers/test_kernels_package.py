"""Hugging Face's `kernels` takes fastpeft.nn's mapping. Run by `make test-trainers`."""

import copy

import pytest
from small_steps import SINGLE, llama, same, step, text

import fastpeft as fp

kernels = pytest.importorskip("kernels", reason="make test-trainers has kernels")
if not hasattr(kernels, "kernelize"):
    pytest.skip("make test-trainers has kernels", allow_module_level=True)  # this checkout's own folder, under pytest's rootdir


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE"])
def test_a_kernelized_model_computes_the_same(mode, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model, batch = llama().train(mode == "TRAINING"), text()
    want = step(model, batch)
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    other = copy.deepcopy(model)
    with kernels.use_kernel_mapping(fp.nn.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(other, mode=getattr(kernels.Mode, mode), device="cpu", use_fallback=False)
    norms = [m for m in other.modules() if isinstance(m, LlamaRMSNorm)]
    assert len(norms) == 5 and all("forward" in m.__dict__ for m in norms)
    same(step(other, batch), want, **{name: 10 * value for name, value in SINGLE.items()})
