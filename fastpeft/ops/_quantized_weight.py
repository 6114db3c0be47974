"""Quantised weights, dequantised when an op multiplies by them.

A linear op dequantises such a weight when it multiplies, once in forward and once in backward; autograd saves no copy of it. Backward
dequantises none where the input needs no gradient. A quantised weight is frozen: it has no gradient of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


class QuantizedWeight:
    """A frozen weight [out, in]; a subclass says how it is dequantised."""

    requires_grad = False
    shape: torch.Size

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that ops multiply by, dequantised into a new tensor of ``dtype``."""
        raise NotImplementedError(f"{type(self).__name__} must define dense(dtype), which dequantises its weight")


def dequantized(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """A weight as ops take it."""
    return weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight


def shape_placeholder(weight: Tensor | QuantizedWeight, like: Tensor) -> Tensor:
    """What stands for ``weight`` where only its shape is read."""
    return like.new_zeros(()).expand(weight.shape) if isinstance(weight, QuantizedWeight) else weight
