"""Fused classes under the names of the classes they replace, and what copies and pickles of them are.

transformers, PEFT, accelerate, FSDP and Trainer choose what to do by the name of a module's class. A fused class therefore reports the
``__name__``, ``__qualname__`` and ``__module__`` of the class it replaces.

- A copy (``copy``, ``deepcopy``) is fused.
- A pickle names the replaced class: it loads wherever that class can be imported, and gives the module before ``optimize``. Only where it
  needs fastpeft anyway, as a module of fastpeft's own is inside (a linear layer with LoRA, a prefix, Excitor, ...), it comes back fused.

Classes that add parameters (:class:`fastpeft.methods.adapted.AdaptedLinear` and its kind) are no replacement: they keep their own names.
"""

from __future__ import annotations

import copy
import copyreg
from typing import Any

from torch import nn

from fastpeft.methods.base import swap_class

REPLACED: dict[type[nn.Module], type[nn.Module]] = {}  # a fused class -> the class it replaces


def register(swaps: dict[type[nn.Module], type[nn.Module]]) -> dict[type[nn.Module], type[nn.Module]]:
    """Give every fused class of ``swaps`` (a class -> its fused class) the names of the class it replaces. Returns ``swaps``."""
    for theirs, ours in swaps.items():
        assert REPLACED.setdefault(ours, theirs) is theirs and issubclass(ours, theirs), (ours, theirs)
        ours.__name__, ours.__qualname__, ours.__module__ = theirs.__name__, theirs.__qualname__, theirs.__module__
        if "__firstlineno__" in theirs.__dict__:  # where inspect finds a class's source in its module, from Python 3.13 on
            ours.__firstlineno__ = theirs.__firstlineno__
        ours.__reduce_ex__, ours.__copy__ = _reduce_ex, _copy
        # where copy.deepcopy looks first. A method named __deepcopy__ would also answer for wrappers that hand attributes on (PEFT's
        # models, torch.compile's): a copy of one would be a copy of what it wraps
        copy._deepcopy_dispatch[ours] = _deepcopy
    return swaps


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is of a fused class, or of one that a wrapper such as ``fully_shard`` made of it."""
    return any(cls in REPLACED for cls in type(module).__mro__)


def is_own(module: nn.Module) -> bool:
    """Whether ``module`` is of one of fastpeft's own classes, which replace none."""
    return type(module).__module__.split(".")[0] == "fastpeft"


def fused_names(module: nn.Module) -> list[str]:
    """The names of the fused modules in ``module``, "" for itself."""
    return [name for name, child in module.named_modules() if type(child) in REPLACED]


def fuse(module: nn.Module, names: list[str]) -> None:
    """Give the modules of these names their fused classes, where they do not have them."""
    known = {theirs: ours for ours, theirs in REPLACED.items()}
    for child in map(module.get_submodule, names):
        if type(child) in known:
            swap_class(child, known[type(child)])


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    theirs = REPLACED.get(type(self))
    if theirs is None:  # a subclass of a fused class, under its own name
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__()
    # what pickles of protocol 0 call; copyreg.__newobj__ takes no class but the object's own
    plain = (copyreg._reconstructor, (theirs, object, None))
    if any(map(is_own, self.modules())):
        return (*plain, (state, fused_names(self)), None, None, set_fused_state)
    state.pop("lean_logits", None)
    return (*plain, state)


def set_fused_state(module: nn.Module, saved: tuple[dict[str, Any], list[str]]) -> None:
    """Complete an unpickled module: (its state, the names of the fused modules in it)."""
    module.__setstate__(saved[0])
    fuse(module, saved[1])


def _copy(self: nn.Module) -> nn.Module:
    twin = object.__new__(type(self))
    twin.__setstate__(self.__getstate__())
    return twin


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    memo[id(self)] = twin = object.__new__(type(self))
    twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
    return twin
