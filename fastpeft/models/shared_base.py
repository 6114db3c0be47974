"""Several models on one base: each has modules of its own, whose parameters and buffers lie in the base's memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.methods import is_adapter


def on_base_of(model: nn.Module) -> nn.Module:
    """A model like ``model``, which has no adapters, on the same weights: its parameters and buffers are other tensors in the same memory,
    so that what is attached to it, frozen or moved is its own affair. Quantised weights are shared as they are."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            memo |= {id(tensor): _same_memory(tensor) for tensor in held.values() if tensor is not None and id(tensor) not in memo}
        for value in vars(module).values():  # bitsandbytes' 8-bit layers keep codes and scales in a state beside the weight
            memo |= {id(tensor): tensor for tensor in vars(value).values() if isinstance(tensor, Tensor)} if _is_state(value) else {}
    return copy.deepcopy(model, memo)


def _same_memory(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach() if type(tensor) is Tensor else tensor


def _is_state(value: Any) -> bool:
    return type(value).__name__ == "MatmulLtState"


@torch.no_grad()
def own_what_is_trained(model: nn.Module) -> None:
    """Give an adapted model memory of its own for weights of the base that its plan trains, before anything writes to them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_adapter(name):
            parameter.data = parameter.data.clone()


@torch.no_grad()
def share_memory(model: nn.Module, base: nn.Module) -> None:
    """Let what ``model`` leaves of its base as it is lie in the memory of ``base``, which may have another dtype or device by now."""
    for name, theirs in base.named_modules():
        held = model.get_submodule(name)._parameters
        held |= {leaf: p for leaf, p in theirs._parameters.items() if p is not None and type(p) is not nn.Parameter}  # quantised
    others = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    for held in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in held:
            if not tensor.requires_grad and not is_adapter(name) and name in others:
                tensor.data = others[name].data
