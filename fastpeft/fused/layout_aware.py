"""Modules that hand layouts, masks and prefixes down to each other, and are exchanged together or not at all."""

from __future__ import annotations

from torch import nn

from fastpeft.registry import exchange, form_of, form_of_class, is_fused


def why_not_inside(module: nn.Module) -> str:
    """'' or why ``module`` cannot be exchanged although its settings fit: a layout-aware form hands on masks, causality and prefixes in a
    way that only fused modules read, and a layout-aware module inside stays as it is."""
    if not form_of(module).layout_aware:
        return ""
    left = [name for name, child in module.named_modules() if child is not module and _left(child)]
    return f"{max(left, key=len)} inside it stays as it is" if left else ""


def _left(module: nn.Module) -> bool:
    """Whether ``module`` is layout-aware, or of a subclass of a layout-aware class, and not fused."""
    if is_fused(module):
        return False
    return any((form := form_of_class(cls)) is not None and form.layout_aware for cls in type(module).__mro__)


def make_room_for_prefix(host: nn.Module) -> None:
    """Give a text model and what is below it the classes that can run with prefix keys. ValueError where a module inside prevents it."""
    for module in reversed(list(host.modules())):
        form = form_of(module)
        if form is not None and form.layout_aware and not is_fused(module):
            if reason := why_not_inside(module):
                raise ValueError(f"a prefix needs fastpeft's own {type(module).__name__} here, but {reason}")
            exchange(module)
