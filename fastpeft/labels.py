"""Labels of a language model: the one that no loss counts, and the one that each position is to predict."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # PyTorch's default for ``ignore_index``


def next_labels(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """[B, L]: what each position is to predict, ignore_index where nothing; ``shift_labels`` are already that."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
