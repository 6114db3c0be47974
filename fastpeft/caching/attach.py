"""Where a model gets image caches, and what the report says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from torch import nn
from transformers import PreTrainedModel

from fastpeft.caching.frozen import NotUnderstood, calls, delegates, modules_below, names_below, why_not_constant
from fastpeft.caching.images import REPLICATE, ImageCache, Replicas, image_caches
from fastpeft.caching.layers import Known, LayerCache, before_layers, layer_caches
from fastpeft.fused.stack.any_stack import FusedTextStack
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.llama import FusedLlamaModel
from fastpeft.fused.stack.lower import LAYER_CACHE
from fastpeft.methods.quantized import size_of
from fastpeft.options import bytes_of

FEATURES = "get_image_features"
METHODS = (FEATURES, "get_video_features")


def forget_images(model: nn.Module) -> None:
    """Take the caches in ``model`` away."""
    for cache in image_caches(model):
        cache.flush()
        cache.owner.__dict__.pop(cache.method, None)
        cache.owner.__dict__.pop(REPLICATE, None)


def forget_layers(model: nn.Module) -> None:
    """Take the caches of lower layers in ``model`` away."""
    for cache in layer_caches(model):
        cache.flush()
        cache.stack.__dict__.pop(LAYER_CACHE, None)


def keep_layers(model: nn.Module, limit: int, folder: Path | None, shelf: dict[str, Any] | None = None) -> list[str]:
    """Put caches on the stacks of ``model``, which has none, whose lower layers are constant; notes for the report. ``limit``: bytes, of
    all together; ``shelf``: where models on one base keep states for each other."""
    points, notes = [], []
    for name, stack, count, reason in constant_layers(model):
        told = f"hidden states of {name or type(stack).__name__}"
        if count == 0:
            notes.append(f"{told} are not kept: {reason}")
            continue
        points.append((stack, count))
        layers = stack._modules["layers"]
        below, every = (sum(_products(layer) for layer in some) for some in (layers[:count], layers))
        less = f"{2e-6 * below:.3g} MFLOP a token less, {below / max(1, every):.0%} of the layers' forward"
        notes.append(
            f"{told} after {count} of {len(layers)} layers are kept, {_kib(stack):.1f} KiB a token: a training step on samples that were "
            f"met before computes {less}, and returns no past_key_values"
        )
    for stack, count in points:
        stack.__dict__[LAYER_CACHE] = LayerCache(stack, count, limit // len(points), folder, shelf)
    return notes or ["hidden states are not kept: there is no stack of decoder layers here that fastpeft runs"]


def constant_layers(model: nn.Module) -> list[tuple[str, nn.Module, int, str]]:
    """(name, module, how many of its lowest layers are constant, why not one more) of every stack of ``model``."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, (FusedTextStack, FusedLlamaModel)))
    stacks = [(name, module) for name, module in found if "layers" in module._modules]  # GPT-2's have another name
    return [(name, stack, *_constant_layers(stack)) for name, stack in stacks]


@contextmanager
def lower_layers_known(model: nn.Module) -> Iterator[list[str]]:
    """Inside, stacks compute nothing in their constant layers, as if all states were kept: for counting. Notes say what is left out."""
    found = [(name, stack, count) for name, stack, count, _ in constant_layers(model) if count and LAYER_CACHE not in stack.__dict__]
    for _, stack, count in found:
        stack.__dict__[LAYER_CACHE] = Known(count)
    try:
        yield [f"{name}: layers 0 to {count - 1} are not in the step; {_kib(stack):.1f} KiB a token kept" for name, stack, count in found]
    finally:
        for _, stack, _ in found:
            del stack.__dict__[LAYER_CACHE]


def _constant_layers(stack: nn.Module) -> tuple[int, str]:
    """(how many of the lowest layers are constant, all but the last at most; why not one more)."""
    layers = stack._modules["layers"]
    if reason := why_not_constant(stack, before_layers(stack)):
        return 0, reason
    for count in range(len(layers)):
        if reason := why_not_constant(layers, [str(count)]) or why_not_flat(layers, layers[count], by_code=True):
            return count, f"layers.{reason}" if reason[0].isdigit() else reason
    return len(layers) - 1, ""


