"""Methods: what can be done to a part. Names as in the papers: F, T, LoRA, IA3, Prefix, PTv2, LayerNorm, Attention, FFN, Excitor,
MMAdapter, RepAdapter; AdaptionPrompt, LLaMA-Adapter under PEFT's name."""

import functools
import importlib.metadata

from fastpeft.methods.adaption_prompt import AdaptionPrompt
from fastpeft.methods.base import ADAPTER_MODULES, Method, Part, is_adapter
from fastpeft.methods.excitor import Excitor
from fastpeft.methods.ia3 import IA3
from fastpeft.methods.intrinsic import FFN, Attention, Frozen, Full, LayerNorm
from fastpeft.methods.lora import LoRA
from fastpeft.methods.mm_adapter import MMAdapter, RepAdapter
from fastpeft.methods.prefix import Prefix, PTv2

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Frozen, Full, LoRA, IA3, Prefix, PTv2, LayerNorm, Attention, FFN, Excitor, AdaptionPrompt, MMAdapter, RepAdapter)
}
_OWN_MODULES = frozenset(ADAPTER_MODULES)


def register_method(method: type[Method]) -> type[Method]:
    """Make ``method`` a treatment by its ``name``: in plans ("F/BitFit/LoRA"), YAML files, commands, saved adapters. A decorator.

    A subclass of :class:`Method`, a frozen dataclass whose fields are its options; at least :meth:`Method.attach` and, for a method that
    adds parameters, :meth:`Method.tensors`. These are modules of its own, kept in the base's modules under the attributes it names in
    ``adapter_modules``; removing the method deletes them, and removes the hooks whose handles such a module keeps in ``handles``. Saved in
    fastpeft's own format, whose reader needs the same registration: import the method's module before loading. Registering the same class
    again changes nothing (a notebook's cell that is run twice replaces its earlier self). TypeError for what is no such class; ValueError
    for a name that cannot be in a plan or is another method's.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"{method!r} is no method; give a subclass of fastpeft.methods.Method")
    if "__dataclass_fields__" not in vars(method):
        raise TypeError(f"{method.__name__} is no dataclass, so its options are unknown; write @dataclass(frozen=True) above it")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{method.__name__}.name is {name!r}; give a word that a plan can hold, such as 'BitFit'")
    taken = next((known for known in METHODS.values() if known.name.lower() == name.lower()), None)
    if taken is not None and (taken.__module__, taken.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(f"a treatment is called {taken.name} already ({taken.__module__}.{taken.__qualname__}); choose another name")
    if method.peft_type is not None:
        raise ValueError(f"{method.__name__}.peft_type is {method.peft_type!r}; a registered method has fastpeft's format: leave it None")
    owned = {piece for known in METHODS.values() if known is not taken for piece in known.adapter_modules} | _OWN_MODULES
    if clash := sorted(set(method.adapter_modules) & owned):
        raise ValueError(f"{method.__name__}.adapter_modules: {', '.join(clash)} belong to another method; choose other names")
    if method.adapter_modules and method.mergeable and method.merge is Method.merge:
        raise TypeError(f"{method.__name__} adds modules and does not say how weights take them in: write merge, or mergeable = False")
    ADAPTER_MODULES.extend(piece for piece in method.adapter_modules if piece not in ADAPTER_MODULES)
    is_adapter.cache_clear()
    METHODS[name] = method
    return method


def find_method(name: str) -> type[Method] | None:
    """The method of this name, in any case, among ours, the registered ones, and those that installed packages announce as entry points
    of the group ``fastpeft.methods``; None where there is none."""
    known = {method.lower(): cls for method, cls in METHODS.items()}
    if name.lower() not in known:
        _load_announced()
        known = {method.lower(): cls for method, cls in METHODS.items()}
    return known.get(name.lower())


@functools.cache
def _load_announced() -> None:
    for entry in importlib.metadata.entry_points(group="fastpeft.methods"):
        register_method(entry.load())


def from_peft(config: dict) -> Method:
    """The method that a PEFT ``adapter_config.json`` describes; ValueError for one that fastpeft does not have."""
    kinds = {m.peft_type: m for m in (LoRA, IA3, PTv2, LayerNorm, Excitor, AdaptionPrompt)}
    if config.get("peft_type") not in kinds:
        raise ValueError(f"PEFT method {config.get('peft_type')!r} is not supported; supported: {', '.join(kinds)}")
    return kinds[config["peft_type"]].from_peft(config)


__all__ = [
    "FFN", "IA3", "METHODS", "AdaptionPrompt", "Attention", "Excitor", "Frozen", "Full", "LayerNorm", "LoRA", "MMAdapter", "Method",
    "PTv2", "Part", "Prefix", "RepAdapter",
    "find_method", "from_peft", "is_adapter", "register_method",
]  # fmt: skip
