"""Dropout and GELU on fastpeft's operators: leaves that every backbone has."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from fastpeft import ops
from fastpeft.registry import fuses


@fuses("torch.nn.modules.dropout.Dropout")
class FusedDropout:
    """Dropout that keeps a seed for backward instead of a mask."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.dropout(input, self.p, self.training)

    @staticmethod
    def why_not(module: nn.Dropout) -> str:
        """'' or why this one stays as it is."""
        return "works in place" if module.inplace else "drops everything" if module.p == 1 else ""


@fuses("transformers.activations.GELUActivation")
class FusedGELU:
    """GELU whose output the linear layer after it need not keep."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input of any shape."""
        return ops.gelu(input) if self.act is F.gelu else super().forward(input)

    @staticmethod
    def why_not(module: GELUActivation) -> str:
        """'' or why this one stays as it is."""
        return "" if module.act is F.gelu else "is written out in Python (use_gelu_python)"
