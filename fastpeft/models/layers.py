"""PyTorch's own layers on fastpeft's operators."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft import ops


class LayerNorm(nn.LayerNorm):
    """LayerNorm that saves what its backward will need and nothing else; float32 statistics in every dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Dropout(nn.Dropout):
    """Dropout that keeps a seed for backward instead of a mask."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return ops.dropout(x, self.p, self.training)


# PyTorch's class -> ours
SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.Dropout: Dropout}


def supports_layer_norm(module: nn.LayerNorm) -> str:
    """'' or why this norm stays as it is."""
    if len(module.normalized_shape) != 1:
        return f"normalises {len(module.normalized_shape)} dimensions; the fused form takes the last one"
    return "" if module.weight is not None and module.bias is not None else "has no affine parameters"
