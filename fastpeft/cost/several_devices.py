"""A step on several devices, on paper: bytes on each, bytes that travel, and the seconds they take on links of a given speed.

W = ranks, M = nodes, g = W / M ranks on a node, n = bytes, a = seconds to start a message, b = bytes a second of a device's link within its
node, c = bytes a second between a node and the network (all of its devices together).

An all-reduce of n bytes (the gradients of what is trained, float32), every rank sending 2 (W - 1) / W n:

    ring          2 (W - 1) (a + n / (W b))                                            on one node
                  2 (W - 1) (a + n / (W min(b, c)))                                    through all nodes
    hierarchical  2 (g - 1) (a + n / (g b)) + 2 (M - 1) (a + n / (M c))                reduce-scatter in each node, an all-reduce of 1/g
                                                                                       by each of its ranks across nodes, all-gather

An all-gather (a layer of a base in pieces, once for forward and once for backward), every rank receiving (W - 1) / W n, costs half of
either. The cheaper form is taken, as NCCL does. What is gathered overlaps with the layer before it: a step takes the longer of both;
gradients wait for the last layer, and add. (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009; Jia et al., Highly scalable
deep learning training system with mixed-precision, 2018, section 3.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Links:
    """Speeds that the caller knows: bytes a second of a device's link within a node and of a node's network, seconds to start a message."""

    within: float
    between: float | None = None
    latency: float = 1e-5


@dataclass(frozen=True)
class SeveralDevices:
    """Each rank's share of a step. weight_bytes: between steps; gathered_bytes: of the base at once while layers run; peak_bytes: with
    activations, gradients and optimiser. gradient_bytes_sent, gathered_bytes_received: by each rank in a step. Seconds are None where no
    speed is known: of gradients' sum, of gathering, of computing, and of the step."""

    world: int
    nodes: int
    shard: str | None
    batch_size: int
    weight_bytes: int
    gathered_bytes: int
    peak_bytes: int
    gradient_bytes_sent: int
    gathered_bytes_received: int
    gradient_seconds: float | None = None
    gather_seconds: float | None = None
    compute_seconds: float | None = None
    step_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def all_reduce_seconds(n: float, world: int, nodes: int, links: Links) -> float:
    """Of the cheaper form above; n in bytes."""
    a, b, c, g = links.latency, links.within, links.between, world // nodes
    if world == 1:
        return 0.0
    if nodes == 1:
        return 2 * (world - 1) * (a + n / (world * b))
    ring = 2 * (world - 1) * (a + n / (world * min(b, c)))
    return min(ring, 2 * (g - 1) * (a + n / (g * b)) + 2 * (nodes - 1) * (a + n / (nodes * c)))


def all_gather_seconds(n: float, world: int, nodes: int, links: Links) -> float:
    return all_reduce_seconds(n, world, nodes, links) / 2


def on_several_devices(
    network: nn.Module,
    step,
    world: int,
    nodes: int = 1,
    *,
    shard: str | None = None,
    links: Links | None = None,
    flops_per_second: float | None = None,
) -> SeveralDevices:
    """``network``: adapted, on meta tensors will do; ``step``: the :class:`~fastpeft.cost.estimate.Estimate` of one device's step;
    ``flops_per_second``: that a device sustains in such a step. ValueError for numbers that do not fit."""
    _check(world, nodes, shard, links)
    layers, rest = _frozen_bytes(network)
    base = sum(layers) + rest
    if shard and base > step.weight_bytes:
        raise ValueError("shard=base is for a base in fp32, bf16 or fp16; leave quantize out")
    pieces, gathered, units = step.weight_bytes, 0, []
    if shard and world > 1:
        pieces, gathered = step.weight_bytes - base + -(-base // world), 2 * max(layers, default=0) + rest
        units = [*layers, *layers, rest]  # what lies outside the layers stays from forward to backward
    trained = sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
    flat = trained if world > 1 else 0  # the buffer in which gradients travel
    return SeveralDevices(
        world, nodes, shard, world * step.batch_size, pieces, gathered, step.peak_bytes - step.weight_bytes + pieces + gathered + flat,
        2 * (world - 1) * trained // world, (world - 1) * sum(units) // world,
        *_seconds(step, trained, units, world, nodes, links, flops_per_second),
    )  # fmt: skip


def _check(world: int, nodes: int, shard: str | None, links: Links | None) -> None:
    if world < 1 or nodes < 1 or world % nodes:
        raise ValueError(f"world={world}, nodes={nodes}: use whole numbers of 1 or more, the same number of ranks on each node")
    if shard not in (None, "base"):
        raise ValueError(f"shard must be base, not {shard!r}")
    if links is not None and nodes > 1 and links.between is None:
        raise ValueError("several nodes need the network's speed beside the link's")


def _frozen_bytes(network: nn.Module) -> tuple[list[int], int]:
    """(of each layer, of all the rest)."""
    seen, layers = {}, []
    for module in (*(m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)), network):
        own = {id(p): p.nbytes for p in module.parameters() if not p.requires_grad and id(p) not in seen}
        layers.append(sum(own.values()))
        seen |= own
    return layers[:-1], layers[-1]


def _seconds(
    step, trained: int, units: list[int], world: int, nodes: int, links: Links | None, flops_per_second: float | None
) -> tuple[float | None, ...]:
    """The four of :class:`SeveralDevices`."""
    summing = gathering = computing = None
    if links is not None:
        summing = all_reduce_seconds(trained, world, nodes, links)
        gathering = sum(all_gather_seconds(n, world, nodes, links) for n in units)
    if flops_per_second is not None:
        computing = step.flops_per_sample * step.batch_size / flops_per_second
    known = None not in (summing, computing)
    return summing, gathering, computing, max(computing, gathering) + summing if known else None
