"""Memory budget: chooses what backward recomputes so that a training step fits in so many bytes.

A layer has these options, each at its own price in FLOPs per byte:

| recomputed     | keeps                     | how                                                                                  |
|----------------|---------------------------|--------------------------------------------------------------------------------------|
| projections    | the norm's input          | q, k, v, or the feed-forward's hidden layer, from what the norm keeps (ops/_recompute.py) |
| layer          | the layer's input         | torch.utils.checkpoint, drawing the same random numbers                               |

:func:`profile_activations` measures every option of every layer on a batch, by one forward pass that keeps nothing: it needs no more
memory than inference. :func:`choose` takes the cheapest FLOPs per byte first until the estimate fits. The estimate of a step's peak is

    weights + gradients + optimiser state + saved for backward + 1.5 x forward's transient + the largest piece computed again

The estimate leaves out Python itself, a data set's cache and CUDA's context. Recomputation changes no result beyond rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.cost.activations import ActivationProfile, profile_activations
from fastpeft.fused.layers.projections import Recomputes
from fastpeft.methods.quantized import bytes_held, is_held, is_quantized
from fastpeft.options import bytes_of
from fastpeft.ranks import ALONE, Ranks

TRANSIENT = 1.5  # of the forward's: measured 0.7 to 1.4 in backward, over MISS's plans


def readable(size: float) -> str:
    """6.00 GB, or 35.2 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


@dataclass(frozen=True)
class Recomputation:
    """What :func:`choose` chose: names of modules and of layers; bytes of the estimate, FLOPs that it adds to a batch's step."""

    modules: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    saved: int = 0
    peak: int = 0
    flops: int = 0
    share: float = 0.0

    def note(self, budget: int) -> str:
        chosen = [f"{len(names)} {what}" for names, what in ((self.modules, "modules' projections"), (self.layers, "layers")) if names]
        what = f"backward computes {' and '.join(chosen)} again" if chosen else "nothing is computed again"
        return (
            f"memory budget {readable(budget)}: {what}; estimated peak {readable(self.peak)}, of which {readable(self.saved)} activations; "
            f"{self.flops / 1e9:.1f} GF more a batch, {self.share:.0%} of its forward pass"
        )


def fixed_bytes(model: nn.Module) -> int:
    """Weights and buffers, and for what is trained gradients and AdamW's two moments (with float32 masters under half precision). Of a
    base in pieces, this rank's piece and what is gathered at once."""
    held = (t.to_local() if hasattr(t, "to_local") else t for t in (*model.parameters(), *model.buffers()) if not is_quantized(t))
    own = {t.data_ptr(): t for t in held}
    total = sum(t.untyped_storage().nbytes() for t in own.values()) + sum(bytes_held(m) for m in model.modules() if is_held(m))
    total += getattr(model, "gathered_bytes", 0)
    for p in model.parameters():
        if p.requires_grad:
            total += p.numel() * (12 if p.dtype not in (torch.bfloat16, torch.float16) else 2 + 4 + 12)
    return total


def choose(found: ActivationProfile, fixed: int, budget: int) -> Recomputation:
    """What to compute again so that the estimated peak is at most ``budget`` bytes, the cheapest FLOPs per byte first.

    ``fixed``: bytes that do not depend on it (:func:`fixed_bytes`). ValueError, naming the least possible, where nothing suffices.
    """
    picked, chosen = [], _recomputation(found, fixed, ())
    least = chosen.peak
    while chosen.peak > budget:
        options = list(_options(found, picked))
        if not options:
            raise ValueError(
                f"memory budget {readable(budget)}: this batch's step takes at least {readable(least)} "
                f"({readable(fixed)} of it weights, gradients and optimiser state): lower batch_size, or allow as much"
            )
        picked.append(min(options)[1:])
        chosen = _recomputation(found, fixed, picked)
        least = min(least, chosen.peak)
    for pick in picked[::-1]:  # the last may have freed more than was missing
        without = [p for p in picked if p != pick]
        if _recomputation(found, fixed, without).peak <= budget:
            picked, chosen = without, _recomputation(found, fixed, without)
    return chosen