def _kib(stack: nn.Module) -> float:
    """Of a token's hidden state."""
    return stack.config.hidden_size * stack.dtype.itemsize / 1024


def _products(layer: nn.Module) -> int:
    """Multiply-adds a token of a layer's matrices."""
    return sum(size_of(parameter) for parameter in layer.parameters() if parameter.dim() > 1)


def place_of(where: str | Path, option: str = "optimize: cache_images") -> tuple[int, Path | None]:
    """(bytes of host memory, folder) of "4GB" or of a folder, which gets a third of the free memory. ValueError or TypeError for others."""
    if not isinstance(where, (str, Path)) or not str(where).strip():
        raise TypeError(f"{option} must be a size such as '4GB', or a folder, not {where!r}")
    text = str(where).strip()
    if isinstance(where, str) and text[0] in "0123456789.-+" and "/" not in text and text not in (".", "..") and not Path(text).is_dir():
        try:
            return bytes_of(text), None
        except ValueError as error:
            raise ValueError(f"{option}: {error}; or give a folder that exists, or a path with a slash") from None
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option}={text!r} is a file: give a folder, or a size such as '4GB'")
    return psutil.virtual_memory().available // 3, folder


def keep_images(model: nn.Module, limit: int, folder: Path | None) -> list[str]:
    """Put caches where ``model``, which has none, computes features of images; notes for the report. ``limit``: bytes, of all together."""
    points, reasons = _points(model)
    names = {module: name for name, module in model.named_modules()}
    for owner, method, below in points:
        owner.__dict__[REPLICATE] = Replicas(owner, method)
        owner.__dict__[method] = ImageCache(owner, method, below, limit // len(points), folder)
    notes = [f"image features: what {'.'.join(filter(None, (names[owner], method)))} returns is kept" for owner, method, _ in points]
    if not points and not reasons:
        reasons = ["no module here encodes images"]
    return notes + [f"image features are not kept: {reason}" for reason in reasons]


def _points(model: nn.Module) -> tuple[list[tuple[nn.Module, str, list[str]]], list[str]]:
    """(module, method, names below) of what is kept, and the reasons for what is not: METHODS where all below is constant and the
    model's forward calls it, else image encoders."""
    points, reasons, covered = [], [], set()
    for name, owner, method in _methods(model):
        try:
            below = names_below(owner, method)
            reason = why_not_constant(owner, below)
        except NotUnderstood as error:
            reason = str(error)
        if reason:
            reasons.append(f"{'.'.join(filter(None, (name, method)))}: {reason}")
            continue
        points.append((owner, method, below))
        covered |= {id(module) for _, module in modules_below(owner, below)}
    for name, module in model.named_modules():
        if id(module) in covered or not encodes_images(module, model):
            continue
        covered |= {id(inside) for inside in module.modules()}
        if reason := why_not_constant(module, [""]):
            reasons.append(f"{name}: {reason}")
        else:
            points.append((module, "forward", [""]))
    return points, reasons


def _methods(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, method) of every method that makes features of images, or of videos where not by that of images, and that the
    module's forward calls."""
    for name, owner in model.named_modules():
        for method in METHODS:
            if not callable(getattr(type(owner), method, None)) or delegates(owner, method) or not calls(owner, "forward", method):
                continue
            if method == FEATURES or not calls(owner, method, FEATURES):
                yield name, owner, method


def encodes_images(module: nn.Module, model: nn.Module) -> bool:
    """Whether ``module``, inside ``model``, is an image encoder."""
    if not isinstance(module, PreTrainedModel) or module is model or not any(True for _ in module.parameters()):
        return False
    config = getattr(module, "config", None)
    if any(getattr(config, name, None) is not None for name in ("text_config", "vision_config", "qformer_config")):
        return False
    modalities = getattr(module, "input_modalities", ())
    named = getattr(type(config), "base_config_key", "") == "vision_config"
    return named or (module.main_input_name == "pixel_values" and "text" not in modalities)
