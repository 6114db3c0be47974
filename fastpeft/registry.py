"""Registry of fused modules: which class each replaces, and the exchange of a module's class.

A fused module is written as a mixin: a class with a ``forward`` and without a base. :func:`fuses` registers it as the implementation of a
:class:`Form`, what the code of one or more known classes computes, each named by its dotted path. Nothing is imported for that. When a
module of a known class is met, the registry makes the class (mixin, known class) that replaces it, once. The class is exactly the one that
its dotted path leads to: a subclass may compute something else, and has no form.

transformers, PEFT, accelerate, FSDP and Trainer choose what to do by the name of a module's class. A replacement therefore reports the
``__name__``, ``__qualname__`` and ``__module__`` of the class it replaces.

- A copy (``copy``, ``deepcopy``) is fused.
- A pickle names the replaced class: it loads wherever that class can be imported, and gives the module before ``optimize``. Only where it
  needs fastpeft anyway, as a module of fastpeft's own is inside (a linear layer with LoRA, a prefix, Excitor, ...), it comes back fused.

Classes that add parameters (:class:`fastpeft.methods.adapted.AdaptedLinear` and its kind) replace none: they keep their own names.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar

from torch import nn

from fastpeft._when_imported import loaded

Mixin = TypeVar("Mixin", bound=type)


@dataclass(frozen=True, eq=False)
class Form:
    """What the code of some classes computes, and its fused implementation.

    ``fused``: the mixin; ``classes``: dotted paths of the classes known to have the form; ``layout_aware``: takes and hands on layouts,
    key masks and prefixes, so every layout-aware module inside must be exchanged with it; ``note``: a change of behaviour that the report
    mentions; ``computes``: paths of modules inside whose layers it computes itself; ``applies``: of modules of these classes, which have
    the form (None: all).
    """

    fused: type
    classes: tuple[str, ...]
    layout_aware: bool = False
    note: str = ""
    computes: tuple[str, ...] = ()
    applies: Callable[[nn.Module], bool] | None = None

    def why_not(self, module: nn.Module) -> str:
        """'' or why ``module``, of one of the known classes, cannot be exchanged with its present settings."""
        check = getattr(self.fused, "why_not", None)
        return "" if check is None else check(module)


_FORMS: dict[str, Form] = {}  # dotted path of a known class -> its form
_BY_CODE: list[tuple[Callable[[type], bool], Form]] = []  # (what the code of a class must be, its form)
_FUSED: dict[type[nn.Module], type[nn.Module]] = {}  # a known class -> the class that replaces it, made when first needed
_REPLACED: dict[type[nn.Module], type[nn.Module]] = {}  # and back


def fuses(
    *classes: str,
    layout_aware: bool = False,
    note: str = "",
    computes: tuple[str, ...] = (),
    applies: Callable[[nn.Module], bool] | None = None,
) -> Callable[[Mixin], Mixin]:
    """Register the decorated mixin as the fused implementation of ``classes``, dotted paths (see :class:`Form`). A mixin whose forms differ
    in their options takes several decorators."""

    def register(fused: Mixin) -> Mixin:
        form = Form(fused, classes, layout_aware, note, computes, applies)
        for path in classes:
            assert path not in _FORMS, f"{path} has two fused forms"
            _FORMS[path] = form
        return fused

    return register


def known_names() -> list[str]:
    """Names of the classes with a form, whether or not they are imported; PEFT's with the method's before it (``lora.Linear``)."""
    parts = [path.split(".") for path, form in _FORMS.items() if form.applies is None]
    return sorted({f"{part[2]}.{part[-1]}" if part[:2] == ["peft", "tuners"] else part[-1] for part in parts})


def known_classes() -> Iterator[type[nn.Module]]:
    """The classes with a form that are imported."""
    for path in _FORMS:
        home, _, name = path.rpartition(".")
        if (module := loaded(home)) is not None and hasattr(module, name):
            yield getattr(module, name)


def path_of(cls: type) -> str | None:
    """The dotted path that leads to exactly this class, or to the one it replaces; None where no path does."""
    theirs = _REPLACED.get(cls, cls)
    found = getattr(loaded(theirs.__module__), theirs.__qualname__, None)
    return f"{theirs.__module__}.{theirs.__qualname__}" if found is theirs else None


def form_of_class(cls: type) -> Form | None:
    """The form of exactly this class, or of the class it replaces."""
    path = path_of(cls)
    if (form := _FORMS.get(path)) is not None or path is None:
        return form
    return _form_by_code(_REPLACED.get(cls, cls))


@cache
def _form_by_code(cls: type) -> Form | None:
    return next((form for applies, form in _BY_CODE if issubclass(cls, nn.Module) and applies(cls)), None)


def form_of(module: nn.Module) -> Form | None:
    """The form of ``module``, fused or not; None where it has none."""
    form = form_of_class(type(module))
    return form if form is None or form.applies is None or form.applies(module) else None


def has_form(module: nn.Module, fused: type) -> bool:
    """Whether ``module`` computes what the mixin ``fused`` does: it is fused so, or exactly of a class that ``fused`` replaces."""
    if isinstance(module, fused):
        return True
    form = form_of(module)
    return form is not None and form.fused is fused


def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that replaces ``cls``, which has a form; made at the first call."""
    if (ours := _FUSED.get(cls)) is not None:
        return ours
    fused = form_of_class(cls).fused
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": fused.__doc__}
    if "__firstlineno__" in cls.__dict__:  # where inspect finds a class's source in its module, from Python 3.13 on
        names["__firstlineno__"] = cls.__firstlineno__
    if getattr(getattr(fused, "forward", None), "signature_of_replaced", False):

        @wraps(cls.forward)
        def forward(self, *args, **kwargs):
            return fused.forward(self, *args, **kwargs)

        names["forward"] = forward
    if (make := getattr(fused, "forward_of", None)) is not None:
        names["forward"] = make(cls)
    _FUSED[cls] = ours = type(cls)(cls.__name__, (fused, cls), names | {"__reduce_ex__": _reduce_ex, "__copy__": _copy})
    # where copy.deepcopy looks first. A method named __deepcopy__ would also answer for wrappers that hand attributes on (PEFT's models,
    # torch.compile's): a copy of one would be a copy of what it wraps
    copy._deepcopy_dispatch[ours] = _deepcopy
    _REPLACED[ours] = cls
    return ours


