"""Layers that every backbone has, on fastpeft's operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from fastpeft import ops
from fastpeft.methods.base import has_hooks
from fastpeft.ops._recompute import recomputed


class Recomputes:
    """A module that can compute its projections again in backward instead of keeping them.

    fastpeft.cost.memory_budget sets ``recompute``. ``observer``, set by fastpeft.cost.activations, runs the
    projections, and records their cost."""

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




class LayerNorm(nn.LayerNorm):
    """LayerNorm that saves what its backward will need and nothing else; float32 statistics in every dtype."""

    layout_aware = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    @staticmethod
    def why_not(module: nn.LayerNorm) -> str:
        """'' or why this one stays as it is."""
        if len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} dimensions; the fused form takes the last one"
        return "" if module.weight is not None and module.bias is not None else "has no affine parameters"


class Dropout(nn.Dropout):
    """Dropout that keeps a seed for backward instead of a mask."""

    layout_aware = True

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return ops.dropout(x, self.p, self.training)

    @staticmethod
    def why_not(module: nn.Dropout) -> str:
        """'' or why this one stays as it is."""
        return "works in place" if module.inplace else "drops everything" if module.p == 1 else ""


class GELU(GELUActivation):
    """GELU whose output the linear layer after it need not keep."""

    layout_aware = True

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return ops.gelu(x) if self.act is F.gelu else super().forward(x)

    @staticmethod
    def why_not(module: GELUActivation) -> str:
        """'' or why this one stays as it is."""
        return "" if module.act is F.gelu else "is written out in Python (use_gelu_python)"


# PyTorch's or transformers' class -> ours
SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.Dropout: Dropout, GELUActivation: GELU}


def is_layer_norm(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``ops.layer_norm`` does with its weight, bias and eps, so that the layer around it may."""
    return type(module) in (nn.LayerNorm, LayerNorm) and not LayerNorm.why_not(module) and not has_hooks(module)
