"""A rank's share of each batch of a run, in forwards of at most so many samples."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from fastpeft.data import EpochSampler
from fastpeft.ranks import Ranks


class Shares(Sampler[list[int]]):
    """A batch sampler: what ``ranks`` gives this rank of each of ``sampler``'s batches, cut into forwards of up to ``size`` samples.

    The batches, their grouping and their order are those of a single process with batches of ``size`` times the number of ranks; over all
    ranks each sample comes once. ``together``: every rank runs as many forwards as the first (as a sharded base needs); those that it has
    not, it runs on the batch's first sample, and they do not count.
    """

    def __init__(self, sampler: EpochSampler, ranks: Ranks, size: int, together: bool = False):
        self.sampler, self.ranks, self.size, self.together = sampler, ranks, size, together

    def forwards(self, number: int) -> tuple[int, int]:
        """(forwards of the epoch's batch ``number``, how many of them count)."""
        whole, size = self.sampler.n, self.sampler.batch_size
        of_batch = range(min(size, whole - number * size))
        mine, most = (-(-len(self.ranks.share(of_batch, rank)) // self.size) for rank in (None, 0))
        return (most if self.together else mine), mine

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self.sampler, self.sampler.start_batch):
            share, (all_of_them, _) = self.ranks.share(batch), self.forwards(number)
            for at in range(0, all_of_them * self.size, self.size):
                yield list(share[at : at + self.size]) or batch[:1]
