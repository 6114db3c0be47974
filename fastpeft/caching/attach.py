"""Where a model gets image caches, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

import psutil
from torch import nn
from transformers import PreTrainedModel

from fastpeft.caching.frozen import NotUnderstood, calls, delegates, modules_below, names_below, why_not_constant
from fastpeft.caching.images import ImageCache, image_caches
from fastpeft.options import bytes_of

FEATURES = "get_image_features"


def forget_images(model: nn.Module) -> None:
    """Take the caches in ``model`` away."""
    for cache in image_caches(model):
        cache.flush()
        cache.owner.__dict__.pop(cache.method, None)


def place_of(where: str | Path) -> tuple[int, Path | None]:
    """(bytes of host memory, folder) of "4GB" or of a folder, which gets a third of the free memory. ValueError or TypeError for others."""
    if not isinstance(where, (str, Path)) or not str(where).strip():
        raise TypeError(f"optimize: cache_images must be a size such as '4GB', or a folder, not {where!r}")
    text = str(where).strip()
    if isinstance(where, str) and text[0] in "0123456789.-+" and "/" not in text and text not in (".", "..") and not Path(text).is_dir():
        try:
            return bytes_of(text), None
        except ValueError as error:
            raise ValueError(f"optimize: cache_images: {error}; or give a folder that exists, or a path with a slash") from None
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"optimize: cache_images={text!r} is a file: give a folder, or a size such as '4GB'")
    return psutil.virtual_memory().available // 3, folder


def keep_images(model: nn.Module, limit: int, folder: Path | None) -> list[str]:
    """Put caches where ``model``, which has none, computes features of images; notes for the report. ``limit``: bytes, of all together."""
    points, reasons = _points(model)
    names = {module: name for name, module in model.named_modules()}
    for owner, method, below in points:
        owner.__dict__[method] = ImageCache(owner, method, below, limit // len(points), folder)
    notes = [f"image features: what {'.'.join(filter(None, (names[owner], method)))} returns is kept" for owner, method, _ in points]
    if not points and not reasons:
        reasons = ["no module here encodes images"]
    return notes + [f"image features are not kept: {reason}" for reason in reasons]


def _points(model: nn.Module) -> tuple[list[tuple[nn.Module, str, list[str]]], list[str]]:
    """(module, method, names below) of what is kept, and the reasons for what is not: get_image_features where all below it is constant and
    the model's forward calls it, else image encoders."""
    points, reasons, covered = [], [], set()
    for name, owner in model.named_modules():
        if not callable(getattr(type(owner), FEATURES, None)) or delegates(owner, FEATURES) or not calls(owner, "forward", FEATURES):
            continue
        try:
            below = names_below(owner, FEATURES)
            reason = why_not_constant(owner, below)
        except NotUnderstood as error:
            reason = str(error)
        if reason:
            reasons.append(f"{'.'.join(filter(None, (name, FEATURES)))}: {reason}")
            continue
        points.append((owner, FEATURES, below))
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
