"""One step of training: forward and backward of a group of batches, and the update."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.cost.memory_budget import MemoryBudget
from fastpeft.cost.profile import StepCost, measure
from fastpeft.device import to_device
from fastpeft.features.cache import FeatureCache
from fastpeft.fused.head.loss import token_losses
from fastpeft.ranks import ALONE, Ranks
from fastpeft.train.gradients import GradientSum
from fastpeft.train.optimizer import Optimizer
from fastpeft.train.sources import SourceLosses


class Passed(NamedTuple):
    """What a group's forward and backward left: the loss, its parts by data set, what the first batch cost (where it was measured)."""

    loss: float | None  # None: it is read later
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
        ranks: Ranks = ALONE,
    ):
        self.model, self.dataset, self.optimizer, self.inputs = model, dataset, optimizer, inputs
        self.device, self.dtype, self.features, self.budget, self.mixed = device, dtype, features, budget, mixed
        self.ranks, self.sums = ranks, GradientSum([master for _, master in optimizer.pairs], ranks)
        self.note, self.reads_every = "", 1

    def start(self, step: int) -> None:
        """Called before the first step, where the run stands at this ``step``."""

    def said(self) -> str:
        """What is to be said of it in the summary, ''."""
        return self.note

    def read(self) -> list[tuple[float, float]]:
        """(loss, norm of the gradient) of steps that left them on the device since the last call."""
        return []

    def passes(self, batches: list[dict], *, measured: bool) -> Passed:
        """Forward and backward of one group of batches, weighted by what their losses are means over, on all ranks; those with "counts"
        False have no weight. ``measured``: the first of them is profiled. The gradients are then on their way to the other ranks, and
        ``sums.finish`` waits for them; loss and its parts are this rank's."""
        loss, cost = 0.0, None
        weights = [self.dataset.weight(batch) if batch.get("counts", True) else 0 for batch in batches]
        (terms,), by_source = self.ranks.sum([sum(weights)]), SourceLosses()
        for batch, weight in zip(batches, weights):
            inputs = self._inputs(batch)
            with measure(self.model) if measured and cost is None else contextlib.nullcontext() as counted:
                with token_losses() if self.mixed else contextlib.nullcontext([]) as recorded:
                    part = self.model(**inputs).loss * (weight / terms)
                part.backward()
            if self.mixed and batch.get("counts", True):
                by_source.add(batch, self.dataset, recorded)
            self.optimizer.collect()
            cost = cost or cost_of(counted, batch)
            loss += float(part.detach())
        self.sums.start()
        return Passed(loss, by_source, cost)

    def give_up(self, reason: str) -> None:
        """Run steps as this class does from now on; ``reason``: what to say of it."""

    def gradients_left(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Of each trained parameter, from the passes since the last update."""
        return [(p, master.grad if p.grad is None else p.grad) for p, master in self.optimizer.pairs]

    def _inputs(self, batch: dict) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        inputs = to_device(batch, self.inputs, self.device, self.dtype, self.model)
        if self.features is not None:
            inputs = self.features.put_in(inputs, batch)
        if self.budget is not None:
            self.budget.fit(inputs)
        return inputs

    def update(self, number: int, loss: float) -> tuple[float, float]:
        """The optimiser's step ``number`` (from 0); returns (highest learning rate, gradient norm before clipping).

        FloatingPointError, with nothing changed, where the loss or that norm is not finite.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return self.optimizer.step(number)


def cost_of(counted: StepCost | None, batch: dict) -> dict[str, Any] | None:
    """As a run keeps it: what a batch cost, and its samples."""
    return None if counted is None else asdict(counted) | {"samples": len(batch["samples"])}
