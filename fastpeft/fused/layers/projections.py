"""Projections of a layer's input: joint LoRA GEMMs, IA3's factors, recomputation in backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.adapted import linear_spec
from fastpeft.methods.linear_spec import LinearSpec
from fastpeft.ops._recompute import recipe_of, recomputed
from fastpeft.ops.lora_linear import lora_linears


class Recomputes:
    """A module that can recompute its projections in backward instead of saving them.

    fastpeft.cost.memory_budget sets ``recompute``. ``observer``, set by fastpeft.cost.activations, runs the projections and records
    their cost."""

    recompute = False
    observer: Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]] | None = None

    def projected(self, call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, linears: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        """``call(x)``, which runs ``linears``."""
        run = partial(self._projected, call, x, linears)
        return run() if self.observer is None else self.observer(run)

    def _projected(self, call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, linears: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        if not self.recompute:
            return call(x)
        random = any(getattr(linear, "active_dropout", 0.0) > 0 for linear in linears)
        return recomputed(call, x, tuple(p for linear in linears for p in linear.parameters()), random)


def project_together(linears: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several projections of one input, without IA3's factors on outputs, which attention folds into q and into its own output."""
    specs = [linear_spec(linear) for linear in linears]
    if (outputs := joined(specs, x)) is not None:
        return outputs
    return tuple(linear(x) if spec is None else spec.apply_without_output_scale(x) for linear, spec in zip(linears, specs))


def joined(specs: list[LinearSpec | None], x: Tensor) -> tuple[Tensor, ...] | None:
    """The outputs of several linear layers of one input, without IA3's factors on them, by one op; None where they do not join."""
    if not _joins(specs, x):
        return None
    return lora_linears(x, [spec.projection for spec in specs], max(spec.dropout_p for spec in specs))


def _joins(specs: list[LinearSpec | None], x: Tensor) -> bool:
    """Whether the projections run as one op: with LoRA its products then share x. What is trained without LoRA joins too where backward
    can form x again: as one op it does so once, and keeps nothing."""
    if any(spec is None or spec.input_scale is not None for spec in specs):
        return False
    low_rank = [spec for spec in specs if spec.projection.lora_A is not None]
    if low_rank:
        return len({spec.dropout_p for spec in low_rank}) == 1
    return any(spec.projection.weight.requires_grad for spec in specs) and torch.is_grad_enabled() and recipe_of(x) is not None


def project(linears: tuple[nn.Linear, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several projections of one input, each as its own ``forward`` gives it."""
    return tuple(rescaled(linear, y) for linear, y in zip(linears, project_together(linears, x)))


def project_one(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)``, saving nothing for a trained weight where backward can form ``x`` again."""
    return project((linear,), x)[0]


def output_factor(linear: nn.Module) -> Tensor | None:
    """IA3's factor on the output, [out], which :func:`project_together` leaves to its caller."""
    spec = linear_spec(linear)
    return None if spec is None else spec.output_scale


def rescaled(linear: nn.Module, y: Tensor) -> Tensor:
    """``y``, a projection that :func:`project_together` made, with IA3's factor on it where ``linear`` has one."""
    factor = output_factor(linear)
    return y if factor is None else ops.rescale(y, factor)


def key_value_rescale(key: nn.Linear, value: nn.Linear, heads: int) -> tuple[Tensor, Tensor] | None:
    """IA3's (l_k, l_v), each [H, d], as attention takes them; None where neither has one."""
    l_k, l_v = (output_factor(linear) for linear in (key, value))
    if l_k is None and l_v is None:
        return None
    l_k, l_v = (torch.ones_like(l_v) if l_k is None else l_k), (torch.ones_like(l_k) if l_v is None else l_v)
    return l_k.view(heads, -1), l_v.view(heads, -1)
