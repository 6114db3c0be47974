"""Signals that end a run between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

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
    handlers, it does nothing."""

    def __init__(self):
        self.busy, self.asked = False, 0
        self.before: dict[int, Any] = {}
        self._worker_died = False

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
        if self.busy:
            self._worker_died = True
        else:
            self.before[number](number, frame)

    def _handle(self, number, frame) -> None:
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
