"""Loading of a run's batches: in this process or in workers, whose death or standstill is named."""

from __future__ import annotations

import copy
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastpeft.train.interrupts import SIGNALS
from fastpeft.train.shares import Shares

NAMED = 8  # samples of a batch that a message names


class Loading:
    """Batches of a data set, made by ``collate``, from any of them on: this rank's share of each. ``workers``: processes that load them,
    each with ``timeout`` seconds for a batch."""

    def __init__(self, dataset, shares: Shares, collate: Callable[[list], dict], *, workers: int, timeout: float, pin_memory: bool):
        self.dataset, self.shares, self.sampler, self.collate = dataset, shares, shares.sampler, collate
        self.workers, self.timeout, self.pin_memory = workers, timeout, pin_memory
        self.next = 0  # the batch of the run that is loaded or waited for, from 0
        self._iterator: Any = None

    def epoch_from(self, batch: int) -> Iterator[list[dict]]:
        """The run's batches from this one on to the end of its epoch, each in pieces of a forward; those with "counts" False are not this
        rank's own."""
        epoch, start = divmod(batch, len(self.sampler))
        self.sampler.set_epoch(epoch, start)
        self.dataset.set_epoch(epoch)
        self.next = batch
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.shares,
            collate_fn=self.collate,
            num_workers=self.workers,
            timeout=self.timeout if self.workers else 0,
            worker_init_fn=_leave_signals,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # its own: a resumed run must draw the dropout of an uninterrupted one
        )
        self._iterator = iter(loader)
        for number in range(start, len(self.sampler)):
            every, own = self.shares.forwards(number)
            pieces = [next(self._iterator) | {"counts": at < own} for at in range(every)]
            self.next += 1
            yield pieces

    def indices(self, batch: int) -> list[int]:
        """The samples of a batch of the run."""
        epoch, start = divmod(batch, len(self.sampler))
        sampler = copy.copy(self.sampler)
        sampler.set_epoch(epoch, start)
        return next(iter(sampler))

    def halves(self, batch: int) -> list[dict]:
        """A batch of the run as two of half its samples, or itself where it has one."""
        return self.again(batch, 2)

    def again(self, batch: int, parts: int = 1) -> list[dict]:
        """A batch of the run once more, in so many parts, or fewer where it has fewer samples."""
        indices, dataset = self.indices(batch), copy.copy(self.dataset)
        dataset._epoch = torch.tensor(batch // len(self.sampler))  # not the shared one: workers load later batches meanwhile
        size = -(-len(indices) // parts)
        return [self.collate(dataset.__getitems__(indices[at : at + size])) | {"counts": True} for at in range(0, len(indices), size)]

    def fault(self, error: BaseException) -> ChildProcessError | None:
        """A worker's death or standstill, as torch reports it, as an error that names it and what it was loading. None for another error.
        The workers are ended: one that is stuck would hold this process at its own end."""
        text, stuck = str(error), isinstance(error, RuntimeError) and "DataLoader timed out" in str(error)
        found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)", text) if isinstance(error, RuntimeError) else None
        dead = found[1].strip() if found else self._dead_beside(error)
        if not (dead or stuck):
            return None
        ended = self._end_workers()
        waited = f"of {', '.join(names_of(self.dataset.samples[i] for i in self.indices(self.next)))}"
        if stuck:
            return ChildProcessError(f"a data worker is stuck: no batch came for {self.timeout:g} s, {waited} (worker_timeout)")
        how = f" (killed by signal: {ended})" if ended else ""
        return ChildProcessError(f"data worker {dead} died{how}, before the batch {waited}")

    def _dead_beside(self, error: BaseException) -> str:
        """The worker whose end broke its connection to this process, as tensors came through it, before its signal was heard; '' where the
        error is another."""
        if not isinstance(error, ConnectionError | EOFError):
            return ""
        workers = getattr(self._iterator, "_workers", ())
        for worker in workers:
            worker.join(0.2)
        return ", ".join(str(worker.pid) for worker in workers if worker.exitcode is not None)

    def _end_workers(self) -> str:
        """At once; torch's handler of SIGCHLD would raise for each of them, wherever the run stands. Returns which signal had ended one of
        them before; '' for none."""
        workers, here = getattr(self._iterator, "_workers", ()), threading.current_thread() is threading.main_thread()
        heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if here and hasattr(signal, "SIGCHLD") else None
        found = next((signal.strsignal(-code) or "" for worker in workers if (code := worker.exitcode) is not None and code < 0), "")
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(10)
        if heard is not None:
            signal.signal(signal.SIGCHLD, heard)
        return found


def names_of(samples) -> list[str]:
    """Names of samples in messages: their qid, or their entry and file."""
    names = [sample.qid or f"entry {sample.entry} of {sample.source.name}" for sample in samples]
    return names if len(names) <= NAMED else [*names[:NAMED], f"and {len(names) - NAMED} more"]


def _leave_signals(worker: int) -> None:
    """Signals to the whole group of processes are the run's own to heed: it ends its workers."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
