"""A run's rows, one a step, from when a step has ended to when its loss is known, logged and told."""

from __future__ import annotations

import math
import time
from typing import Any

from fastpeft.train.metrics import MetricsLog
from fastpeft.train.state import random_state
from fastpeft.train.summary import WINDOW


class Rows:
    """Of a trainer. ``waiting``: rows of steps that are not yet logged."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.waiting: list[dict[str, Any]] = []

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
            self.waiting = []
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
        changed nothing."""
        unread = [row for row in self.waiting if row["loss"] is None and "skipped" not in row]
        for row, (loss, norm) in zip(unread, self.trainer.step.read()):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
                raise FloatingPointError(f"{what} at step {row['step']}: lower learning_rate, or use fp32")
            row |= {"loss": loss, "grad_norm": norm}
            self.enter(loss)

    def enter(self, loss: float) -> None:
        """A step's loss into the run's first and last ones."""
        done = self.trainer.done
        done["first_losses"] = (done["first_losses"] + [loss])[:WINDOW]
        done["last_losses"] = (done["last_losses"] + [loss])[-WINDOW:]
