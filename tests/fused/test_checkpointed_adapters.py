"""Gradient checkpointing under adapters that hand their layers tensors beside the hidden states: prefixes, routes, images."""

import pytest
import torch
from small_steps import SINGLE, same, step

import fastpeft as fp
from fastpeft.verify.cases import case_of

CASES = [("llama-tiny", "Prefix"), ("lavin-tiny", "MMAdapter/T/MMAdapter"), ("excitor-tiny", "F/Excitor")]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_gradients_are_those_without_checkpoints(name, plan):
    torch.manual_seed(0)
    model = fp.adapt(fp.build(name, dtype=torch.float64), plan).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = case_of(model).alone[0]
    wanted = step(model, batch)
    for options in ({"use_reentrant": False}, {"use_reentrant": True}, {"preserve_rng_state": True}):  # PyTorch's default is reentrant
        model.gradient_checkpointing_enable(dict(options))
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        same(step(model, batch), wanted, **SINGLE)
    assert all(layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "_gradient_checkpointing_func"))
