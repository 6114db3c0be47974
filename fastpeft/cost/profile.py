"""Profile of a step: FLOPs and bytes saved for backward (both exact, by part), and the process's memory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from weakref import WeakValueDictionary

import psutil
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastpeft.fused.stack.flatten import sees_no_values
from fastpeft.models import parts_of
from fastpeft.ops._private import storage_id

OUTSIDE, BACKWARD = "other", "backward"


@dataclass
class StepCost:
    """FLOPs of forward and backward (matrix products, two per multiply-add), and bytes that autograd kept between them: every distinct
    storage once, parameters and buffers aside. By part: of its forward; ``flops_by_part["backward"]`` is all that follows, and
    ``saved_by_part["other"]`` what is saved outside the parts."""

    flops: int = 0
    saved_bytes: int = 0
    flops_by_part: dict[str, int] = field(default_factory=dict)
    saved_by_part: dict[str, int] = field(default_factory=dict)


class _Storage:
    """One storage that autograd keeps: alive as long as a saved tensor is."""

    __slots__ = ("__weakref__",)


def _cpu_attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_attention_backward(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _grouped_product(a, b, offs=None, *args, out_shape=None, **kwargs) -> int:
    """[S, K] x [E, K, N], rows by expert; [M, S] x [S, N] and its like, sums by expert; [E, M, K] x [E, K, N]: all elements of the first
    (of three dimensions against two: of the second) are multiplied by a row each."""
    return 2 * prod(a) * b[-1] if len(a) == 2 or len(b) == 3 else 2 * prod(b) * a[-2]


# What PyTorch 2.13's counter does not know: attention on CPU, products of experts
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    torch.ops.aten._grouped_mm: _grouped_product,
}


class _NoModules:
    """In place of FlopCounterMode's tracker of modules, which asks every output for its gradient's function: logits and padding that are
    computed where they are read would be computed for it."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error) -> None:
        pass


@contextmanager
def measure(model: nn.Module):
    """Count what runs inside, forward and backward of one step; yields a :class:`StepCost` that is filled in on exit."""
    cost, at = StepCost(), [OUTSIDE]
    weights = (*model.parameters(), *model.buffers(), *getattr(model, "gathered", ()))  # the last: of a base in pieces
    own = {storage_id(t.untyped_storage()) for t in weights}
    kept = WeakValueDictionary()  # by storage; weak, so that measuring frees memory when autograd does
    saved, flops = defaultdict(int), defaultdict(int)

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, _Storage | None]:
        storage = tensor.untyped_storage()
        identity = storage_id(storage)
        if identity in own:
            return tensor, None
        token = kept.get(identity)
        if token is None:
            token = kept[identity] = _Storage()
            saved[at[-1]] += storage.nbytes()
        return tensor, token

    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    counter.mod_tracker = _NoModules()

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
        hooks += [root.register_forward_pre_hook(sees_no_values(enter(part.name))), root.register_forward_hook(sees_no_values(leave))]
    try:
        with saved_tensors_hooks(pack, lambda packed: packed[0]), counter:
            yield cost
    finally:
        for hook in hooks:
            hook.remove()
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
    # not getrusage on Linux: its maximum outlives exec, so a small process started by a large one inherits the large one's
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as status:
        peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
        return max(peak, memory_bytes(device))  # the kernel's counters lag by some pages
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    """Start CUDA's peak anew; a process's own cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
