"""Signals that end a run between two steps, and the lock on a run's folder."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
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
    has begun: weights, optimiser and random state then belong together. Under nohup SIGHUP stays ignored. Outside the main
    thread, where Python sets no handlers, it does nothing."""

    def __init__(self):
        self.busy, self.asked = False, 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in SIGNALS if n != NOHUP or signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

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


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """The folder is this process's alone while it runs, and is free when it ends, however it ends. ValueError where another process has
    it. Where the system or the file system has no such locks, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        fcntl = None
    if folder is None or fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process{_holder(number)} is running in {folder}: wait for it, or choose another --out") from None
        except OSError:
            pass
        _held.add(number)
        yield
    finally:
        _held.discard(number)
        os.close(number)


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child, such as a data worker: the lock is its parent's, and ends with it."""
    for number in _held:
        os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _holder(number: int) -> str:
    """Which process holds the lock, where Linux says so."""
    wanted = os.fstat(number).st_ino
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and int(words[5].split(":")[2]) == wanted:
                return f" (pid {words[4]})"
    return ""
