"""Comparison of any model, on a batch of the caller's, with itself fused: loss and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.fused.head.outputs import lean_logits
from fastpeft.optimize import optimize
from fastpeft.verify.baseline import plain, without_dropout
from fastpeft.verify.compare import WORST, Check, Result, Step, deviation, tolerance

SINGLE = 1e-5  # transformers' RMSNorm computes in float32 in a float64 model too: its own truth is no better


def compare_on(model: nn.Module, batch: Mapping[str, Any]) -> Result:
    """Loss and gradients of ``model(**batch)``, fused against the model's own modules; the worst gradient is named.

    model: fused already or not; it is not changed, nor are its gradients. Dropout is off in the copies that run. The truth is the model's
    own modules in float64; what they are off in the model's dtype tells what that dtype can do. "fused" returns logits that can be read,
    "fused, lean logits" is what a training loop of ours runs. The loss is the output itself, its ``loss``, or the first of a tuple.
    ValueError where the batch gives no loss, nothing is trained, the model is on meta, or its loss is another at each call.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"verify: the batch is a {type(batch).__name__}; give the keywords of the model's forward, labels among them")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("verify: nothing of this model is trained, so there are no gradients to compare")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError("verify: this model is on the meta device and has no values; build it on another, or load its weights")
    still = without_dropout(copy.deepcopy(model)).train()
    own, fused = plain(still), copy.deepcopy(still)
    optimize(fused)
    dtype = next(p.dtype for p in still.parameters() if p.requires_grad)
    truth = _step(_in_double(own), batch)
    step = _step(own, batch)
    own_errors, result = deviation(step, truth)[0], Result()
    with torch.no_grad():
        again = float(_loss(own, batch))
    if not abs(again - step[0]) <= tolerance(0.0, dtype) * max(1.0, abs(step[0])):
        raise ValueError("verify: the model's loss is another at each call, as it draws random numbers; switch that off to compare")
    floor = SINGLE if any("RMSNorm" in type(module).__name__ for module in own.modules()) else 0.0
    for name, context in (("fused", nullcontext), ("fused, lean logits", lambda: lean_logits(fused))):
        with context():
            errors, worst = deviation(_step(fused, batch), truth)
        for quantity, error in errors.items():
            allowed = max(floor, tolerance(own_errors[quantity], dtype))
            result.checks.append(Check(name, quantity, error, own_errors[quantity], allowed, worst if quantity == WORST else ""))
    return result


def _in_double(model: nn.Module) -> nn.Module:
    """A copy in float64. transformers' experts then run one after another: its grouped products have no float64."""
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")
    return double


def _step(model: nn.Module, batch: Mapping[str, Any]) -> Step:
    """Loss and gradients of what is trained (zeros where a parameter got none); floating inputs in the model's dtype."""
    model.zero_grad(set_to_none=True)
    loss = _loss(model, batch)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    output = model(**{name: _cast(value, dtype) for name, value in batch.items()})
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError("verify: this batch gives no single loss: put labels (or what the model makes its loss of) into it")
    return loss


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``dtype``, cut off from the caller's graph, in lists and mappings too."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(one, dtype) for key, one in value.items()}
    return type(value)(_cast(one, dtype) for one in value) if type(value) in (list, tuple) else value
