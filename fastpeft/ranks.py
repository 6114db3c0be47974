"""Ranks: the processes of one run, a device each, as torchrun or srun starts them. A single process is rank 0 of 1.

What travels between them are numbers and small objects on the host (gloo), gradients of what is trained (train/gradients.py: NCCL on
GPUs), and with a sharded base its weights (train/sharding.py). Every method of :class:`Ranks` that communicates is to be called by all.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
JOINING = timedelta(minutes=10)  # for all to be there, and of a collective operation on GPUs
WAITING = timedelta(days=30)  # for one that reads data or scores: a rank that ends is noticed at once, however long this is
TELLING = timedelta(seconds=5)  # that other ranks leave to the first one to say why a run ends


class RankLost(ConnectionError):
    """Another rank has ended."""


@dataclass
class Ranks:
    """This process among the ``world`` of a run: ``rank``, and its place among the ``local_world`` on its machine. ``sent`` counts the
    bytes it gave to collective operations."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: Any = None
    host: Any = None  # the process group on the host
    sent: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and speaks for it."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def device(self, name: str | None) -> str | None:
        """The name of this rank's device, where ``name`` was asked for. ValueError where there are fewer GPUs than ranks."""
        if self.alone or not torch.cuda.is_available() or name not in (None, "cuda"):
            return name
        if self.local_world > (found := torch.cuda.device_count()):
            raise ValueError(f"{self.local_world} ranks on a machine with {found} GPUs: start one for each (--nproc-per-node {found})")
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def share(self, batch: Sequence[T], rank: int | None = None) -> Sequence[T]:
        """This rank's part of a batch, or that of ``rank``: in order, as equal as they can be, the longer ones first."""
        least, longer = divmod(len(batch), self.world)
        at = self.rank if rank is None else rank
        start = at * least + min(at, longer)
        return batch[start : start + least + (at < longer)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks, in float64: the same numbers on each."""
        if self.alone:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        self.reduce(numbers)
        return numbers.tolist()

    def reduce(self, tensor: Tensor, op=dist.ReduceOp.SUM) -> None:
        """Of a CPU tensor, in place."""
        self.sent += tensor.nbytes
        with _watching():
            dist.all_reduce(tensor, op, group=self.host)

    def gather(self, value: T) -> list[T]:
        """Every rank's, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with _watching():
            dist.all_gather_object(found, value, group=self.host)
        return found

    def from_first(self, value: T) -> T:
        """Rank 0's value."""
        if self.alone:
            return value
        found = [value if self.first else None]
        with _watching():
            dist.broadcast_object_list(found, src=0, group=self.host)
        return found[0]

    @torch.no_grad()
    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's tensors into all others', in place."""
        if self.alone:
            return
        for tensor in tensors:
            held = tensor.cpu().contiguous()
            with _watching():
                dist.broadcast(held, src=0, group=self.host)
            tensor.copy_(held)

    def wait(self) -> None:
        """Until all are here."""
        if not self.alone:
            with _watching():
                dist.barrier(group=self.host)

    def first_does(self, work: Callable[[], T]) -> T:
        """What rank 0 makes, while the others wait, on each of them."""
        return self.from_first(work() if self.first else None)

    def check_same(self, what: dict[str, Any], differences: Callable[[str, Any, Any], list[str]]) -> None:
        """ValueError, on all ranks, where one does not hold what rank 0 does; ``differences``: puts them into words."""
        for rank, theirs in enumerate(found := self.gather(what)):
            if said := [text for name in what for text in differences(name, found[0].get(name), theirs.get(name))]:
                raise ValueError(f"rank {rank} has not what rank 0 has (was: on rank 0, now: on rank {rank}): {'; '.join(said)}")

    def tells(self, error: BaseException) -> bool:
        """Whether this process is to say what ended the run: one of them does, rank 0 where it lives on."""
        if self.alone:
            return True
        with suppress(Exception):  # the store has gone with the process that kept it
            if not self.first and isinstance(error, RankLost | KeyboardInterrupt):
                with suppress(dist.DistStoreError):
                    self.store.wait(["told"], TELLING)
            return self.store.add("told", 1) == 1
        return self.first


def lost(error: RuntimeError) -> RankLost:
    """What a failed collective operation means."""
    text = " ".join(str(error).split())[:200]
    return RankLost("another rank has ended" + ("" if "onnection" in text else f" ({text})"))


@contextmanager
def _watching() -> Iterator[None]:
    """A connection that breaks is another process's end."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error) from None


ALONE = Ranks()
_joined: Ranks | None = None


def ranks_here() -> Ranks:
    """The ranks that the environment names (RANK, WORLD_SIZE, ... of torchrun; srun's SLURM_PROCID, ...), joined at the first call; a
    single process where it names none. ValueError where they cannot meet."""
    global _joined
    if _joined is None:
        told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        if None in told.values() or int(told["WORLD_SIZE"]) == 1:
            return ALONE
        _joined = _join()
    return _joined


def _join() -> Ranks:
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=JOINING)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.PrefixStore("fastpeft", store), rank=rank, world_size=world, timeout=JOINING)
        host = dist.new_group(backend="gloo", timeout=WAITING)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the {os.environ['WORLD_SIZE']} ranks do not meet: {' '.join(str(error).split())[:200]}") from None
    local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Ranks(rank, world, *local, store, host)


@contextmanager
def one_voice() -> Iterator[Ranks]:
    """The ranks of a command. An error inside is raised on one of them, to be said; the others end quietly, by SystemExit."""
    global _joined
    ranks = ranks_here()
    if not ranks.first:
        warnings.simplefilter("ignore")
    try:
        yield ranks
    except (Exception, KeyboardInterrupt) as error:
        if ranks.tells(error):
            raise
        time.sleep(1)  # an earlier end might end the one that speaks
        raise SystemExit(getattr(error, "exit_status", 130 if isinstance(error, KeyboardInterrupt) else 2)) from None
    if not ranks.alone:
        ranks.wait()
        dist.destroy_process_group()
        _joined = None
