"""What a step costs: FLOPs, bytes saved for backward (both exact, by part), and the memory the process holds."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fastpeft.models import parts_of

OUTSIDE, BACKWARD = "other", "backward"


@dataclass
class StepCost:
    """FLOPs of forward and backward (matrix products, two per multiply-add), and bytes that autograd kept between them: every distinct
    storage once, parameters and buffers aside. By part: of its forward; ``flops_by_part["backward"]`` is all that follows."""

    flops: int = 0
    saved_bytes: int = 0
    flops_by_part: dict[str, int] = field(default_factory=dict)
    saved_by_part: dict[str, int] = field(default_factory=dict)


@contextmanager
def measure(model: nn.Module):
    """Count what runs inside, forward and backward of one step; yields a :class:`StepCost` that is filled in on exit."""
    cost, at, kept = StepCost(), [OUTSIDE], {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved, flops = defaultdict(int), defaultdict(int)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor  # held, so that no later tensor takes its address within this step
            saved[at[-1]] += storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)

    def enter(name):
        def hook(module, args):
            at.append(name)
            flops[name] -= counter.get_total_flops()

        return hook

    def leave(module, args, output):
        flops[at.pop()] += counter.get_total_flops()

    hooks = []
    for part in _known_parts(model):
        root = part.of(model)
        hooks += [root.register_forward_pre_hook(enter(part.name)), root.register_forward_hook(leave)]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor), counter:
            yield cost
    finally:
        for hook in hooks:
            hook.remove()
    kept.clear()
    cost.flops, cost.saved_bytes = int(counter.get_total_flops()), sum(saved.values())
    flops[BACKWARD] = cost.flops - sum(flops.values())
    cost.flops_by_part, cost.saved_by_part = {name: int(n) for name, n in flops.items()}, dict(saved)


def _known_parts(model: nn.Module):
    try:
        return parts_of(model)
    except ValueError:
        return ()


def memory_bytes(device: torch.device) -> int:
    """Bytes held now: by PyTorch's allocator on CUDA, resident in the process on CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory_bytes(device: torch.device) -> int:
    """Largest value so far: since :func:`reset_peak` on CUDA, since the process began on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
