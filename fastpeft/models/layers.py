"""PyTorch's own layers on fastpeft's operators."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft import ops


class LayerNorm(nn.LayerNorm):
    """LayerNorm that saves what its backward will need and nothing else; float32 statistics in every dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def supports_layer_norm(module: nn.LayerNorm) -> str:
    """'' or why this norm stays as it is."""
    if len(module.normalized_shape) != 1:
        return f"normalises {len(module.normalized_shape)} dimensions; the fused form takes the last one"
    return "" if module.weight is not None and module.bias is not None else "has no affine parameters"
