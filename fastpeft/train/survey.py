"""What a training step would keep for backward and could compute again, layer by layer, found by one forward pass that keeps nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.models.flatten import sees_no_values
from fastpeft.models.layers import Recomputes
from fastpeft.train.profile import CPU_ATTENTION

RANDOM_STATE = 5056  # bytes of the CPU generator's state, which a layer's recomputation keeps


@dataclass
class Piece:
    """One module's projections: bytes that are not kept where backward computes them again, for so many FLOPs."""

    freed: int = 0
    flops: int = 0


@dataclass
class Layer:
    """What a layer keeps for backward, of that its input, and its forward's FLOPs; its pieces by module name."""

    saved: int = 0
    input: int = 0
    flops: int = 0
    pieces: dict[str, Piece] = field(default_factory=dict)


@dataclass
class Survey:
    """Bytes and FLOPs of one batch: ``saved`` by everything when nothing is computed again, ``transient`` while forward runs."""

    saved: int
    transient: int
    flops: int
    layers: dict[str, Layer]


class _Storages:
    """Storages seen, by address; an address may be used again once its storage is gone."""

    def __init__(self):
        self.seen: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is new."""
        storage = tensor.untyped_storage()
        known = self.seen.get(storage.data_ptr())
        if known is not None and not known.expired():
            return False
        self.seen[storage.data_ptr()] = StorageWeakRef(storage)
        return True

    def holds(self, tensor: Tensor) -> bool:
        known = self.seen.get(tensor.untyped_storage().data_ptr())
        return known is not None and not known.expired()


class _Transient(TorchDispatchMode):
    """The most bytes that are alive at once of what is made inside."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor) and (address := t.untyped_storage().data_ptr()) not in given:  # a view is nothing new
                self.now += t.untyped_storage().nbytes() - self.live.get(address, (None, 0))[1]
                self.live[address] = (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes())
        if self.now > self.peak:
            for address in [address for address, (storage, _) in self.live.items() if storage.expired()]:
                self.now -= self.live.pop(address)[1]
            self.peak = max(self.peak, self.now)
        return out


def survey(model: nn.Module, run: Callable[[], Tensor]) -> Survey:
    """What a step of ``run`` (forward to the loss) would keep and could compute again. Random state and gradients stay as they are."""
    own, kept = _Storages(), _Storages()
    for t in (*model.parameters(), *model.buffers()):
        own.add(t)
    layers, made, shared, at = defaultdict(Layer), {}, _Storages(), [""]
    counter, transient = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION), _Transient()

    def forget(tensor: Tensor) -> None:
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        piece, storage = made.get(address, (None, None))
        if piece is not None and not storage.expired():  # kept by someone who takes no recipe: nothing is gained
            piece.freed -= size
            layers[at[-1]].saved -= size
            del made[address]
        if not own.holds(tensor) and kept.add(tensor):
            layers["" if shared.holds(tensor) else at[-1]].saved += size

    def enter(name, module, args):
        at.append(name)
        layers[name].flops -= counter.get_total_flops()
        layers[name].input += RANDOM_STATE + (args[0].nbytes if args else 0)
        for t in args[1:]:
            if isinstance(t, Tensor):
                shared.add(t)  # what every layer reads, such as an image's states, no layer's recomputation frees

    def leave(module, args, output):
        layers[at.pop()].flops += counter.get_total_flops()

    def projected(name, module, call, x, linears):
        before, new = counter.get_total_flops(), _Storages()
        outputs = type(module).projected(module, call, x, linears)
        piece = layers[at[-1]].pieces.setdefault(name, Piece())
        piece.flops += counter.get_total_flops() - before
        for y in outputs:
            if y.requires_grad and new.add(y):
                made[y.untyped_storage().data_ptr()] = piece, StorageWeakRef(y.untyped_storage())
                piece.freed += y.untyped_storage().nbytes()
                layers[at[-1]].saved += y.untyped_storage().nbytes()
        return outputs

    hooks, before = [], []
    try:
        for name, module in model.named_modules():
            if isinstance(module, Recomputes):
                before.append((module, "recompute", module.recompute))
                module.recompute, module.projected = True, partial(projected, name, module)
            if isinstance(module, GradientCheckpointingLayer):
                before.append((module, "gradient_checkpointing", module.gradient_checkpointing))
                module.gradient_checkpointing = False
                hooks += [module.register_forward_pre_hook(sees_no_values(partial(enter, name)))]
                hooks += [module.register_forward_hook(sees_no_values(leave))]
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices), saved_tensors_hooks(forget, _no_backward), counter, transient:
            run()
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            module.__dict__.pop("projected", None)
        for module, name, value in before:
            setattr(module, name, value)
    saved, flops = sum(layer.saved for layer in layers.values()), int(counter.get_total_flops())
    layers.pop("", None)
    return Survey(saved, transient.peak, flops, dict(layers))


def _no_backward(_):
    raise RuntimeError("a survey keeps nothing: it has no backward")
