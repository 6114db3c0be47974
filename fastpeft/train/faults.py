"""Faults of a step: numbers that are not finite, and memory that does not suffice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.train.loading import names_of
from fastpeft.train.state import random_state, set_random_state
from fastpeft.train.step import Passed, Step

IN_A_ROW = 10  # steps that are skipped before the run ends all the same


class Faults:
    """What a trainer does about a step's faults."""

    def __init__(self, trainer):
        self.trainer = trainer

    def passes(self, batches: list[dict], whole: int, before: dict[str, Any]) -> Passed:
        """A group's forwards and backwards; from the first that memory does not suffice for, on batches half as large: the same samples
        and gradients in each step, so that only rounding, and dropout's draws, differ. Of several ranks, which take their steps together,
        the error ends the run."""
        trainer, done = self.trainer, self.trainer.done
        measured = done["cost"] is None
        if not trainer.ranks.alone:
            return trainer.step.passes(batches, measured=measured)
        if done["half_batches"]:
            return trainer.step.passes(self._halves(whole), measured=measured)
        passed, halved = passes_in_memory(trainer.step, batches, before, lambda: self._halves(whole), measured=measured)
        if halved:
            done["half_batches"] = done["step"] + 1
            note = f"out of memory at step {done['step'] + 1}: from there on batches are halved, and each step's samples stay the same"
            self._say(note)
        return passed

    def _halves(self, whole: int) -> list[dict]:
        trainer, first = self.trainer, self.trainer.done["batches"]
        return [half for at in range(first, first + whole) for half in trainer.loading.halves(at)]

    def not_finite(self, error: FloatingPointError, batches: list[dict], whole: int, before: dict[str, Any]) -> dict[str, Any]:
        """What a step without an update adds to its row, where ``on_nan`` says so; else FloatingPointError that names batch and module.
        Several ranks find the same together, and look for neither."""
        trainer, done, on_nan = self.trainer, self.trainer.done, self.trainer.config.on_nan
        what = f"{error} at step {done['step'] + 1}"
        if trainer.ranks.alone:
            again = self._halves(whole) if done["half_batches"] else batches
            what += f" {where_not_finite(trainer.step, again, before)}"
        clear(trainer.step)
        done["skipped"] += 1
        done["skipped_in_a_row"] += 1
        if on_nan == "stop" or done["skipped_in_a_row"] > IN_A_ROW:
            many = f" ({IN_A_ROW} steps before it were skipped)" if on_nan == "skip" else ""
            done["skipped"] -= 1
            done["skipped_in_a_row"] -= 1
            raise FloatingPointError(f"{what}{many}: lower learning_rate, or use fp32") from None
        if done["skipped"] <= IN_A_ROW:
            self._say(f"skipped: {what}")
        return {"loss": None, "learning_rate": None, "grad_norm": None, "skipped": str(error)}

    def _say(self, note: str) -> None:
        self.trainer.notes.append(note)
        warnings.warn(note, stacklevel=3)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of the device or of this machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "allocate memory", "not enough memory"))


def passes_in_memory(
    step: Step, batches: list[dict], before: dict[str, Any], halves: Callable[[], list[dict]] | None, *, measured: bool
) -> tuple[Passed, bool]:
    """``step.passes``; where memory does not suffice, once more on ``halves()``, the same samples in batches half as large, from the random
    state ``before``. Also whether that was needed. ``halves`` None: the error is raised."""
    try:
        return step.passes(batches, measured=measured), False
    except (RuntimeError, MemoryError) as error:
        if halves is None or not out_of_memory(error) or all(len(batch["samples"]) == 1 for batch in batches):
            raise
    clear(step)  # out here: the error's frames would keep the activations
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    set_random_state(before)
    return step.passes(halves(), measured=measured), True


def clear(step: Step) -> None:
    """Drop the gradients of a step that is not taken."""
    for p, master in step.optimizer.pairs:
        p.grad = master.grad = None


def where_not_finite(step: Step, batches: list[dict], before: dict[str, Any]) -> str:
    """Runs a group's batches again, each by itself, from the random state ``before``; names the samples of the first with a number that is
    not finite, and the first module that put one out, or else the parameters whose gradients hold one. Leaves gradients cleared and the
    random state as it was."""
    after = random_state()
    set_random_state(before)
    clear(step)
    try:
        for batch in batches:
            with _watched(step.model) as found:
                loss = step.passes([batch], measured=False).loss
            bad = {id(p) for p, grad in step.gradients_left() if grad is not None and _bad(grad)}
            wrong = found or [f"gradient of {name}" for name, p in step.model.named_parameters() if id(p) in bad]
            clear(step)
            if wrong or not math.isfinite(loss):
                first = f"the first output that is not finite is {found[0]}" if found else f"not finite: {[*wrong, 'the loss'][0]}"
                return f"in the batch of {', '.join(names_of(batch['samples']))}; {first}"
        return "which a second run of the step's batches does not show"
    finally:
        clear(step)
        set_random_state(after)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose outputs held what is not finite, in the order in which they came."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not found and any(_bad(t) for t in _tensors(output)):
                own = [n for n, p in module.named_parameters(recurse=False) if _bad(p)]
                found.append(f"that of {name or type(module).__name__}" + (f", whose {own[0]} is not finite itself" if own else ""))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.detach().isfinite().all())


def _tensors(output: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif depth < 3 and isinstance(output, list | tuple | dict):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value, depth + 1)
