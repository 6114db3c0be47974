"""Registry of fused modules: which class each replaces, and the exchange of a module's class.

A fused module is written as a mixin: a class with a ``forward`` and without a base. :func:`fuses` registers it as the implementation of a
:class:`Form`, what the code of some classes computes. Nothing is imported for that. A class has a form in one of four ways:

- by its code: ``@fuses("transformers.models.llama.modeling_llama.LlamaRMSNorm", code="c1bea3d3ab9e")``. Every class whose forward, with all
  that it reaches, has one of these digests (:mod:`fastpeft.forms`; several, one per release, stand in one string with spaces between) has
  the form, whatever its name and whoever wrote it. The dotted path names an example. ``python -m bench.forms PATH ...`` prints digests.
  A class at the path of an example whose code has another digest has changed, and is left alone.
- by its dotted path alone, where ``code`` is empty: PyTorch's layers, PEFT's.
- as a subclass of such a class that overrides nothing that the class or the mixin reads.
- by a rule, ``@fuses(rule=...)`` of the class, where it has none of these; the mixin's ``forward_of(cls)`` then makes the new forward.

What code does not say, an instance does: ``why_not(module)`` of the mixin gives the reason why this one cannot be exchanged (an activation
of another kind, a missing weight). When a module of a class with a form is met, the registry makes the class (mixin, class) that replaces
it, once. Where both forwards name their arguments differently, the replacement takes the names of the class it replaces.

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
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastpeft._when_imported import loaded
from fastpeft.forms import code_of, digest

Mixin = TypeVar("Mixin", bound=type)


@dataclass(frozen=True, eq=False)
class Form:
    """What the code of some classes computes, and its fused implementation.

    ``fused``: the mixin; ``classes``: dotted paths of classes that have the form, all of them where ``code`` is empty; ``code``: digests
    of what a class's forward computes; ``layout_aware``: takes and hands on layouts, key masks and prefixes, so every layout-aware module
    inside must be exchanged with it; ``note``: a change of behaviour that the report mentions; ``computes``: paths of modules inside whose
    layers it computes itself; ``applies``: of modules of these classes, which have the form (None: all).
    """

    fused: type
    classes: tuple[str, ...]
    layout_aware: bool = False
    note: str = ""
    computes: tuple[str, ...] = ()
    applies: Callable[[nn.Module], bool] | None = None
    code: tuple[str, ...] = ()

    def why_not(self, module: nn.Module) -> str:
        """'' or why ``module``, of one of the known classes, cannot be exchanged with its present settings."""
        shadowed = next((name for name in (*module._modules, *module._parameters, *module._buffers) if hasattr(self.fused, name)), None)
        if shadowed is not None:
            return f"its {shadowed} has a name of the fused module's own"
        code = code_of(original_class(module)) if self.code else None
        if code is not None and (name := code.own_method(module)):
            return f"has a {name} of its own over its class's"
        check = getattr(self.fused, "why_not", None)
        return "" if check is None else check(module)


_FORMS: dict[str, Form] = {}  # dotted path of a known class -> its form
_CODES: dict[str, Form] = {}  # digest of a class's code -> its form
# class -> ((its digest, its forward), what these and its bases gave)
_FOUND: WeakKeyDictionary[type, tuple[tuple[str | None, Callable], Form | None]] = WeakKeyDictionary()
_RULES: list[tuple[Callable[[type], bool], Form]] = []  # (whether a class has the form, the form)
_FUSED: dict[type[nn.Module], type[nn.Module]] = {}  # a known class -> the class that replaces it, made when first needed
_REPLACED: dict[type[nn.Module], type[nn.Module]] = {}  # and back
_FORM_OF: dict[type[nn.Module], Form] = {}  # a class that replaces one -> its form


def fuses(
    *classes: str,
    code: str = "",
    layout_aware: bool = False,
    note: str = "",
    computes: tuple[str, ...] = (),
    applies: Callable[[nn.Module], bool] | None = None,
    rule: Callable[[type[nn.Module]], bool] | None = None,
) -> Callable[[Mixin], Mixin]:
    """Register the decorated mixin as the fused implementation of ``classes``, dotted paths, and of every class whose code has one of the
    digests in ``code`` (see the module's docstring and :class:`Form`). A mixin of several forms takes several decorators."""

    def register(fused: Mixin) -> Mixin:
        form = Form(fused, classes, layout_aware, note, computes, applies, tuple(code.split()))
        for table, keys in ((_FORMS, classes), (_CODES, form.code)):
            for key in keys:
                assert key not in table, f"{key} has two fused forms"
                table[key] = form
        if rule is not None:
            _RULES.append((rule, form))
        _FOUND.clear()
        return fused

    return register


def known_names() -> list[str]:
    """Names of the classes with a form, whether or not they are imported; PEFT's with the method's before it (``lora.Linear``)."""
    parts = [path.split(".") for path, form in _FORMS.items() if form.applies is None]
    return sorted({f"{part[2]}.{part[-1]}" if part[:2] == ["peft", "tuners"] else part[-1] for part in parts})


def recorded() -> dict[str, tuple[str, ...]]:
    """The dotted paths of classes that have a form by their code, each with its digests."""
    return {path: form.code for path, form in _FORMS.items() if form.code}


def known_classes() -> Iterator[type[nn.Module]]:
    """The imported classes that have a form, in the installed version of their library."""
    for path in _FORMS:
        home, _, name = path.rpartition(".")
        if (cls := getattr(loaded(home), name, None)) is not None and form_of_class(cls) is not None:
            yield cls


def path_of(cls: type) -> str | None:
    """The dotted path that leads to exactly this class, or to the one it replaces; None where no path does."""
    theirs = _REPLACED.get(cls, cls)
    found = getattr(loaded(theirs.__module__), theirs.__qualname__, None)
    return f"{theirs.__module__}.{theirs.__qualname__}" if found is theirs else None


def form_of_class(cls: type) -> Form | None:
    """The form of this class, or of the class it replaces."""
    if (form := _FORM_OF.get(cls)) is not None:
        return form
    theirs = _REPLACED.get(cls, cls)
    form = _FORMS.get(path_of(theirs))
    if form is not None and not form.code:
        return form
    if torch.compiler.is_compiling():  # a graph has no use for source files: what is not exchanged is called
        return None
    if theirs.__module__.split(".")[0] in ("torch", "builtins") or not issubclass(theirs, nn.Module):
        return None
    code = digest(theirs)
    written = (code, theirs.forward)  # of long forwards no digest tells that they are others
    kept = _FOUND.get(theirs)
    if kept is None or kept[0] != written:
        kept = _FOUND[theirs] = written, None if why_wrapped(theirs) else _find(theirs, code)
    return kept[1]


def _find(cls: type, code: str | None) -> Form | None:
    if (form := _CODES.get(code)) is not None:
        return None if overridden(cls, form, _parents(cls)) else form
    inherited = next((form for base in cls.__mro__[1:] if (form := _inherited(cls, base)) is not None), None)
    return inherited or next((form for rule, form in _RULES if rule(cls)), None)


def _parents(cls: type) -> tuple[type, ...]:
    """``cls`` and the classes it is made of, short of PyTorch's."""
    return tuple(kind for kind in cls.__mro__ if kind.__module__.split(".")[0] not in ("torch", "builtins"))


def _inherited(cls: type, base: type) -> Form | None:
    """The form that ``cls`` has of ``base``, a class with a form by its path, where nothing between them overrides what the form reads."""
    form = _FORMS.get(path_of(base))
    if form is None or form.code:
        return None
    order = cls.__mro__
    between = order[: order.index(base)]
    if not all(issubclass(kind, base) for kind in between) or order[len(between) :] != base.__mro__:
        return None  # some other class takes part, which may do anything
    return None if overridden(cls, form, between, base) else form


ALWAYS_READ = frozenset(("__call__", "__getattr__", "__getattribute__", "__setattr__", "__torch_function__", "forward"))


def overridden(cls: type, form: Form, between: tuple[type, ...], base: type | None = None) -> list[str]:
    """Names that the fused module reads or has, and that classes ``between`` set in another way than ``base``. Without a base: names that
    the mixin has and the class's code does not know."""
    own = {name for kind in form.fused.__mro__[:-1] for name in vars(kind) if not name.startswith("__")}
    if base is None:
        # transformers' own layer that checkpoints has a __call__, which passes everything on
        own |= ALWAYS_READ
        theirs = {name for kind in between if kind.__module__ != "transformers.modeling_layers" for name in vars(kind)}
        return sorted((own & theirs) - {"forward"})
    read = own | ALWAYS_READ | _names_in(form.fused)
    code = code_of(base)
    read |= set() if code is None else code.reads
    # transformers wraps the forward of every subclass of a layer, also one that it inherits
    return [name for kind in reversed(between) for name in vars(kind) if name in read and not _same_function(cls, base, name)]


def _same_function(cls: type, base: type, name: str) -> bool:
    ours, theirs = (inspect.unwrap(value) if callable(value := getattr(kind, name, None)) else value for kind in (cls, base))
    return ours is theirs and ours is not None


def _names_in(fused: type) -> set[str]:
    """Attributes, and other names, that the mixin's functions read."""
    codes = [f.__code__ for kind in fused.__mro__[:-1] for f in vars(kind).values() if isinstance(f, FunctionType)]
    for code in codes:
        codes.extend(inner for inner in code.co_consts if inspect.iscode(inner))
    return {name for code in codes for name in code.co_names}


def why_wrapped(cls: type) -> str:
    """'' or why a class, though it may have the code of a form, is not looked at."""
    if any(base in _REPLACED for base in cls.__mro__[1:]) and cls not in _REPLACED:
        return "a wrapper's class around a fused one"
    if any(base.__module__.startswith("torch.distributed.fsdp") for base in cls.__mro__):
        return "sharded by fully_shard before optimize; call optimize first"
    return ""


def why_changed(cls: type) -> str:
    """'' or, for a class at a known path, that its code is not the code that fastpeft knows."""
    path = path_of(cls)
    form = _FORMS.get(path)
    if form is None or not form.code or digest(_REPLACED.get(cls, cls)) in form.code:
        return ""
    return f"its code has changed since the releases of {path.split('.')[0]} that fastpeft knows"


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
    form = form_of_class(cls)
    fused = form.fused
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": fused.__doc__}
    if "__firstlineno__" in cls.__dict__:  # where inspect finds a class's source in its module, from Python 3.13 on
        names["__firstlineno__"] = cls.__firstlineno__
    if (forward := _forward_for(fused, cls)) is not None:
        names["forward"] = forward
    _FUSED[cls] = ours = type(cls)(cls.__name__, (fused, cls), names | {"__reduce_ex__": _reduce_ex, "__copy__": _copy})
    # where copy.deepcopy looks first. A method named __deepcopy__ would also answer for wrappers that hand attributes on (PEFT's models,
    # torch.compile's): a copy of one would be a copy of what it wraps
    copy._deepcopy_dispatch[ours] = _deepcopy
    _REPLACED[ours], _FORM_OF[ours] = cls, form
    return ours


def _forward_for(fused: type, cls: type) -> Callable | None:
    """A forward that takes its arguments by the names that ``cls`` gives them; None where the mixin's own has these names."""
    if (made := getattr(fused, "forward_of", None)) is not None:
        return made(cls)
    renamed = {}
    if not getattr(fused.forward, "signature_of_replaced", False):
        names = (_positional(f) for f in (fused.forward, cls.forward))
        renamed = {theirs: ours for ours, theirs in zip(*names) if theirs != ours}
        if not renamed:
            return None

    @wraps(cls.forward)
    def forward(self, *args, **kwargs):
        if renamed and kwargs:
            kwargs = {renamed.get(name, name): value for name, value in kwargs.items()}
        return fused.forward(self, *args, **kwargs)

    return forward


def _positional(function: Callable) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds][1:]


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


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, and of a fused one the class it was."""
    return _REPLACED.get(type(module), type(module))


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
