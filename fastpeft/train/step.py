"""One step of training: forward and backward of a group of batches, and the update."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.cost.memory_budget import MemoryBudget
from fastpeft.cost.profile import measure
from fastpeft.device import to_device
from fastpeft.features.cache import FeatureCache
from fastpeft.fused.loss import token_losses
from fastpeft.train.optimizer import Optimizer
from fastpeft.train.sources import SourceLosses


class Passed(NamedTuple):
    """What a group's forward and backward left: the loss, its parts by data set, what the first batch cost (where it was measured)."""

    loss: float
    by_source: SourceLosses
    cost: dict[str, Any] | None


class Step:
    """Runs a model on batches as the data set's collator makes them. ``inputs``: the names of those that the model's forward takes;
    ``mixed``: losses are also added up by data set."""

    def __init__(
        self,
        model: nn.Module,
        dataset,
        optimizer: Optimizer,
        inputs: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        *,
        features: FeatureCache | None,
        budget: MemoryBudget | None,
        mixed: bool,
    ):
        self.model, self.dataset, self.optimizer, self.inputs = model, dataset, optimizer, inputs
        self.device, self.dtype, self.features, self.budget, self.mixed = device, dtype, features, budget, mixed

    def passes(self, batches: list[dict], *, measured: bool) -> Passed:
        """Forward and backward of one group of batches, weighted by what their losses are means over; ``measured``: the first of them is
        profiled."""
        loss, cost = 0.0, None
        terms, by_source = sum(map(self.dataset.weight, batches)), SourceLosses()
        for batch in batches:
            inputs = to_device(batch, self.inputs, self.device, self.dtype, self.model)
            if self.features is not None:
                inputs = self.features.put_in(inputs, batch)
            if self.budget is not None:
                self.budget.fit(inputs)
            with measure(self.model) if measured and cost is None else contextlib.nullcontext() as counted:
                with token_losses() if self.mixed else contextlib.nullcontext([]) as recorded:
                    part = self.model(**inputs).loss * (self.dataset.weight(batch) / terms)
                part.backward()
            if self.mixed:
                by_source.add(batch, self.dataset, recorded)
            self.optimizer.collect()
            if counted is not None:
                cost = asdict(counted) | {"samples": len(batch["samples"])}
            loss += float(part.detach())
        return Passed(loss, by_source, cost)

    def update(self, number: int, loss: float) -> tuple[float, float]:
        """The optimiser's step ``number`` (from 0); returns (highest learning rate, gradient norm before clipping).

        FloatingPointError, with nothing changed, where the loss or that norm is not finite.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return self.optimizer.step(number)
