"""Saving of a run: its adapter and checkpoint, at once or (``async_save``) from a copy, by a thread beside training."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastpeft.adapters import adapter_state, write_adapter
from fastpeft.files import sync
from fastpeft.train.state import run_state, write_state


class Saver:
    """Writes ``adapter/`` and ``checkpoint/`` of a trainer's run, each atomically, the adapter first.

    With ``async_save`` a save copies what is trained to the host and returns; a thread writes it as it would be written at once, and the
    next save, or the end of the run, waits for it. What the thread could not write is raised there.
    """

    def __init__(self, trainer):
        self.trainer, self.beside = trainer, trainer.config.async_save
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._fixed: tempfile.TemporaryDirectory | None = None  # tokenizer files: no other thread may use a tokenizer meanwhile

    def save(self, rng: dict[str, Any] | None = None) -> None:
        """Save the run as it stands. ``rng``: the random state to save (None: now)."""
        self.wait()
        trainer = self.trainer
        adapter = adapter_state(trainer.model, self._description(), copy=self.beside)
        progress = {"done": trainer.done, "identity": trainer.identity, "config": asdict(trainer.config)}
        state = run_state(trainer.model, trainer.optimizer, progress, rng, copy=self.beside)
        more, out, keep = self._more(), trainer.out, trainer.config.keep_checkpoints

        def write() -> None:
            sync(out / "metrics.jsonl")  # a checkpoint's steps have their rows, whatever happens
            write_adapter(adapter, out / "adapter", more)
            write_state(out / "checkpoint", state, keep)

        if not self.beside:
            return write()
        self._thread = threading.Thread(target=self._run, args=(write,), name="fastpeft-save")
        self._thread.start()

    def save_adapter(self, name: str) -> None:
        """Write the adapter alone, at once, into this folder of the run."""
        self.wait()
        write_adapter(adapter_state(self.trainer.model, self._description()), self.trainer.out / name, self.trainer.dataset.save)

    def finish(self, later: Callable[[], AbstractContextManager]) -> None:
        """The last checkpoint, then the adapter of the best validation where there was one; ``later``: what a signal does not interrupt."""
        trainer = self.trainer
        if trainer.out:
            with later():
                trainer.save()
        with later():
            self.wait()
            trainer.end_with_best()
            if trainer.out and trainer.done["validation"].get("best_step") is not None:
                self.save_adapter("adapter")

    def wait(self) -> None:
        """Until what is being saved is on the disk. OSError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._failure = error

    def _description(self) -> dict[str, Any]:
        lineage = {"started_from": self.trainer.started_from} if self.trainer.started_from else {}
        return self.trainer.dataset.describe() | lineage

    def _more(self) -> Callable[[Path], None]:
        """Writes what lies beside an adapter's tensors."""
        if not self.beside:
            return self.trainer.dataset.save
        if self._fixed is None:
            self._fixed = tempfile.TemporaryDirectory(prefix="fastpeft-")
            self.trainer.dataset.save(Path(self._fixed.name))
        return partial(_copy, self._fixed.name)


def _copy(kept: str, folder: Path) -> None:
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    except shutil.Error as error:  # a list of all that could not be copied
        raise OSError(f"{folder} cannot be written: {error.args[0][0][2]}") from None