def _options(found: ActivationProfile, picked: list[tuple[str, str]]) -> Iterable[tuple[float, str, str]]:
    """(FLOPs per byte, layer, module or "" for the whole layer) beyond what is picked."""
    for name, layer in found.layers.items():
        if (name, "") in picked:
            continue
        freed, flops = layer.saved - layer.input, layer.flops
        for module, piece in layer.pieces.items():
            if (name, module) in picked:
                freed, flops = freed - piece.freed, flops - piece.flops
            elif piece.freed > 0:
                yield piece.flops / piece.freed, name, module
        if freed > 0:
            yield flops / freed, name, ""


def _recomputation(found: ActivationProfile, fixed: int, picked: Iterable[tuple[str, str]]) -> Recomputation:
    """The estimate with what is picked recomputed: pairs as of :func:`_options`."""
    whole = {layer for layer, module in picked if not module}
    pieces = {module: found.layers[layer].pieces[module] for layer, module in picked if module and layer not in whole}
    layers = [found.layers[name] for name in whole]
    saved = found.saved - sum(p.freed for p in pieces.values()) - sum(layer.saved - layer.input for layer in layers)
    flops = sum(p.flops for p in pieces.values()) + sum(layer.flops for layer in layers)
    largest = max([0, *(p.freed for p in pieces.values()), *(layer.saved for layer in layers)])
    peak = int(fixed + saved + TRANSIENT * found.transient + largest)
    return Recomputation(tuple(sorted(pieces)), tuple(sorted(whole)), saved, peak, flops, flops / max(1, found.flops))


def apply(model: nn.Module, modules: Iterable[str] = (), layers: Iterable[str] = ()) -> None:
    """Compute again what is named, and nothing else: fields ``modules`` and ``layers`` of a :class:`Recomputation`."""
    modules, layers = set(modules), set(layers)
    for name, module in model.named_modules():
        if isinstance(module, Recomputes):
            module.recompute = name in modules
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = name in layers
            if name in layers:
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


class MemoryBudget:
    """Keeps a run under ``limit`` (bytes, or text such as "6GB"): profiles its first batch, and again every batch that might not fit what
    was chosen. ``fit(inputs)`` before each forward is all a training loop has to add. ``together``: ranks that run every forward together,
    and so profile together."""

    def __init__(self, model: nn.Module, limit: int | str, together: Ranks = ALONE):
        self.model, self.limit, self.together = model, bytes_of(limit) if isinstance(limit, str) else limit, together
        self.others = 0  # bytes that other runs on the same base hold beside it
        self.chosen, self.sizes, self.room = Recomputation(), {}, 0  # room: the estimate beyond fixed, of batches of these sizes

    @functools.cached_property
    def fixed(self) -> int:
        """Of :func:`fixed_bytes`, at the first step, and what other runs hold."""
        return fixed_bytes(self.model) + self.others

    def fit(self, inputs: dict[str, Tensor]) -> None:
        """Make room for a step on ``inputs``, the model's keyword arguments. ValueError where there is no room."""
        sizes = {name: t.numel() for name, t in inputs.items()}
        fits = bool(self.sizes) and self.fixed + self.room * _growth(self.sizes, sizes) <= self.limit
        if not any(self.together.sum([not fits])):
            return
        found = profile_activations(self.model, lambda: self.model(**inputs).loss)
        largest = {name: max(n, self.sizes.get(name, 0)) for name, n in sizes.items()}
        growth = _growth(sizes, largest)
        try:  # for batches as large as any so far in every respect
            self.chosen = choose(found, self.fixed, int(self.fixed + (self.limit - self.fixed) / growth))
            self.sizes, self.room = largest, (self.chosen.peak - self.fixed) * growth
        except ValueError:
            self.chosen = choose(found, self.fixed, self.limit)
            self.sizes, self.room = sizes, self.chosen.peak - self.fixed
        apply(self.model, self.chosen.modules, self.chosen.layers)

    def note(self) -> str:
        return self.chosen.note(self.limit)


def _growth(before: dict[str, int], now: dict[str, int]) -> float:
    """By how much a batch of sizes ``now`` may take more than one of sizes ``before``."""
    return max([1.0, *(n / before[name] if before.get(name) else float("inf") for name, n in now.items() if n)])