def fuses_code(applies: Callable[[type[nn.Module]], bool]) -> Callable[[Mixin], Mixin]:
    """Register the decorated mixin for every class of transformers' without a form of its own for which ``applies(cls)``. A ``forward_of``
    of the mixin makes the forward of each replacing class from the class it replaces."""

    def register(fused: Mixin) -> Mixin:
        _BY_CODE.append((applies, Form(fused, ())))
        return fused

    return register


def signature_of_replaced(forward: Callable) -> Callable:
    """Mark a mixin's ``forward(*args, **kwargs)``: in each class made of it, it reports the signature of the forward it replaces."""
    forward.signature_of_replaced = True
    return forward


def swap_class(module: nn.Module, cls: type) -> None:
    """Give ``module`` another class of the same layout: parameters, names, hooks and identity stay."""
    assert issubclass(cls, type(module)) or issubclass(type(module), cls), (type(module), cls)
    module.__class__ = cls


def replaced_class(cls: type) -> type | None:
    """The class that ``cls`` replaces; None for a class that replaces none."""
    return _REPLACED.get(cls)


def exchange(module: nn.Module) -> None:
    """Give ``module``, which has a form, its fused class."""
    if type(module) not in _REPLACED:
        swap_class(module, fused_class(type(module)))


def give_back(module: nn.Module) -> None:
    """Give ``module``, if its class is fused, the class that was replaced."""
    if (theirs := _REPLACED.get(type(module))) is not None:
        swap_class(module, theirs)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is of a fused class, or of one that a wrapper such as ``fully_shard`` made of it."""
    return any(cls in _REPLACED for cls in type(module).__mro__)


def is_own(module: nn.Module) -> bool:
    """Whether ``module`` is of one of fastpeft's own classes, which replace none."""
    return type(module).__module__.split(".")[0] == "fastpeft"


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


def fused_inside(module: nn.Module) -> dict[str, type]:
    """Of the fused modules in ``module``, itself included: name -> mixin, as a pickle keeps them."""
    return {name: form_of_class(type(child)).fused for name, child in module.named_modules() if type(child) in _REPLACED}


def fuse(module: nn.Module, fused: dict[str, type]) -> None:
    """Exchange the modules that :func:`fused_inside` named, where they are not fused. That an unpickled mixin is there means that its file
    is imported, so it is registered."""
    for name in fused:
        child = module.get_submodule(name)
        if form_of_class(type(child)) is not None:
            exchange(child)


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    theirs = _REPLACED.get(type(self))
    if theirs is None:  # a subclass of a fused class, under its own name
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__()
    # what pickles of protocol 0 call; copyreg.__newobj__ takes no class but the object's own
    plain = (copyreg._reconstructor, (theirs, object, None))
    if any(map(is_own, self.modules())):
        return (*plain, (state, fused_inside(self)), None, None, set_fused_state)
    state.pop("lean_logits", None)
    return (*plain, state)


def set_fused_state(module: nn.Module, saved: tuple[dict[str, Any], dict[str, type]]) -> None:
    """Complete an unpickled module: (its state, the fused modules in it)."""
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
