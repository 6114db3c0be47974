"""Layers that every backbone has, on fastpeft's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from fastpeft import ops
from fastpeft.methods.base import watched
from fastpeft.methods.replacement import fuse, fused_names
from fastpeft.ops._remade import recomputed


class Recomputes:
    """A module that can compute its projections again in backward instead of keeping them: fastpeft.train.recompute sets ``recompute``."""

    recompute = False

    def projected(self, call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, linears: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
        """``call(x)``, which runs ``linears``."""
        if not self.recompute:
            return call(x)
        random = any(getattr(linear, "active_dropout", 0.0) > 0 for linear in linears)
        return recomputed(call, x, tuple(p for linear in linears for p in linear.parameters()), random)


class FrozenEvaluates:
    """A model whose parts marked F (``evaluation_only``, their paths) stay as in evaluation: what they compute are constants."""

    def train(self, mode: bool = True):
        super().train(mode)
        for path in getattr(self, "evaluation_only", None) or ():
            self.get_submodule(path).eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A pickle says which modules are fused: their own name the class they replace."""
        return super().__getstate__() | {"fused_names": fused_names(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("fused_names", [])
        super().__setstate__(state)
        fuse(self, names)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that saves what its backward will need and nothing else; float32 statistics in every dtype."""

    layout_aware = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    @staticmethod
    def unfit(module: nn.LayerNorm) -> str:
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
    def unfit(module: nn.Dropout) -> str:
        """'' or why this one stays as it is."""
        return "works in place" if module.inplace else "drops everything" if module.p == 1 else ""


class GELU(GELUActivation):
    """GELU whose output the linear layer after it need not keep."""

    layout_aware = True

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return ops.gelu(x) if self.act is F.gelu else super().forward(x)

    @staticmethod
    def unfit(module: GELUActivation) -> str:
        """'' or why this one stays as it is."""
        return "" if module.act is F.gelu else "is written out in Python (use_gelu_python)"


# PyTorch's or transformers' class -> ours
SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.Dropout: Dropout, GELUActivation: GELU}


def is_layer_norm(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``ops.layer_norm`` does with its weight, bias and eps, so that the layer around it may."""
    return type(module) in (nn.LayerNorm, LayerNorm) and not LayerNorm.unfit(module) and not watched(module)
