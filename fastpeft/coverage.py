"""Report on an optimised model: what was exchanged, what was left and why, the share of the model that runs on fastpeft's operators.

A layer of PyTorch's own (a linear layer, an embedding, ...) belongs to the module that calls it, its owner: the nearest one around it that
is neither such a layer nor a container. What is left is every module that holds parameters, itself or as an owner, and was not exchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastpeft.methods.base import has_hooks
from fastpeft.methods.quantized import FusedLinear, size_of
from fastpeft.registry import Form, form_of, form_of_class, is_fused, is_own, original_class, overridden, why_changed, why_wrapped

LINEAR = (nn.Linear, Conv1D)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


@dataclass
class ClassCount:
    """Modules of one class. ``parameters``: they hold, with those of PyTorch's layers that belong to them; what is shared counts once.
    ``fused``: exchanged, now or before; ``own``: fastpeft's own classes; ``left``: how many stayed, by reason."""

    modules: int = 0
    parameters: int = 0
    fused: int = 0
    own: int = 0
    left: Counter[str] = field(default_factory=Counter)

    @property
    def state(self) -> str:
        """One line: fused, fastpeft's own, or left and why."""
        said = [f"{count} {what}" for count, what in ((self.fused, "fused"), (self.own, "fastpeft's own")) if count]
        if not self.left:
            return said[0].partition(" ")[2] if len(said) == 1 else ", ".join(said)
        (reason, most), *others = self.left.most_common()
        whole = most == self.modules
        more = f" (and {len(others)} other reason{'s' * (len(others) > 1)})" if others else ""
        return ", ".join([*said, f"{'' if whole else f'{self.left.total()} '}left: {reason}{more}"])


@dataclass(repr=False)
class Report:
    """What :func:`fastpeft.optimize` did.

    ``swapped``: (name, class) of modules exchanged now; ``already_fused``: of those exchanged before; ``skipped``: (name, reason) of
    modules left as they are; ``notes``: changes of behaviour, and losses that stay as they are. ``classes``: by class, all of these;
    ``coverage``, shares of 1 that fused modules compute: {"layers": of linear layers, "linear": of their parameters, which is the share of
    their FLOPs per token, "parameters": of all parameters}.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    already_fused: list[tuple[str, str]] = field(default_factory=list)
    classes: dict[str, ClassCount] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=lambda: {"layers": 0.0, "linear": 0.0, "parameters": 0.0})
    parameters: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text: ``classes`` {class: {count, parameters, share, fused, own, left: {reason: count}}}, ``coverage``,
        ``parameters``, ``swapped``, ``already_fused`` and ``skipped`` (counts), ``notes``."""
        classes = {
            name: {"count": row.modules, "parameters": row.parameters, "share": row.parameters / max(1, self.parameters)}
            | {"fused": row.fused, "own": row.own, "left": dict(row.left)}
            for name, row in self.classes.items()
        }
        counts = {name: len(getattr(self, name)) for name in ("swapped", "already_fused", "skipped")}
        return {"classes": classes, "coverage": dict(self.coverage), "parameters": self.parameters, **counts, "notes": list(self.notes)}

    def __str__(self) -> str:
        """A line for each class, not for each module."""
        head = f"{len(self.swapped)} modules swapped, {len(self.skipped)} skipped"
        head += f"; already fused: {len(self.already_fused)}" if self.already_fused else ""
        layers, linear, parameters = (self.coverage[kind] for kind in ("layers", "linear", "parameters"))
        shares = f"on fused modules: {layers:.1%} of linear layers, {linear:.1%} of their FLOPs per token, "
        shares += f"{parameters:.1%} of all parameters"
        rows = [
            (name, f"{row.modules:,}", f"{row.parameters:,}", f"{row.parameters / max(1, self.parameters):.1%}", row.state)
            for name, row in self.classes.items()
        ]
        lines = [head]
        if rows:
            rows.insert(0, ("class", "modules", "parameters", "share", ""))
            wide = [max(len(row[column]) for row in rows) for column in range(4)]
            lines += [f"  {shares}"]
            lines += [f"  {a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}  {e}".rstrip() for a, b, c, d, e in rows]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    __repr__ = __str__


