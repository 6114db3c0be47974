"""Drop-in execution: exchange a model's modules in place for ones on fastpeft's operators, and take it back.

A module is exchanged by giving it another class with another ``forward``; its parameters, their names, its hooks and every reference
to it stay. A class is exchanged only where it is exactly the one known (a subclass may mean something else).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from fastpeft.methods.base import swap_class
from fastpeft.methods.quantized import is_quantized
from fastpeft.methods.written import WrittenLinear
from fastpeft.models import blip, clip, layers, llama

SWAPS = blip.SWAPS | clip.SWAPS | llama.SWAPS | layers.SWAPS
# these hand masks, layouts and prefixes down in a form that only ours read
CARRIERS = {theirs: ours for theirs, ours in SWAPS.items() if ours in (*blip.CARRIERS, *llama.CARRIERS)}
EIGHT_BIT = "bitsandbytes' 8-bit layers multiply by their weights written out; their own forward also rounds its input to 8 bit"
LEAN_LOSS = "a training step with labels returns no logits: they are formed at labelled positions only, for the loss"
NOTES = {
    blip.TextAttention: blip.MASK_FIX,
    blip.TextModel: "hidden states of padding are zero",
    blip.TextLMHeadModel: LEAN_LOSS,
    llama.Model: "hidden states of padding are zero; position_ids that start again within a row mark packed samples",
    llama.CausalLM: LEAN_LOSS,
}


def swaps() -> dict[type[nn.Module], type[nn.Module]]:
    """A known class -> ours; with PEFT's and bitsandbytes' own layers where these are in use."""
    known = SWAPS
    if "peft" in sys.modules:
        from fastpeft.models import peft_layers

        known = known | peft_layers.SWAPS
    if "bitsandbytes" in sys.modules:
        from fastpeft.methods import bnb_layers

        known = known | bnb_layers.SWAPS
    return known


@dataclass
class Report:
    """What :func:`optimize` did. ``swapped``: (name, class); ``skipped``: (name, reason); ``notes``: changes of behaviour."""

    swapped: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.skipped)} skipped"]
        lines += [f"  skipped {name or '(model)'}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def optimize(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Exchange every known module of ``model`` for its fused form, in place.

    filter_fn(module, name) -> bool: return False to leave a module as it is. Outputs, losses and gradients stay those of the model,
    up to rounding, except where the report's ``notes`` say otherwise. A module with hooks is called, never computed by the one around it.
    Call it as often as you like; :func:`restore` undoes it.
    """
    report, known = Report(), swaps()
    for name, module in reversed(list(model.named_modules())):  # what is inside a module before the module
        ours = known.get(type(module))
        if type(module) is nn.Linear and is_quantized(module.weight):
            ours = WrittenLinear
        if ours is None:
            continue
        reason = layers.supports_layer_norm(module) if type(module) is nn.LayerNorm else _needs_inside(module, ours)
        if hasattr(ours, "unfit"):
            reason = reason or ours.unfit(module)
        if "forward" in module.__dict__:
            reason = "has a forward of its own over its class's, as accelerate's offloading gives it"
        if filter_fn is not None and not filter_fn(module, name):
            reason = "left out by filter_fn"
        if reason:
            report.skipped.insert(0, (name, reason))
            continue
        swap_class(module, ours)
        report.swapped.insert(0, (name, ours.__name__))
        note = NOTES.get(ours, EIGHT_BIT if ours.__name__ == "Linear8bit" else None)  # it exists where bitsandbytes does
        if note is not None and note not in report.notes:
            report.notes.append(note)
    _rebind_forwards(model)
    if not report.swapped and not report.skipped:
        names = ", ".join(sorted({cls.__name__ for cls in known}))
        report.skipped.append(("", f"nothing here that fastpeft has a fused form of (or all is fused already); known: {names}"))
    return report


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
    left = [name for name, child in module.named_modules() if isinstance(child, tuple(CARRIERS)) and type(child) not in CARRIERS.values()]
    left.remove("")  # the module itself
    return f"{max(left, key=len)} inside it stays as it is" if left else ""


def restore(model: nn.Module) -> list[tuple[str, str]]:
    """Give every exchanged module its own class back. Returns (name, reason) of those that stay, because an attached method
    (Prefix, PTv2, Excitor) can only run in them."""
    original = {ours: theirs for theirs, ours in swaps().items()} | {WrittenLinear: nn.Linear}
    needed = {
        child: f"needed by the prefix in {name or 'the model'}"
        for name, module in model.named_modules()
        if getattr(module, "prefix_encoder", None) is not None
        for child in module.modules()
        if type(child) in CARRIERS.values()
    }
    for kind, told in (("excitor", "needed by its Excitor"), ("adaption", "needed by its adaption prompt")):
        needed |= {module: told for module in model.modules() if getattr(module, kind, None) is not None}
    stayed = []
    for name, module in model.named_modules():
        if type(module) not in original:
            continue
        if module in needed:
            stayed.append((name, needed[module]))
        else:
            swap_class(module, original[type(module)])
    _rebind_forwards(model)
    return stayed


def make_room_for_prefix(host: nn.Module) -> None:
    """Give a text model and what is below it the classes that can run with prefix keys."""
    for module in reversed(list(host.modules())):
        ours = CARRIERS.get(type(module))
        if ours is not None:
            if reason := _needs_inside(module, ours):
                raise ValueError(f"a prefix needs fastpeft's own {ours.__name__} here, but {reason}")
            swap_class(module, ours)
