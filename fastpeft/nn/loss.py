"""Linear head and cross entropy in one, without the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.nn.linear import on_parameters_of


class LinearCrossEntropy(nn.Linear):
    """``F.cross_entropy(F.linear(hidden, weight, bias), labels)`` without the logits of every position; unlabelled ones cost nothing.

    hidden [..., in_features], labels [...] int64 -> a scalar, or losses of labels' shape for reduction "none"; float32 or wider.
    State: ``weight`` [num_classes, in_features], ``bias`` [num_classes], as a linear head's: :meth:`from_linear` shares one.
    ignore_index, label_smoothing and reduction ("mean", "sum", "none") as ``torch.nn.CrossEntropyLoss``. ValueError or TypeError where
    arguments do not fit.

    >>> head = LinearCrossEntropy(8, 5)
    >>> head(torch.zeros(2, 3, 8), torch.full((2, 3), 4)).dim()
    0
    >>> head.logits(torch.zeros(2, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, num_classes, bias, device=device, dtype=dtype)
        self._set(ignore_index, label_smoothing, reduction)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> LinearCrossEntropy:
        """The loss on the parameters of ``linear`` themselves, a model's head. TypeError for a module that computes something else."""
        head = on_parameters_of(linear, cls)
        head._set(ignore_index, label_smoothing, reduction)
        return head

    def _set(self, ignore_index: int, label_smoothing: float, reduction: str) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"LinearCrossEntropy: reduction={reduction!r}; use 'mean', 'sum' or 'none'")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"LinearCrossEntropy: label_smoothing is {label_smoothing}; it lies between 0 and 1")
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [..., in_features], labels [...] -> the loss."""
        how = (self.ignore_index, self.label_smoothing, self.reduction)
        return ops.linear_cross_entropy(hidden, self.weight, self.bias, labels, *how)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., in_features] -> logits [..., num_classes], for evaluation."""
        return super().forward(hidden)

    def extra_repr(self) -> str:
        how = f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        return f"in_features={self.in_features}, num_classes={self.out_features}, bias={self.bias is not None}, {how}"
