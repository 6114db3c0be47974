"""A frozen base in pieces: each rank holds 1/world of its weights, and gathers a layer's when the layer runs (PyTorch's FSDP2).

What is trained stays whole on every rank, so gradients, optimiser and checkpoints are those of a replicated model. Frozen weights have no
gradients: nothing but their gathering travels, once for forward and once for backward. Every rank has to run the same modules at the same
time, however few samples it has; :class:`~fastpeft.train.shares.Shares` and the memory budget see to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.adapters import fingerprint
from fastpeft.methods.quantized import is_held, is_quantized
from fastpeft.ranks import Ranks


def check_shard(model: nn.Module, ranks: Ranks) -> None:
    """ValueError where the base cannot be held in pieces."""
    if ranks.alone:
        raise ValueError("shard=base spreads the base over several ranks, and this is one process: start it with torchrun, or leave it out")
    if any(map(is_quantized, model.parameters())) or any(map(is_held, model.modules())):
        raise ValueError("shard=base is for a base in fp32 or bf16: FSDP2 loses a quantised weight's scales; leave quantize or shard out")
    plan = model.fastpeft_plan
    if routed := [name for name, methods in plan.treatments.items() if any(method.by_modality for method in methods)]:
        raise ValueError(
            f"shard=base: {', '.join(routed)} has MM-Adapters, which route samples by a second pass through the layers whose outputs nobody"
            " reads, so that FSDP2 cannot know when backward needs their weights; leave shard out"
        )


def to_device_whole_or_not(model: nn.Module, device: torch.device, ranks: Ranks, *, sharded: bool, whole: bool) -> None:
    """The model, in place. Of a base that will be taken apart only what is trained, unless it is needed ``whole`` before: its layers follow
    in pieces. ValueError as of :func:`check_shard`."""
    if sharded:
        check_shard(model, ranks)
    if not sharded or whole:
        model.to(device)
        return
    for tensor in (*(p for p in model.parameters() if p.requires_grad), *model.buffers()):
        tensor.data = tensor.data.to(device)


def take_apart(trainer) -> None:
    """A run's base. Then no rank can encode an image by itself: features have to be all there, or are left to the step."""
    if trainer.features is not None and any(trainer.ranks.gather(not trainer.features.complete())):
        trainer.notes.append("features are computed in every step: there is no room for all of them, which a base in pieces needs")
        trainer.features = trainer.step.features = None
    shard_base(trainer.model, trainer.device, trainer.ranks)
    trainer.notes.append(f"each rank holds {sharded_bytes(trainer.model) / 1e6:.1f} MB of the frozen weights")


def shard_base(model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Take the frozen weights apart, layer by layer, in place; they may still be on the CPU. ``model.gathered`` then holds the tensors that
    they are gathered into, empty between uses, and ``model.gathered_bytes`` says how much of them is there at once."""
    model.fastpeft_fingerprint = fingerprint(model)  # while there is a whole base to take it from
    trained = {p for p in model.parameters() if p.requires_grad}
    mesh = init_device_mesh(device.type, (ranks.world,))
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in layers:
        fully_shard(module, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=trained)
    model.gathered, sizes = [], []
    for module in [*layers, model]:
        held = {id(p) for p in module.parameters()}
        module.unshard()
        whole = [p for p in module.parameters() if id(p) not in held]
        model.gathered += [p.data for p in whole]
        sizes.append(sum(p.nbytes for p in whole))
        module.reshard()
    model.gathered_bytes = 2 * max(sizes[:-1], default=0) + sizes[-1]  # the next layer is gathered while one runs


def sharded_bytes(model: nn.Module) -> int:
    """Bytes of frozen weights that this rank holds between steps."""
    return sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in model.parameters() if not p.requires_grad)


@contextmanager
def rest_gathered(model: nn.Module) -> Iterator[None]:
    """Inside, what lies outside the layers (embeddings, head) is whole, for generation, which calls a model's pieces one by one."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    yield
    model.reshard()