def label(cls: type) -> str:
    """A class's name; of PEFT's layers named as PyTorch's with the method's before it, as PEFT prints them (``lora.Linear``)."""
    parts = cls.__module__.split(".")
    alike = hasattr(nn, cls.__name__.removesuffix("4bit").removesuffix("8bitLt"))
    return f"{parts[2]}.{cls.__name__}" if alike and parts[:2] == ["peft", "tuners"] else cls.__name__


def has_known_base(cls: type) -> bool:
    """Whether ``cls`` is a subclass of a class with a fused form."""
    return any(_is_known(base) for base in cls.__mro__)


def _is_known(cls: type) -> bool:
    """Whether every module of exactly this class has a fused form."""
    form = form_of_class(cls)
    return form is not None and form.applies is None


def why_unknown(cls: type) -> str:
    """Why a class without a fused form has none."""
    if reason := why_wrapped(cls) or why_changed(cls):
        return reason
    base = next((base for base in cls.__mro__ if _is_known(base)), None)
    if base is None or cls.__module__.startswith("torch."):
        return f"no fused form of {label(cls)}"
    between = cls.__mro__[: cls.__mro__.index(base)]
    own = overridden(cls, form_of_class(base), between, base) or sorted(kind.__name__ for kind in between[1:] if not issubclass(kind, base))
    return f"a subclass of {label(base)} that overrides {', '.join(own)}"


def measure_coverage(model: nn.Module, reasons: Mapping[nn.Module, str], swapped: set[nn.Module]) -> Report:
    """The report on a model after its exchange. ``reasons``: why modules with a fused form were left; ``swapped``: the modules exchanged
    now."""
    found = _Survey(reasons, swapped)
    found.visit("", model, None)
    return found.report()


@dataclass
class _Entry:
    """One module that counts: ``state`` "fused", "own", or ''; ``reason`` why it is left."""

    name: str
    module: nn.Module
    state: str
    reason: str = ""
    parameters: int = 0
    shown: bool = False  # holds parameters, or is in the report without


