"""A run's rows, one a step, from when a step has ended to when its loss is known, logged and told."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

from fastpeft.train.metrics import MetricsLog
from fastpeft.train.state import random_state
from fastpeft.train.summary import WINDOW


class Begun(NamedTuple):
    """Where a run stood when it began a step: of what it had ``done`` what a step moves on, its random state, and the step's batches."""

    done: dict[str, int]
    random: dict[str, Any]
    batches: int


class Rows:
    """Of a trainer. ``waiting``: rows of steps that are not yet logged; ``begun``: where each began."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.waiting: list[dict[str, Any]] = []
        self.begun: list[Begun] = []

    def begin(self, random: dict[str, Any], batches: int) -> None:
        """A step of so many batches."""
        done = self.trainer.done
        self.begun.append(Begun({name: done[name] for name in ("step", "batches", "samples", "tokens")}, random, batches))

    def due(self) -> bool:
        """Whether the losses of the steps so far are read now: waiting for the device costs time, so every few steps where it can be put
        off, before a validation, and at the end."""
        trainer, done = self.trainer, self.trainer.done
        validates = trainer.validation is not None and trainer.validation.due(done["step"], trainer.total_steps)
        return validates or len(self.waiting) >= trainer.step.reads_every or done["batches"] >= trainer.total_batches

    def log(self, log: MetricsLog, began: float, whole: bool = True) -> None:
        """The steps since ``began``, each with an equal share of the seconds; the last with a validation, where one is due. ``whole``: no
        later step has begun, so that what fails from here on may be saved."""
        trainer, rows = self.trainer, self.waiting
        try:
            self.settle()
        finally:
            self.waiting, self.begun = [], []
            seconds = (time.perf_counter() - began) / max(1, len(rows))
            for row in rows[:-1]:
                if row["loss"] is not None or "skipped" in row:
                    self._tell(log, row, seconds)
        for row in rows[-1:]:
            row |= trainer.validate()
            trainer._before = random_state() if trainer.out and whole else trainer._before
            self._tell(log, row, seconds)

    def _tell(self, log: MetricsLog, row: dict[str, Any], seconds: float) -> None:
        log.log(row, seconds)
        self.trainer.followers.step(row)

    def settle(self) -> None:
        """Enters the losses of steps whose losses were left on the device. FloatingPointError where one is not finite: what came after it
        changed nothing, and the run stands before that step again."""
        unread = [i for i, row in enumerate(self.waiting) if row["loss"] is None and "skipped" not in row]
        for i, (loss, norm) in zip(unread, self.trainer.step.read()):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._back_to(i, f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}")
            self.waiting[i] |= {"loss": loss, "grad_norm": norm}
            self.enter(loss)

    def _back_to(self, i: int, what: str) -> None:
        """FloatingPointError, as a step whose loss is read at once raises it: where its batches were, what is saved."""
        trainer, begun = self.trainer, self.begun[i]
        self.waiting, self.begun = self.waiting[:i], self.begun[:i]
        trainer.done |= begun.done
        trainer._before = begun.random if trainer.out else None
        trainer.step.give_up("a number that is not finite is looked for")
        first = begun.done["batches"]
        batches = [part for at in range(first, first + begun.batches) for part in trainer.loading.again(at)]
        trainer.faults.not_finite(FloatingPointError(what), batches, begun.batches, begun.random)

    def enter(self, loss: float) -> None:
        """A step's loss into the run's first and last ones."""
        done = self.trainer.done
        done["first_losses"] = (done["first_losses"] + [loss])[:WINDOW]
        done["last_losses"] = (done["last_losses"] + [loss])[-WINDOW:]
