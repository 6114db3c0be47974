"""Devices: which one to use, and how a batch gets there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def choose_device(name: str | None = None) -> torch.device:
    """The device called ``name``; None: CUDA where there is one. ValueError where it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each backend raises another type
        there = "cuda or cpu" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"device {name!r} cannot be used here (use {there}): {str(error).splitlines()[0]}") from None
    return torch.device(name)


def to_device(
    batch: Mapping[str, Any], names: Iterable[str], device: torch.device, dtype: torch.dtype, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """The tensors of ``names`` that the batch has, on ``device``; floating-point ones in ``dtype``. Those that ``model`` reads on the host
    (its ``host_inputs``: masks, labels, indices) stay there, so that a step does not wait for the device to send them back."""
    stay = getattr(model, "host_inputs", ())
    moved = {n: batch[n] if n in stay else batch[n].to(device, non_blocking=True) for n in names if batch.get(n) is not None}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in moved.items()}
