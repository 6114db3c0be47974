"""Steps of static shapes: all sizes are known before, and nothing in the step is read from the device.

Inside ``with static_shapes(sizes, seeds)`` a batch's masks, labels and indices lie on the device. What otherwise depends on their values
(how many tokens are real, how many are labelled) is given as :class:`Sizes`: at least as many; what goes beyond is padding that is computed
and reaches no loss. Such a step runs the same kernels on the same addresses whatever a batch holds: a CUDA graph of it can be replayed.
Forward and backward both belong inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class NotStatic(RuntimeError):
    """A step needs something that is only known on the device; says what."""


class Sizes(NamedTuple):
    """``tokens`` of input_ids and ``answers`` of decoder_input_ids that are computed, ``labelled`` positions that the loss reads;
    ``questions_per_image``: at most so many samples share an image (1: sample b sees image b); ``images``: "none", "some" or "every" of the
    samples has one. Masks have their padding on the right."""

    tokens: int
    answers: int
    labelled: int
    questions_per_image: int
    images: str


class Seeds:
    """Seeds of dropout, drawn on the device: the same for the same ``seed``, step (:meth:`start`) and place in it (:meth:`advance`)."""

    AT_ONCE = 1024
    PLACES = 1 << 20  # of batches in a step

    def __init__(self, seed: int, device: torch.device):
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.seed, self.drawn, self.used = int(mixed(torch.tensor(seed))), None, 0  # mixed: no step of a run is one of another's

    def start(self, step: int) -> None:
        """Of the step's batches, the next is the first."""
        self.counter.fill_(step * self.PLACES)

    def advance(self) -> None:
        """To the step's next batch."""
        self.counter.add_(1)
        self.drawn, self.used = None, 0

    def next(self) -> Tensor:
        """An int64 seed, [1], on the device."""
        at = self.used % self.AT_ONCE
        if at == 0:
            number = torch.arange(self.used, self.used + self.AT_ONCE, device=self.counter.device)
            self.drawn = mixed(mixed(self.counter + self.seed) + number) >> 33 & 0x3FFFFFFF
        self.used += 1
        return self.drawn[at : at + 1]


def mixed(z: Tensor) -> Tensor:
    """int64 -> int64: splitmix64's finaliser, one-to-one, in the arithmetic modulo 2^64 that int64 has.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (2014), with Stafford's constants (mix 13)."""
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return z ^ (z >> 31 & 0x1FFFFFFFF)


_now: tuple[Sizes, Seeds] | None = None  # of the process, not of a thread: on a GPU backward runs in another


def sizes() -> Sizes | None:
    """Of the static step that runs; None in any other."""
    return None if _now is None else _now[0]


def device_seed() -> Tensor | None:
    """The next seed of the static step that runs; None in any other."""
    return None if _now is None else _now[1].next()


@contextmanager
def static_shapes(sizes: Sizes, seeds: Seeds) -> Iterator[None]:
    global _now
    before, _now = _now, (sizes, seeds)
    try:
        yield
    finally:
        _now = before


def first_rows(wanted: Tensor, n: int) -> Tensor:
    """[n] int64: where ``wanted`` [M] bool holds, in order, and then where it does not; n of at least as many as hold, of at most M."""
    return (~wanted).to(torch.uint8).argsort(stable=True)[:n]
