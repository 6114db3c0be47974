"""LayerNorm and RMSNorm that save what their backward needs and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.ops._common import accumulator


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, with its arguments, state and values; float32 statistics in every dtype (float64 for float64).

    x of any shape that ends in ``normalized_shape``, weight and bias in x's dtype or float32 -> x's shape and dtype. With frozen weights
    backward forms none of their gradients. ValueError or TypeError where shapes or dtypes do not fit.

    >>> LayerNorm(8)(torch.ones(2, 8)).abs().max().item()
    0.0
    """

    takes_flat_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., *normalized_shape] -> the same shape."""
        rows, affine = _rows(self, x, self.weight, self.bias)
        return ops.layer_norm(rows, *affine, self.eps).view(x.shape)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, with its arguments, state and values; float32 statistics in every dtype (float64 for float64), one rounding.

    x of any shape that ends in ``normalized_shape``, weight in x's dtype or float32 -> x's shape and dtype. eps None: the machine epsilon
    of the statistics. ValueError or TypeError where shapes or dtypes do not fit.

    >>> RMSNorm(4, eps=0.0)(torch.full((1, 4), 3.0)).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    takes_flat_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., *normalized_shape] -> the same shape."""
        rows, affine = _rows(self, x, self.weight)
        eps = torch.finfo(accumulator(x.dtype)).eps if self.eps is None else self.eps
        return ops.rms_norm(rows, *affine, eps).view(x.shape)


def _rows(norm: nn.Module, x: Tensor, *affine: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """x and the norm's parameters with the normalised dimensions as one."""
    last = len(norm.normalized_shape)
    if tuple(x.shape[x.dim() - last :]) != tuple(norm.normalized_shape):
        raise ValueError(f"{type(norm).__name__}: x has shape {tuple(x.shape)}; it must end in {tuple(norm.normalized_shape)}")
    if last == 1:
        return x, list(affine)
    return x.flatten(-last), [None if p is None else p.flatten() for p in affine]