class _Survey:
    def __init__(self, reasons, swapped):
        self.reasons, self.swapped = reasons, swapped
        self.entries: list[_Entry] = []
        self.seen: set[nn.Module] = set()
        self.sizes: dict[int, int] = {}
        self.linear: set[int] = set()  # ids of parameters
        self.covered: set[int] = set()
        self.layers = [0, 0]  # linear layers that are not covered, and those that are
        self.inside: dict[nn.Module, _Entry] = {}  # what a fused module further out computes itself -> that module

    def visit(self, name: str, module: nn.Module, owner: _Entry | None) -> None:
        """Count ``module`` and all in it; ``owner`` is the entry around it."""
        if module in self.seen:
            return
        self.seen.add(module)
        entry = self.inside.get(module) or self._owner_of(module, owner) or self._entry(name, module, owner)
        linear = isinstance(module, nn.Linear | Conv1D)
        holder = self._holder(module, entry, owner) if linear else entry
        if linear:
            self.layers[bool(holder.state)] += 1
        for parameter in module.parameters(recurse=False):
            self._count(parameter, linear, holder)
        around = owner if entry.module is module and self._is_container(module) else self._owner_for(entry, module)
        for child_name, child in module.named_children():
            self.visit(f"{name}.{child_name}" if name else child_name, child, around)

    def _holder(self, module: nn.Module, entry: _Entry, owner: _Entry | None) -> _Entry:
        """The entry that a linear layer's parameters count with: a fused module around it that computes it."""
        if owner is None or entry is owner or has_hooks(module):
            return entry
        if original_class(module) not in LINEAR and not isinstance(module, FusedLinear):
            return entry
        if owner.state == "fused":
            return owner
        owner.shown = True
        return entry

    def _is_container(self, module: nn.Module) -> bool:
        return isinstance(module, CONTAINERS) and type(module).__module__.startswith("torch.nn.")

    def _owner_of(self, module: nn.Module, owner: _Entry | None) -> _Entry | None:
        """``owner``, where ``module`` is a part of it: a container, or a layer of PyTorch's own that it calls."""
        if owner is None or form_of(module) is not None or module in self.reasons or is_fused(module):
            return None
        if self._is_container(module):
            return owner
        layer = type(module).__module__.startswith("torch.nn.") and not list(module.children())
        return owner if layer and not (owner.state == "fused" and has_hooks(module)) else None

    def _entry(self, name: str, module: nn.Module, owner: _Entry | None) -> _Entry:
        cls = type(module)
        if is_own(module):
            entry = _Entry(name, module, "own")
        elif is_fused(module):
            entry = _Entry(name, module, "fused", shown=True)
            form = form_of(module)
            for part in _computed(form, module):
                self.inside.setdefault(part, entry)
        elif module in self.reasons:
            entry = _Entry(name, module, "", self.reasons[module], shown=True)
        elif owner is not None and owner.state == "fused" and cls.__module__.startswith("torch.nn.") and has_hooks(module):
            own = "forward" in module.__dict__
            entry = _Entry(name, module, "", f"has {'a forward of its own' if own else 'hooks'}: called as it is")
        else:
            subclass = has_known_base(cls) and any(True for _ in module.parameters())
            entry = _Entry(name, module, "", why_unknown(cls), shown=subclass)
        self.entries.append(entry)
        return entry

    def _owner_for(self, entry: _Entry, module: nn.Module) -> _Entry | None:
        """Who owns layers in ``module``: ``entry``, or None where others' code runs in it around the one module that is computed."""
        form = form_of(module) if entry.module is module and entry.state == "fused" else None
        return None if form is not None and hasattr(form.fused, "computes_only") else entry

    def _count(self, parameter: nn.Parameter, linear: bool, entry: _Entry) -> None:
        """Add a parameter to the entry that holds it; one that is shared to the first."""
        key = id(parameter)
        if key not in self.sizes:
            self.sizes[key] = 0 if is_lazy(parameter) else size_of(parameter)
            entry.parameters += self.sizes[key]
        entry.shown = True
        if linear:
            self.linear.add(key)
        if entry.state and getattr(entry.module, "computes_parameters", True):
            self.covered.add(key)

    def report(self) -> Report:
        report, labels = Report(), self._labels()
        entries = [entry for entry in self.entries if entry.shown]
        for entry in entries:
            name = labels[type(entry.module)]
            row = report.classes.setdefault(name, ClassCount())
            row.modules += 1
            row.parameters += entry.parameters
            if entry.state == "fused":
                row.fused += 1
                (report.swapped if entry.module in self.swapped else report.already_fused).append((entry.name, name))
            elif entry.state == "own":
                row.own += 1
            else:
                row.left[entry.reason] += 1
                report.skipped.append((entry.name, entry.reason))
        report.classes = dict(sorted(report.classes.items(), key=lambda item: -item[1].parameters))
        report.parameters = sum(self.sizes.values())
        for kind, ids in (("linear", self.linear), ("parameters", self.sizes.keys())):
            size = sum(self.sizes[i] for i in ids)
            report.coverage[kind] = sum(self.sizes[i] for i in ids if i in self.covered) / size if size else 0.0
        report.coverage["layers"] = self.layers[1] / sum(self.layers) if any(self.layers) else 0.0
        return report

    def _labels(self) -> dict[type, str]:
        """A name for each class; the full path where two of one name differ in more than being fused."""
        by_name: dict[str, dict[tuple[str, str], list[type]]] = {}
        for cls in dict.fromkeys(type(entry.module) for entry in self.entries):
            by_name.setdefault(label(cls), {}).setdefault((cls.__module__, cls.__qualname__), []).append(cls)
        return {
            cls: name if len(paths) == 1 else ".".join(path)
            for name, paths in by_name.items()
            for path, classes in paths.items()
            for cls in classes
        }


def _computed(form: Form | None, module: nn.Module) -> list[nn.Module]:
    """The modules in a fused one whose layers it computes itself, although they are not its own. Around what ``computes_only`` of a mixin
    gives (a module, or None), others' code runs."""
    if form is None:
        return []
    only = getattr(form.fused, "computes_only", lambda module: None)(module)
    return [module.get_submodule(path) for path in form.computes] + ([] if only is None else [only])


def full_losses(model: nn.Module) -> list[str]:
    """Classes of ``model`` with a language-model head whose own loss runs: it forms the logits of every position."""
    heads = [(m, _head(m)) for m in model.modules() if isinstance(m, PreTrainedModel)]
    ours = {id(head) for m, head in heads if is_fused(m) or is_own(m)}
    return sorted({label(type(m)) for m, head in heads if head is not None and id(head) not in ours})


def _head(model: PreTrainedModel) -> nn.Module | None:
    with suppress(AttributeError, NotImplementedError):  # models outside transformers need not have one to ask for
        return model.get_output_embeddings()
    return None
