"""Faults of a step: numbers that are not finite, and memory that does not suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.train.loading import names_of
from fastpeft.train.state import random_state, set_random_state
from fastpeft.train.step import Passed, Step

IN_A_ROW = 10  # steps that are skipped before the run ends all the same


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
            wrong = found or [f"gradient of {name}" for name, p in step.model.named_parameters() if p.grad is not None and _bad(p.grad)]
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
