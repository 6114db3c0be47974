"""Drop-in execution: a model's modules exchanged in place for fused ones, and the way back.

A module is exchanged by giving it another class with another ``forward``; its parameters, their names, its class's name, its hooks and
every reference to it stay. Which classes have a fused form is in :mod:`fastpeft.registry`, with what becomes of copies and pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

import fastpeft.fused  # noqa: F401  its modules register what they replace
from fastpeft.caching.attach import forget_images, forget_layers, keep_images, keep_layers, place_of
from fastpeft.coverage import Report, full_losses, measure_coverage
from fastpeft.fused.layout_aware import why_not_inside
from fastpeft.methods.mm_adapter import BEFORE
from fastpeft.registry import exchange, form_of, give_back, is_fused, known_names

READ_LOGITS = "logits of a training step are formed when they are read; its loss forms them at labelled positions only"
LEAN_LOGITS = "lean_logits: a training step with labels returns no logits; its loss forms them at labelled positions only"
NO_LEAN_LOGITS = "lean_logits changes nothing here: no loss of this model is fastpeft's"


def optimize(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    cache_images: str | Path | bool | None = None,
    lean_logits: bool | None = None,
    cache_layers: str | Path | bool | None = None,
) -> Report:
    """Exchange every known module of ``model`` for its fused form, in place, and report on all that hold parameters.

    filter_fn(module, name) -> bool: return False to leave a module as it is. cache_images: a size of host memory ("4GB") or a folder, to
    keep there what frozen image encoders compute (:mod:`fastpeft.caching.images`); cache_layers: the same, to keep what the lower layers
    of language models compute that train nothing (:mod:`fastpeft.caching.layers`). lean_logits: True says that nobody reads the logits
    of a training step, nor an encoder's last hidden state beside them, so they are not returned. False takes either back; None leaves it.
    Outputs, losses and gradients stay those of the model, up to rounding, except where the report's ``notes`` say otherwise. A module with
    hooks is called, never computed by the one around it.
    Call it as often as you like; :func:`restore` undoes it. TypeError for anything but a module.
    """
    _check_module("optimize", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"optimize: filter_fn must be a function of (module, name), not {type(filter_fn).__name__}")
    if lean_logits is not None and not isinstance(lean_logits, bool):
        raise TypeError(f"optimize: lean_logits must be True, False or None, not {type(lean_logits).__name__}")
    place = None if cache_images in (None, False) else place_of(cache_images)
    below = None if cache_layers in (None, False) else place_of(cache_layers, "optimize: cache_layers")
    reasons, swapped = {}, set()
    for name, module in reversed(list(model.named_modules())):  # what is inside a module before the module
        if is_fused(module) or form_of(module) is None:
            continue
        if reason := _why_not(name, module, filter_fn):
            reasons[module] = reason
        else:
            exchange(module)
            swapped.add(module)
    _rebind_forwards(model)
    report = measure_coverage(model, reasons, swapped)
    report.notes = _notes(model, swapped, lean_logits)
    if cache_images is not None:
        forget_images(model)
        report.notes += [] if place is None else keep_images(model, *place)
    if cache_layers is not None:
        forget_layers(model)
        report.notes += [] if below is None else keep_layers(model, *below)
    if not (report.swapped or report.already_fused or reasons):
        report.notes.insert(0, f"nothing here that fastpeft has a fused form of; known: {', '.join(known_names())}")
    return report


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        what = f"the class {model.__name__}" if isinstance(model, type) else what
        raise TypeError(f"{function} takes a model, a torch.nn.Module, not {what}; fastpeft.build makes one of a name or a folder")


def _why_not(name: str, module: nn.Module, filter_fn) -> str:
    """'' or why ``module`` stays as it is."""
    if filter_fn is not None and not filter_fn(module, name):
        return "left out by filter_fn"
    if "forward" in module.__dict__:
        return "has a forward of its own over its class's, as accelerate's offloading gives it"
    return form_of(module).why_not(module) or why_not_inside(module)


def _notes(model: nn.Module, swapped: set[nn.Module], lean_logits: bool | None) -> list[str]:
    """Changes of behaviour that the exchange brings, and losses that stay as they are. Sets ``lean_logits``."""
    notes = [note for module in model.modules() if module in swapped and (note := form_of(module).note)]
    losses = [module for module in model.modules() if hasattr(type(module), "lean_logits")]  # what makes a language-model loss of ours
    for module in losses:
        if lean_logits:
            module.lean_logits = True
        elif lean_logits is not None:
            module.__dict__.pop("lean_logits", None)
    if lean_logits:
        notes.append(LEAN_LOGITS if losses else NO_LEAN_LOGITS)
    elif any(module in swapped or lean_logits is False for module in losses):
        notes.append(READ_LOGITS)
    if full := full_losses(model):
        notes.append(f"the loss of {', '.join(full)} stays its own: it forms the logits of every position")
    return list(dict.fromkeys(notes))


def _rebind_forwards(model: nn.Module) -> None:
    """Who keeps another module's bound ``forward``, as PEFT's adaption prompt does of the model, gets that of its class now."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, nn.Module) and owner is not module and forward.__name__ == "forward":
            module.forward = owner.forward


def restore(model: nn.Module) -> list[tuple[str, str]]:
    """Give every exchanged module its own class back. Returns (name, reason) of those that stay, because an attached adapter
    (Prefix, PTv2, Excitor, AdaptionPrompt, RepAdapter, MMAdapter) only runs in them. TypeError for anything but a module."""
    _check_module("restore", model)
    forget_images(model)
    forget_layers(model)
    needed, stayed = _needed(model), []
    for name, module in model.named_modules():
        module.__dict__.pop("lean_logits", None)
        if is_fused(module) and module in needed:
            stayed.append((name, needed[module]))
        else:
            give_back(module)
    _rebind_forwards(model)
    return stayed


WORDS = {"prefix_encoder": "prefix", "excitor": "Excitor", "adaption": "adaption prompt"}
WORDS |= dict.fromkeys(BEFORE, "adapter")
FROM_ABOVE = ("excitor", *BEFORE)  # the modules around these hand images or routes down to them


def _needed(model: nn.Module) -> dict[nn.Module, str]:
    """The fused modules that an adapter needs, and why: what it is attached to, what hands it its inputs, and what these hand masks and
    layouts down to."""
    needed: dict[nn.Module, str] = {}
    modules = dict(model.named_modules())
    for name, host in modules.items():
        for kind, word in WORDS.items():
            if getattr(host, kind, None) is None or not is_fused(host):
                continue
            needed[host] = f"needed by its {word}" if kind != "prefix_encoder" else f"needed by the prefix in {name or 'the model'}"
            around = [modules[above] for above in _above(name) if above in modules] if kind in FROM_ABOVE else []
            for module in (host, *filter(is_fused, around)):
                for child in (module, *filter(_is_layout_aware, module.modules())):
                    needed.setdefault(child, f"needed by the {word} in {name or 'the model'}")
    return needed


def _above(name: str) -> list[str]:
    """The names of the modules around the one of this name, the model's first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts))]


def _is_layout_aware(module: nn.Module) -> bool:
    """Whether ``module`` is fused and takes and hands on layouts, masks and prefixes."""
    return is_fused(module) and (form := form_of(module)) is not None and form.layout_aware
