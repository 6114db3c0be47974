"""Decorators of every op: ``torch.autocast``'s casts of its arguments, and a backward without autocast, differentiable once.

Under an active ``torch.autocast`` a public op first casts its floating tensors, float64 apart (as PyTorch does), then runs as if there
were none:

| rule      | cast to                              | ops                                                                             |
|-----------|--------------------------------------|---------------------------------------------------------------------------------|
| "lower"   | autocast's dtype, as F.linear's      | lora_linears, attention, absorbed_attention, excitor_keys, linear_cross_entropy |
| "promote" | the widest dtype of the op's tensors | norms, gelu, swiglu, rescale, rotary, attention_inputs, adapters                |

The adapters are bound by memory, not by their thin products, and add to a stream: so they promote. float32 parameters of a norm thus
keep the residual stream in float32, as autocast's own layer_norm does on CUDA. The casts are autograd's, so gradients of float32
parameters are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import Function

from fastpeft.ops._recompute import mark_recomputable, recipe_of


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def _cast(value, dtype: torch.dtype):
    """``value`` with every tensor in it, however deep in tuples, cast."""
    if isinstance(value, Tensor):
        if not _castable(value) or value.dtype == dtype:
            return value
        cast = value.to(dtype)  # what backward can recompute, it can recompute and cast
        return cast if recipe_of(value) is None else mark_recomputable(cast, lambda t: t.to(dtype), value)
    if isinstance(value, (tuple, list)):
        items = [_cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _active(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype that an active autocast computes t's products in; None where there is none, and for float64."""
    return torch.get_autocast_dtype(t.device.type) if _castable(t) and _active(t.device.type) else None


def widest(*values) -> torch.dtype | None:
    """The dtype that all floating tensors in ``values`` promote to, float64 apart; None where there is none."""
    dtypes = {t.dtype for t in _tensors(values) if _castable(t)}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def under_autocast(rule: str) -> Callable:
    """Decorates a public op with one of the rules above; costs one query where there is no autocast."""
    assert rule in ("lower", "promote")

    def decorate(op: Callable) -> Callable:
        @functools.wraps(op)
        def surrounded(*args, **kwargs):
            first = next(_tensors((*args, *kwargs.values())), None)
            if first is None or not _active(first.device.type):
                return op(*args, **kwargs)
            device = first.device.type
            dtype = torch.get_autocast_dtype(device) if rule == "lower" else widest(*args, *kwargs.values())
            if dtype is not None:
                args, kwargs = _cast(args, dtype), {name: _cast(value, dtype) for name, value in kwargs.items()}
            with torch.autocast(device, enabled=False):
                return op(*args, **kwargs)

        return surrounded

    return decorate


class _OnceOnly(Function):
    """Gradients as they are, whose own gradient is an error. ``sources`` are what they were computed of: autograd visits only what leads to
    the tensors that it is asked about."""

    @staticmethod
    def forward(ctx, op, sources, *tensors):
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in tensors[sources:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"fastpeft: {ctx.op} has no second derivative; call fastpeft.restore(model), or the op's *_reference, where a gradient is "
            f"differentiated again"
        )


def first_order(backward: Callable) -> Callable:
    """Decorates a Function's backward: outside autocast, where the forward ran too, and, under create_graph=True, returning gradients
    that refuse to be differentiated. Left alone they would look like constants, and second derivatives be silently wrong.
    """
    op = backward.__qualname__.split(".")[0].lstrip("_")

    def outside(ctx, *dys):
        device = next((dy.device.type for dy in dys if dy is not None), "cpu")
        if not _active(device):
            return backward(ctx, *dys)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *dys)

    @functools.wraps(backward)
    def surrounded(ctx, *dys):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outside(ctx, *dys)
        with torch.no_grad():
            grads = outside(ctx, *dys)
        grads = grads if isinstance(grads, tuple) else (grads,)
        sources = [t for t in (*dys, *ctx.saved_tensors) if t is not None and t.requires_grad]
        live = iter(_OnceOnly.apply(op, len(sources), *sources, *(grad.detach().requires_grad_() for grad in grads if grad is not None)))
        return tuple(None if grad is None else next(live) for grad in grads)

    return surrounded
