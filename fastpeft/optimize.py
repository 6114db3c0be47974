"""Drop-in execution: exchange a model's modules in place for ones on fastpeft's operators, and take it back.

A module is exchanged by giving it another class with another ``forward``; its parameters, their names, its class's name, its hooks and
every reference to it stay (see methods/replacement.py for copies and pickles). A class is exchanged only where it is exactly the one known
(a subclass may mean something else).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

from fastpeft.coverage import Report, full_losses, survey
from fastpeft.methods.base import swap_class
from fastpeft.methods.quantized import is_quantized
from fastpeft.methods.replacement import REPLACED, is_fused, register
from fastpeft.methods.written import WrittenLinear
from fastpeft.models import blip, clip, layers, llama, llava, miss, vision_language

SWAPS = register(blip.SWAPS | blip.MODELS | clip.SWAPS | llama.SWAPS | layers.SWAPS)
# these hand masks, layouts and prefixes down in a form that only ours read
CARRIERS = {theirs: ours for theirs, ours in SWAPS.items() if ours in (*blip.CARRIERS, *llama.CARRIERS)}
NOTES = {blip.TextAttention: blip.MASK_FIX}
COMPUTES = {blip.TextLMHeadModel: ("cls.predictions",)}  # modules further in whose layers a fused class computes itself
# what makes a language-model loss: instances take the attribute ``lean_logits``
LOSS_MODULES = (
    llama.CausalLM,
    blip.TextLMHeadModel,
    miss.MissForQuestionAnswering,
    llava.LlavaMedForConditionalGeneration,
    vision_language.VisionLanguageModel,
)
READ_LOGITS = "logits of a training step are formed when they are read; its loss forms them at labelled positions only"
LEAN_LOGITS = "lean_logits: a training step with labels returns no logits; its loss forms them at labelled positions only"
NO_LEAN_LOGITS = "lean_logits changes nothing here: no loss of this model is fastpeft's"


def _tables() -> list:
    """The modules with tables of fused classes that are in use beside SWAPS: PEFT's and bitsandbytes' own layers."""
    tables = []
    if "peft" in sys.modules:
        from fastpeft.models import peft_layers

        tables.append(peft_layers)
    if "bitsandbytes" in sys.modules:
        from fastpeft.methods import bnb_layers

        tables.append(bnb_layers)
    return tables


def swaps() -> dict[type[nn.Module], type[nn.Module]]:
    """A known class -> its fused class; with PEFT's and bitsandbytes' own layers where these are in use."""
    known = dict(SWAPS)
    for table in _tables():
        known |= table.SWAPS
    return known


def optimize(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None, *, lean_logits: bool | None = None) -> Report:
    """Exchange every known module of ``model`` for its fused form, in place, and report on all that hold parameters.

    filter_fn(module, name) -> bool: return False to leave a module as it is. lean_logits: True says that nobody reads the logits of a
    training step, so they are not returned; False takes that back; None leaves it. Outputs, losses and gradients stay those of the model,
    up to rounding, except where the report's ``notes`` say otherwise. A module with hooks is called, never computed by the one around it.
    Call it as often as you like; :func:`restore` undoes it. TypeError for anything but a module.
    """
    _check_module("optimize", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"optimize: filter_fn must be a function of (module, name), not {type(filter_fn).__name__}")
    if lean_logits is not None and not isinstance(lean_logits, bool):
        raise TypeError(f"optimize: lean_logits must be True, False or None, not {type(lean_logits).__name__}")
    known, reasons, swapped = swaps(), {}, set()
    for name, module in reversed(list(model.named_modules())):  # what is inside a module before the module
        ours = known.get(type(module))
        if type(module) is nn.Linear and is_quantized(module.weight):
            ours = WrittenLinear
        if ours is None:
            continue
        if reason := _why_not(name, module, ours, filter_fn):
            reasons[module] = reason
        else:
            swap_class(module, ours)
            swapped.add(module)
    _rebind_forwards(model)
    report = survey(model, known, reasons, swapped, COMPUTES)
    report.notes = _notes(model, swapped, lean_logits)
    if not (report.swapped or report.already_fused or reasons):
        names = ", ".join(sorted({cls.__name__ for cls in known}))
        report.notes.insert(0, f"nothing here that fastpeft has a fused form of; known: {names}")
    return report


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        what = f"the class {model.__name__}" if isinstance(model, type) else what
        raise TypeError(f"{function} takes a model, a torch.nn.Module, not {what}; fastpeft.build makes one of a name or a folder")


def _why_not(name: str, module: nn.Module, ours: type[nn.Module], filter_fn) -> str:
    """'' or why ``module`` stays as it is."""
    if filter_fn is not None and not filter_fn(module, name):
        return "left out by filter_fn"
    if "forward" in module.__dict__:
        return "has a forward of its own over its class's, as accelerate's offloading gives it"
    unfit = getattr(ours, "unfit", None)
    return (unfit(module) if unfit is not None else "") or _needs_inside(module, ours)


def _notes(model: nn.Module, swapped: set[nn.Module], lean_logits: bool | None) -> list[str]:
    """Changes of behaviour that the exchange brings, and losses that stay as they are. Sets ``lean_logits``."""
    told = dict(NOTES)
    for table in _tables():
        told |= getattr(table, "NOTES", {})
    notes = [told[type(module)] for module in model.modules() if module in swapped and type(module) in told]
    losses = [module for module in model.modules() if isinstance(module, LOSS_MODULES)]
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


def _needs_inside(module: nn.Module, ours: type[nn.Module]) -> str:
    """'' or why this module cannot be exchanged: ours hands masks, causality and prefixes down in a form that only ours read."""
    if ours not in CARRIERS.values():
        return ""
    left = [name for name, child in module.named_modules() if isinstance(child, tuple(CARRIERS)) and not is_fused(child)]
    left.remove("")  # the module itself
    return f"{max(left, key=len)} inside it stays as it is" if left else ""


def restore(model: nn.Module) -> list[tuple[str, str]]:
    """Give every exchanged module its own class back. Returns (name, reason) of those that stay, because an attached adapter
    (Prefix, PTv2, Excitor, AdaptionPrompt, RepAdapter, MMAdapter) only runs in them. TypeError for anything but a module."""
    _check_module("restore", model)
    swaps()  # what is in use is registered
    needed, stayed = _needed(model), []
    for name, module in model.named_modules():
        module.__dict__.pop("lean_logits", None)
        if type(module) not in REPLACED:
            continue
        if module in needed:
            stayed.append((name, needed[module]))
        else:
            swap_class(module, REPLACED[type(module)])
    _rebind_forwards(model)
    return stayed


WORDS = {"prefix_encoder": "prefix", "excitor": "Excitor", "adaption": "adaption prompt", "mm_adapter": "adapter"}
FROM_ABOVE = ("excitor", "mm_adapter")  # the modules around these hand images or routes down to them


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
                for child in (module, *(c for c in module.modules() if type(c) in CARRIERS.values())):
                    needed.setdefault(child, f"needed by the {word} in {name or 'the model'}")
    return needed


def _above(name: str) -> list[str]:
    """The names of the modules around the one of this name, the model's first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts))]


def make_room_for_prefix(host: nn.Module) -> None:
    """Give a text model and what is below it the classes that can run with prefix keys."""
    for module in reversed(list(host.modules())):
        ours = CARRIERS.get(type(module))
        if ours is not None:
            if reason := _needs_inside(module, ours):
                raise ValueError(f"a prefix needs fastpeft's own {ours.__name__} here, but {reason}")
            swap_class(module, ours)
