"""Specification of a linear layer: base weight, LoRA, IA3 factors, dropout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpeft import ops
from fastpeft.ops.lora_linear import Projection, linear


class LinearSpec(NamedTuple):
    """What a linear layer computes, whoever adapted it:
    y = output_scale * (W(input_scale * x) + b + scaling * B A dropout(input_scale * x))."""

    projection: Projection
    dropout_p: float = 0.0
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None

    def apply_without_output_scale(self, x: Tensor) -> Tensor:
        """The output without IA3's factor on it: attention applies that factor to the query side instead (no extra tensor)."""
        x = x if self.input_scale is None else ops.rescale(x, self.input_scale)
        if self.projection.lora_A is None:
            return linear(x, self.projection.weight, self.projection.bias)
        return ops.lora_linear(x, *self.projection, self.dropout_p)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.apply_without_output_scale(x)
        return y if self.output_scale is None else ops.rescale(y, self.output_scale)
