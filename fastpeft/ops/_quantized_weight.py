"""Quantised weights, dequantised when an op multiplies by them.

A linear op forms such a weight when it multiplies, in forward and once more in backward, and lets it go in between: autograd keeps no copy
of it, and where no gradient of the input is asked for backward forms none. A held weight is frozen: it has no gradient of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


class QuantizedWeight:
    """A frozen weight [out, in]; a subclass says how it is formed."""

    requires_grad = False
    shape: torch.Size

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that ops multiply by, formed anew in ``dtype``."""
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is formed")


def dequantized(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """A weight as ops take it."""
    return weight.dense(dtype) if isinstance(weight, QuantizedWeight) else weight


def shape_placeholder(weight: Tensor | QuantizedWeight, like: Tensor) -> Tensor:
    """What stands for ``weight`` where only its shape is read."""
    return like.new_zeros(()).expand(weight.shape) if isinstance(weight, QuantizedWeight) else weight
