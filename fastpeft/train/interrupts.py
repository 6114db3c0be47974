"""Signals that end a run between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from fastpeft.ranks import ALONE, Ranks
from fastpeft.train.state import random_state, set_random_state

T = TypeVar("T")

# Ctrl-C; kill, a container's or a queue's end; a closed terminal; Slurm's warning (sbatch --signal=USR1@60)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
NOHUP = getattr(signal, "SIGHUP", None)  # what nohup ignores


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal; ``exit_status``: what a shell expects of a process that it ended (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, message: str = "", number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number

    @property
    def exit_status(self) -> int:
        return 128 + self.number


class StopBetweenSteps:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 as :class:`Interrupted`, at once while waiting for data, but only after a step, or a save, that
    has begun: weights, optimiser and random state then belong together. A data worker's death, which torch raises from a handler wherever
    the run stands, waits as well (:meth:`hold_workers`). Under nohup SIGHUP stays ignored. Outside the main thread, where Python sets no
    handlers, it does nothing.

    Of several ranks all end after the same step, whichever of them has the signal: inside ``together`` it is only :meth:`heard`, and
    what :meth:`agree` was told that ranks have heard ends the next ``later``."""

    def __init__(self, ranks: Ranks = ALONE):
        self.busy, self.asked, self.ranks = False, 0, ranks
        self.own, self.in_step = 0, False  # the signal this rank has heard; whether it waits for the others
        self.before: dict[int, Any] = {}
        self._worker_died = self._ending = False

    def __enter__(self) -> StopBetweenSteps:
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in SIGNALS if n != NOHUP or signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def hold_workers(self) -> None:
        """Once torch has set its handler of SIGCHLD, which it does for the first data worker: call it between steps only."""
        number = getattr(signal, "SIGCHLD", None)
        if number is None or number in self.before or threading.current_thread() is not threading.main_thread():
            return
        if callable(theirs := signal.getsignal(number)):
            self.before[number] = theirs
            signal.signal(number, self._child)

    def _child(self, number, frame) -> None:
        if self.busy or self._ending:
            self._worker_died = True
        else:
            self.before[number](number, frame)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """While a run that ends is saved no worker's death is raised: whoever sends a signal to all processes ends the workers, too."""
        before, self._ending = self._ending, True
        try:
            yield
        finally:
            self._ending = before

    def heard(self) -> list[float]:
        """For each of SIGNALS 1 if it has come to this rank; to be added up over ranks."""
        return [float(number == self.own) for number in SIGNALS]

    def agree(self, heard: list[float]) -> None:
        """Ask for the end that any rank has heard of. Alone there is nothing to agree on."""
        if not self.ranks.alone:
            self.asked = next((int(number) for number, count in zip(SIGNALS, heard) if count), 0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Steps that all ranks take together; a signal that was not agreed on in the last ends the process after it."""
        self.in_step = not self.ranks.alone
        try:
            yield
        finally:
            self.in_step = False
        if self.own:
            raise Interrupted(number=self.own)

    def _handle(self, number, frame) -> None:
        if self.in_step:
            self.own = self.own or number
            return
        if not self.busy or self.asked:
            raise Interrupted(number=number)
        self.asked = number

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """What runs inside is not interrupted, except by a second signal; ``busy`` then stays, as it does on any error."""
        self.busy = True
        yield
        self.busy = False
        if self.asked:
            raise Interrupted(number=self.asked)
        if self._worker_died:
            self._worker_died = False
            self.before[signal.SIGCHLD](signal.SIGCHLD, None)


def halt(alone: bool) -> Iterator[None]:
    """Halts a run in turns once; unless it is ``alone``, its random numbers go on afterwards as if there had been no halt."""
    numbers = None if alone else random_state()
    try:
        yield
    finally:
        if numbers is not None:
            set_random_state(numbers)


def to_the_end(turns: Generator[None, None, T]) -> T:
    """What a run in turns returns, taken through without a halt."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value
