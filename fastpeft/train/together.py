"""Several runs on one base, a step of each in turn: one process, one base in memory, one cache of what is constant.

A :class:`fastpeft.Trainer` is a run by itself; this steps several. Each has a model of its own on the memory of one base
(:func:`fastpeft.models.shared_base.on_base_of`), its own batches, optimiser, random numbers and folder, and so ends with the numbers of the
same run alone. The run that is furthest behind goes next: runs of the same batches meet each of them one after the other, and after a
resumption from checkpoints of different steps those behind catch up.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Generator, Mapping
from typing import Any

import torch

from fastpeft.progress import progress_bar
from fastpeft.train.interrupts import Interrupted, StopBetweenSteps
from fastpeft.train.trainer import Trainer

Turns = Generator[None, None, dict[str, Any]]


class Together:
    """Runs by name. ``summaries`` of those that are through, ``failed``: the error of each that ended early. A run that has ended is let
    go: of its memory nothing is kept here."""

    def __init__(self, trainers: Mapping[str, Trainer]):
        check(trainers)
        self.trainers = dict(trainers)
        self.steps = {name: trainer.done["step"] for name, trainer in trainers.items()}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        for caches in {id(trainer.caches): trainer.caches for trainer in trainers.values()}.values():
            caches.divide_memory()
        every = sum(map(own_bytes, trainers.values()))
        for trainer in trainers.values():
            if trainer.budget is not None:
                trainer.budget.others = every - own_bytes(trainer)

    def fit(self, progress: bool = True) -> None:
        """Train all to their last steps. A run that fails (numbers that are not finite, no memory, a full disk) ends alone, as it would
        have ended by itself, and the others go on.

        What is wrong with a run before its first step, such as a folder that holds another, is raised for all. Signals end all, each with
        a checkpoint, as :class:`Interrupted`; so does a data worker's death, which no run can tell from its own worker's."""
        for trainer in self.trainers.values():
            trainer.caches.progress = progress
        shown = {"desc": f"training {len(self.trainers)} adapters", "unit": "step", "disable": not progress}
        with StopBetweenSteps() as stop, progress_bar(total=sum(t.total_steps for t in self.trainers.values()), **shown) as bar:
            turns = {name: trainer.turns(stop) for name, trainer in self.trainers.items()}
            try:
                for name in list(turns):
                    try:
                        self._turn(name, turns)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None
                while turns:
                    name = min(turns, key=lambda name: self.trainers[name].done["batches"])
                    try:
                        self._turn(name, turns)
                    except ChildProcessError:
                        raise
                    except Exception as error:
                        self._drop(name, turns, error)
                        stop.busy = False
                    bar.update(sum(self.steps.values()) - bar.n)
            except Interrupted as error:
                raise Interrupted(self._end(turns, stop, error), error.number) from None
            except ChildProcessError as error:
                raise ChildProcessError(f"{error}; {self._end(turns, stop, Interrupted())}") from error
            finally:
                for each in turns.values():
                    each.close()

    def _turn(self, name: str, turns: dict[str, Turns]) -> None:
        """A step of a run, or after the last its end."""
        if (features := self.trainers[name].features) is not None:
            features.reader = name
        try:
            next(turns[name])
        except StopIteration as end:
            self.summaries[name] = end.value
            self.steps[name] = end.value["steps"]
            del turns[name], self.trainers[name]
        else:
            self.steps[name] = self.trainers[name].done["step"]

    def _drop(self, name: str, turns: dict[str, Turns], error: Exception) -> None:
        """Let a run that has failed go, and its memory."""
        self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.warn(f"{name} ended at step {self.trainers[name].done['step'] + 1}, the others go on: {self.failed[name]}", stacklevel=4)
        del turns[name], self.trainers[name]
        error.__traceback__ = error.__context__ = error.__cause__ = None  # their frames hold the step's tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _end(self, turns: dict[str, Turns], stop: StopBetweenSteps, error: Interrupted) -> str:
        """End the runs that have not, each with a checkpoint; returns what to say of all."""
        said = []
        for name, each in turns.items():
            stop.busy = False
            try:
                each.throw(Interrupted(number=error.number))
            except (Interrupted, StopIteration):  # saved; or it was this one that told
                step, saved = self.trainers[name].done["step"], self.trainers[name].saved_step
                said.append(f"{name} after step {step}" + ("" if step in (0, saved) else ", not saved"))
            except Exception as failure:
                said.append(f"{name}, not saved ({failure})")
        return f"stopped: {', '.join(said)}; --resume goes on from there"


def check(trainers: Mapping[str, Trainer]) -> None:
    """ValueError for runs that cannot take turns."""
    folders: dict[Any, str] = {}
    for name, trainer in trainers.items():
        if not trainer.ranks.alone:
            raise ValueError("several adapters in one run are for one process: start it without torchrun")
        if trainer.config.trace or "wandb" in trainer.config.trackers:
            follower = "trace" if trainer.config.trace else "track=wandb"
            raise ValueError(f"{name}: {follower} follows one run of a process, and several take turns here: leave it out")
        other = folders.setdefault(trainer.out and trainer.out.resolve(), name)
        if trainer.out is not None and other != name:
            raise ValueError(f"{other} and {name} would write into one folder, {trainer.out}")


def own_bytes(trainer: Trainer) -> int:
    """What a run holds between its steps beside the base: what is trained, AdamW's moments, and masters of half precision."""
    pairs = trainer.optimizer.pairs
    return sum(p.nbytes + 8 * p.numel() + (master.nbytes if master is not p else 0) for p, master in pairs)
