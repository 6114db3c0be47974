"""Activation profile of a training step, layer by layer, from one forward pass that keeps nothing: saved bytes, and those that backward
could recompute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.cost.profile import UNCOUNTED
from fastpeft.fused.layers.projections import Recomputes
from fastpeft.fused.stack.flatten import sees_no_values
from fastpeft.ops._private import StorageWeakRef, TorchDispatchMode, storage_id, tree_iter

RANDOM_STATE = 5056  # bytes of the CPU generator's state, which a layer's recomputation keeps


@dataclass
class RecomputablePiece:
    """One module's projections: bytes that are not kept where backward computes them again, for so many FLOPs."""

    freed: int = 0
    flops: int = 0


@dataclass
class Layer:
    """What a layer keeps for backward, of that its input, and its forward's FLOPs; its pieces by module name."""

    saved: int = 0
    input: int = 0
    flops: int = 0
    pieces: dict[str, RecomputablePiece] = field(default_factory=dict)


@dataclass
class ActivationProfile:
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


class _Recorder:
    """Profile of one forward pass, filled in by hooks on layers, saved tensors and projections."""

    def __init__(self, model: nn.Module):
        self.own, self.kept, self.shared = _Storages(), _Storages(), _Storages()
        for t in (*model.parameters(), *model.buffers()):
            if not hasattr(t, "to_local"):  # a piece, which nobody saves
                self.own.add(t)
        self.gathered = {storage_id(t.untyped_storage()) for t in getattr(model, "gathered", ())}  # of a base in pieces
        self.layers: dict[str, Layer] = defaultdict(Layer)
        self.projected: dict[int, tuple[RecomputablePiece, StorageWeakRef]] = {}  # address of a projection's output -> its piece
        self.stack = [""]  # names of the layers that run now
        self.counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)

    def pack(self, tensor: Tensor) -> None:
        """Counts a tensor that autograd would keep, and keeps nothing."""
        address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        piece, storage = self.projected.get(address, (None, None))
        if piece is not None and not storage.expired():  # an operator keeps the projection itself: recomputing frees nothing
            piece.freed -= size
            self.layers[self.stack[-1]].saved -= size
            del self.projected[address]
        if storage_id(tensor.untyped_storage()) in self.gathered:
            return
        if not self.own.holds(tensor) and self.kept.add(tensor):
            self.layers["" if self.shared.holds(tensor) else self.stack[-1]].saved += size

    @staticmethod
    def unpack(_):
        raise RuntimeError("profile_activations keeps nothing: it has no backward")

    def enter(self, name: str, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a layer."""
        self.stack.append(name)
        layer = self.layers[name]
        layer.flops -= self.counter.get_total_flops()
        layer.input += RANDOM_STATE + (args[0].nbytes if args else 0)
        for t in args[1:]:
            if isinstance(t, Tensor):
                self.shared.add(t)  # what every layer reads, such as an image's states, no layer's recomputation frees

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        """Forward hook of a layer."""
        self.layers[self.stack.pop()].flops += self.counter.get_total_flops()

    def observe(self, name: str, project: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``project()``, the projections of module ``name``; their FLOPs and bytes go to the layer's pieces."""
        before, new = self.counter.get_total_flops(), _Storages()
        outputs = project()
        layer = self.layers[self.stack[-1]]
        piece = layer.pieces.setdefault(name, RecomputablePiece())
        piece.flops += self.counter.get_total_flops() - before
        for y in outputs:
            if y.requires_grad and new.add(y):
                self.projected[y.untyped_storage().data_ptr()] = piece, StorageWeakRef(y.untyped_storage())
                piece.freed += y.untyped_storage().nbytes()
                layer.saved += y.untyped_storage().nbytes()
        return outputs

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Inside, modules report here; layers run without checkpoints, projections are marked for recomputation."""
        with ExitStack() as undo:
            for name, module in model.named_modules():
                if isinstance(module, Recomputes):
                    undo.callback(setattr, module, "recompute", module.recompute)
                    undo.callback(delattr, module, "observer")
                    module.recompute, module.observer = True, partial(self.observe, name)
                if isinstance(module, GradientCheckpointingLayer):
                    undo.callback(setattr, module, "gradient_checkpointing", module.gradient_checkpointing)
                    module.gradient_checkpointing = False
                    undo.callback(module.register_forward_pre_hook(sees_no_values(partial(self.enter, name))).remove)
                    undo.callback(module.register_forward_hook(sees_no_values(partial(self.leave))).remove)
            yield


def profile_activations(model: nn.Module, run: Callable[[], Tensor]) -> ActivationProfile:
    """Profile of a training step whose forward, to the loss, is ``run``. It keeps nothing for backward. Random state and gradients stay as
    they are."""
    recorder, transient = _Recorder(model), _Transient()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    keep_nothing = saved_tensors_hooks(recorder.pack, recorder.unpack)
    with recorder.attached(model), torch.random.fork_rng(devices), keep_nothing, recorder.counter, transient:
        run()
    saved, flops = sum(layer.saved for layer in recorder.layers.values()), int(recorder.counter.get_total_flops())
    recorder.layers.pop("", None)
    return ActivationProfile(saved, transient.peak, flops, dict(recorder.layers))
