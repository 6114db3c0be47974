"""Ctrl-C and SIGTERM between the steps of a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any


class StopBetweenSteps:
    """Ctrl-C and SIGTERM as KeyboardInterrupt, at once while waiting for data, but only after a step that has begun: weights, optimiser
    and random state then belong together. Outside the main thread, where Python sets no handlers, it does nothing."""

    def __init__(self):
        self.busy = self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if not self.busy or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def later(self):
        """What runs inside is not interrupted, except by a second signal; ``busy`` then stays, as it does on any error."""
        self.busy = True
        yield
        self.busy = False
        if self.asked:
            raise KeyboardInterrupt
