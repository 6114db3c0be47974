"""Estimate of several adapters trained in one run: one base, each adapter's own bytes, and one step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastpeft.cost.estimate import DTYPES, RESERVE, Estimate
from fastpeft.methods import is_adapter
from fastpeft.models import ModelSource
from fastpeft.options import bytes_of
from fastpeft.plan import Plan, adapt, build


@dataclass(frozen=True)
class SeveralAdapters:
    """Of a run of several adapters on one base, whose steps come one after the other. base_bytes: frozen weights, held once. own_bytes: of
    all adapters together, what is trained and its optimiser state. saved_bytes: the largest step's. flops_per_sample: of one sample in the
    steps of all. peak_bytes: the most at once, on a CPU with the process around it; apart_bytes: of as many runs at once, each with a base
    of its own. adapters: plan, flops_per_sample, own_bytes, saved_bytes of each."""

    adapters: dict[str, dict[str, Any]]
    base_bytes: int
    own_bytes: int
    saved_bytes: int
    flops_per_sample: float
    peak_bytes: int
    apart_bytes: int
    process_bytes: int
    fits: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def together(found: Mapping[str, Estimate], frozen: int, gpu_memory: str | None = None) -> SeveralAdapters:
    """Steps that were estimated apart (:func:`fastpeft.estimate`), as those of one run; ``frozen``: bytes of :func:`frozen_bytes`."""
    own = {name: one.trained_bytes + one.optimizer_bytes for name, one in found.items()}
    step = max(one.peak_bytes - one.process_bytes - one.weight_bytes - one.optimizer_bytes for one in found.values())
    process = max(one.process_bytes for one in found.values()) if gpu_memory is None else 0
    peak = frozen + sum(own.values()) + step + process
    each = {
        name: {"plan": one.plan, "flops_per_sample": one.flops_per_sample, "own_bytes": own[name], "saved_bytes": one.saved_bytes}
        for name, one in found.items()
    }
    return SeveralAdapters(
        adapters=each,
        base_bytes=frozen,
        own_bytes=sum(own.values()),
        saved_bytes=max(one.saved_bytes for one in found.values()),
        flops_per_sample=sum(one.flops_per_sample for one in found.values()),
        peak_bytes=peak,
        apart_bytes=sum(one.peak_bytes - one.process_bytes + process for one in found.values()),
        process_bytes=process,
        fits=None if gpu_memory is None else peak <= bytes_of(gpu_memory) - int(RESERVE),
    )


def frozen_bytes(source: ModelSource, plans: Iterable[Plan], dtype: str, known: Estimate) -> int:
    """Bytes of the weights and buffers that at least one of these plans leaves as they are. ``known``: the estimate of the first of the
    plans, which knows what a quantised base takes less."""
    held: dict[str, int] = {}
    for plan in plans:
        network = adapt(build(source, device="meta", dtype=DTYPES[dtype]), plan)
        whole = _bytes((*network.parameters(), *network.buffers()))
        if not held:
            less = whole - known.weight_bytes
        named = [*network.named_parameters(), *network.named_buffers()]
        held |= {name: tensor.nbytes for name, tensor in named if not tensor.requires_grad and not is_adapter(name)}
    return sum(held.values()) - less


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())
