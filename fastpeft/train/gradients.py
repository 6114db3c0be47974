"""Gradients of what is trained, summed over the ranks: the only tensors that travel in a step of a replicated model.

All lie end to end in one float32 buffer. An adapter's are a few megabytes, which a network moves in less time than it takes to start one
more operation, and the first adapter's gradient ends the backward pass: so they are sent at once when it has ended, and travel while
the host adds up losses. Half-precision gradients travel as the float32 sums that their masters hold.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpeft.ranks import Ranks, lost


class GradientSum:
    """Of an optimiser's masters. ``start`` after the last backward of a step, ``finish`` before the update; a parameter that took part on
    no rank keeps None, as in a single process, where AdamW then leaves it alone."""

    def __init__(self, masters: list[Tensor], ranks: Ranks):
        self.masters, self.ranks = masters, ranks
        self.flat: Tensor | None = None
        self.waiting: list[dist.Work] = []

    def start(self) -> None:
        if self.ranks.alone:
            return
        if self.flat is None:
            self.flat = torch.empty(sum(m.numel() for m in self.masters), dtype=torch.float32, device=self.masters[0].device)
        self.took_part = torch.tensor([m.grad is not None for m in self.masters], dtype=torch.uint8)
        for master, place in zip(self.masters, self._places()):
            place.zero_() if master.grad is None else place.copy_(master.grad)
            master.grad = None
        self.waiting = [
            dist.all_reduce(self.took_part, dist.ReduceOp.MAX, group=self.ranks.host, async_op=True),
            dist.all_reduce(self.flat, async_op=True),
        ]
        self.ranks.sent += self.flat.nbytes + self.took_part.nbytes

    def finish(self) -> None:
        """RankLost where another rank has ended, with nothing changed."""
        if self.ranks.alone:
            return
        try:
            for work in self.waiting:
                work.wait()
        except RuntimeError as error:
            raise lost(error) from None
        for master, place, took_part in zip(self.masters, self._places(), self.took_part.tolist()):
            master.grad = place if took_part else None

    def _places(self) -> list[Tensor]:
        pieces = self.flat.split([m.numel() for m in self.masters])
        return [piece.view_as(master) for piece, master in zip(pieces, self.masters)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """In the order of the model's names."""
    return [p for p in model.parameters() if p.requires_grad]
