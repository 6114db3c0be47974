"""Digest of what a class's code computes.

Two classes with one digest compute the same: model files of transformers repeat a few texts under many names. The digest is of the tree of
``forward`` (or another method) and of everything it reaches: methods, properties and constants that it reads on ``self`` or through
``super()``, and functions that it calls by name. Left out is what computes nothing: comments, docstrings, annotations, names of arguments
and variables, the model's own name, decorators that document.

What is written into the digest is the same on Python 3.10 to 3.14. A class whose source is not there (compiled files alone, a prompt), or
whose forward was replaced by a wrapper that is not transformers' or PyTorch's, has no digest.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, wraps
from tokenize import TokenError
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

LENGTH = 12  # hexadecimal digits: 48 bits, for some thousand different texts
DOCUMENTING = ("auto_docstring", "add_start_docstrings", "add_start_docstrings_to_model_forward", "add_end_docstrings",
               "replace_return_docstrings", "add_code_sample_docstrings", "deprecate_kwarg", "override")  # fmt: skip
SKIPPED = ("kind", "type_comment", "type_params", "annotation", "returns", "decorator_list", "ctx", "type_ignores")
WRAPPERS = ("transformers", "torch", "functools", "contextlib")  # whose wrappers stand as decorators in the source, or change no value
MISSING = object()  # of a name that leads to nothing


@dataclass
class Code:
    """Everything that a method reaches. ``text``: what the digest is of; ``reads``: attributes of ``self``; ``resolved``: (where, name,
    object) of each name that was looked up, to see whether someone has replaced it since."""

    text: list[str] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    resolved: list[tuple[Any, str, Any]] = field(default_factory=list)
    seen: set[Any] = field(default_factory=set)
    readable: bool = True  # whether the source of all of it is there

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.text).encode()).hexdigest()[:LENGTH]

    def own_method(self, module: nn.Module) -> str:
        """'' or the name of a method of the class's that ``module`` has another function for."""
        methods = (name for where, name, found in self.resolved if where is None and callable(getattr(found, "__func__", found)))
        return next((name for name in methods if name in module.__dict__), "")

    def is_current(self, cls: type) -> bool:
        """Whether each name still leads to what it led to when the code was read."""
        return all(
            (_static(cls, name) if where is None else where.get(name, MISSING)) is found for where, name, found in self.resolved
        )


_CODE: WeakKeyDictionary[type, dict[str, Code]] = WeakKeyDictionary()


def digest(cls: type, method: str = "forward") -> str | None:
    """Short hexadecimal digest of what ``cls``'s ``method`` computes; None where its source cannot be had. Kept, until someone replaces a
    function in it."""
    code = code_of(cls, method)
    return None if code is None else code.digest


def function_digest(function: FunctionType) -> str | None:
    """As :func:`digest`, of a function of a module."""
    found = Code()
    try:
        _Reader(object, found).function(function)
    except _NoSource:
        return None
    return found.digest


def code_of(cls: type, method: str = "forward") -> Code | None:
    """What :func:`digest` is of; None where its source cannot be had."""
    kept = _CODE.setdefault(cls, {})
    found = kept.get(method, MISSING)
    if found is MISSING or not found.is_current(cls):
        kept[method] = found = Code()
        try:
            _Reader(cls, found).method(method)
        except _NoSource:
            found.readable = False
    return found if found.readable else None


class _NoSource(Exception):
    """The source of something that the code calls is not there."""


def _static(cls: type, name: str) -> Any:
    """What the class itself, not nn.Module or object, has under a name, without calling it."""
    for kind in cls.__mro__:
        if kind not in (nn.Module, object) and name in vars(kind):
            return vars(kind)[name]
    return MISSING


def as_written(function: Any) -> Any:
    """The function that decorators of transformers and PyTorch stand around, or that of somebody else's that wraps it (``__wrapped__``):
    what that one does, no code of the model's tells."""
    while (inner := getattr(function, "__wrapped__", None)) is not None and home_of(function).split(".")[0] in WRAPPERS:
        function = inner
    return function


def home_of(function: Any) -> str:
    """The module in which a function was defined; ``functools.wraps`` gives a wrapper the name of another one."""
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def is_of_transformers(cls: type) -> bool:
    """Whether the forward of ``cls`` is as transformers wrote it."""
    return home_of(as_written(cls.forward)).startswith("transformers.")


def cache_by_forward(read: Callable) -> Callable:
    """``functools.cache`` of what is read of a class's code, for as long as its forward is the same function."""
    kept = cache(lambda forward, cls, *args: read(cls, *args))

    @wraps(read)
    def current(cls: type, *args: Any) -> Any:
        return kept(cls.forward, cls, *args)

    return current


def _function(value: Any) -> FunctionType | None:
    """The function of a method, as it was written; _NoSource where someone else wrapped it."""
    value = as_written(getattr(value, "__func__", value))  # static and class methods
    if hasattr(value, "__wrapped__"):
        raise _NoSource
    return value if isinstance(value, FunctionType) else None


def _tree(function: FunctionType) -> ast.AST:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, ValueError, SyntaxError, IndexError, TokenError) as error:
        raise _NoSource from error
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        raise _NoSource  # a lambda
    if set(function.__code__.co_freevars) - {"__class__"}:
        raise _NoSource  # it reads variables of a function around it
    if tree.name != function.__name__:
        raise _NoSource  # the file has changed since it was imported
    return tree


class _Reader:
    """Writes the code of one class's method, and of what it reaches, to a :class:`Code`."""

    def __init__(self, cls: type, code: Code):
        self.cls, self.code = cls, code

    def method(self, name: str) -> None:
        found = _static(self.cls, name)
        self.code.resolved.append((None, name, found))
        function = _function(found)
        if function is None:
            raise _NoSource
        self.function(function, found)

    def function(self, function: FunctionType, found: Any = None) -> None:
        """``function`` and, behind it, what it reaches."""
        if function in self.code.seen:
            return
        self.code.seen.add(function)
        tree = _tree(function)
        kind = type(found).__name__ if isinstance(found, staticmethod | classmethod) else ""
        self.code.text.append(f"{kind}def {_Writer(self, function, tree).write()}")
        for later in list(self.pending(function, tree)):
            later()

    def pending(self, function: FunctionType, tree: ast.AST) -> Iterator[Any]:
        """What else the function reaches, in the order of its text."""
        me = next((a.arg for a in (*tree.args.posonlyargs, *tree.args.args)), None)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
                self.code.reads.add(node.attr)
                yield lambda name=node.attr: self.attribute(name)
            elif isinstance(node, ast.Attribute) and _is_super(node.value):
                yield lambda name=node.attr: self.inherited(function, name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield lambda name=node.id: self.name(function, name)

    def attribute(self, name: str) -> None:
        """What ``self.name`` is by the class: a method, a property, a constant; an attribute of the instance is nothing here."""
        found = _static(self.cls, name)
        if ("self", name) in self.code.seen:
            return
        self.code.seen.add(("self", name))
        self.code.resolved.append((None, name, found))
        if found is MISSING:
            return
        if isinstance(found, property):
            self.code.text.append(f"property {name}")
            if found.fget is not None and (getter := _function(found.fget)) is not None:
                self.function(getter)
        elif (function := _function(found)) is not None:
            self.function(function, found)
        else:
            self.code.text.append(f"self.{name} = {_constant(found)}")

    def inherited(self, function: FunctionType, name: str) -> None:
        """What ``super().name`` is, in the code of ``function``."""
        order = self.cls.__mro__
        home = next((i for i, kind in enumerate(order) if any(_same(v, function) for v in vars(kind).values())), None)
        if home is None:
            raise _NoSource
        for kind in order[home + 1 :]:
            if kind is not nn.Module and kind is not object and name in vars(kind):
                if (inner := _function(vars(kind)[name])) is not None:
                    self.function(inner, vars(kind)[name])
                return

    def name(self, function: FunctionType, name: str) -> None:
        """A name of the module around ``function``: its code, where it is a function that is not PyTorch's or Python's."""
        if name not in function.__globals__ or ("global", name) in self.code.seen:
            return
        self.code.seen.add(("global", name))
        found = function.__globals__[name]
        self.code.resolved.append((function.__globals__, name, found))
        home = (getattr(found, "__module__", None) or "").split(".")[0]
        if isinstance(found, FunctionType | type) and home == "torch":
            return
        if isinstance(found, FunctionType) and (inner := _function(found)) is not None and _is_computing(inner):
            self.function(inner)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _same(value: Any, function: FunctionType) -> bool:
    with suppress(_NoSource):
        return callable(getattr(value, "__func__", value)) and _function(value) is function
    return False


def _is_computing(function: FunctionType) -> bool:
    """Whether a function has code of the model's: logging and the standard library have none."""
    home = function.__module__.split(".")
    aside = home[:2] in (["transformers", "utils"], ["transformers", "integrations"])
    return not aside and home[0] not in ("logging", "warnings", "typing")


def _constant(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str | bytes | complex):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_constant, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(_constant, value)))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_constant(k)}: {_constant(v)}' for k, v in value.items())})"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _own_name(home: str) -> str:
    """The model's own name, in lower case without underscores, from its module's: ``modeling_qwen2_5_vl`` -> ``qwen25vl``."""
    found = re.match(r"(?:modeling|modular)_(?:flax_|tf_)?(\w+)$", home.rpartition(".")[2])
    return found[1].replace("_", "").lower() if found else ""


class _Writer:
    """Writes one function's tree: node types and fields that are not empty, variables by number in the order they come."""

    def __init__(self, reader: _Reader, function: FunctionType, tree: ast.AST):
        self.reader, self.globals, self.tree = reader, function.__globals__, tree
        self.model = _own_name(function.__module__ or "")
        self.locals: dict[str, str] = {}
        self.bound = {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in _arguments(n)}
        self.bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}

    def write(self) -> str:
        decorators = [d for d in self.tree.decorator_list if _last_name(d) not in DOCUMENTING]
        body = [self.node(statement) for statement in (self.tree.args, *self.tree.body)]
        return " ".join([*(f"@{self.node(d)}" for d in decorators), *filter(None, body)])

    def node(self, node: Any) -> str:
        if isinstance(node, list):
            return "[" + " ".join(filter(None, map(self.node, node))) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return ""  # a docstring
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return ""
        if isinstance(node, ast.AnnAssign):
            node = ast.Assign(targets=[node.target], value=node.value)
        if isinstance(node, ast.arg):
            return self.local(node.arg)
        if isinstance(node, ast.Name):
            return self.local(node.id) if node.id in self.bound else self.named(node.id)
        if isinstance(node, ast.Attribute) and (path := self.path(node)):
            return path
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in SKIPPED and value not in (None, [])]
        return f"({type(node).__name__} " + " ".join(f"{name}={self.node(value)}" for name, value in fields) + ")"

    def local(self, name: str) -> str:
        return self.locals.setdefault(name, f"v{len(self.locals)}")

    def path(self, node: ast.Attribute) -> str:
        """``F.silu`` and ``torch.nn.functional.silu`` alike, where the chain starts at a module; '' for others."""
        chain = [node.attr]
        while isinstance(node.value, ast.Attribute):
            node = node.value
            chain.append(node.attr)
        if not isinstance(node.value, ast.Name) or node.value.id in self.bound:
            return ""
        found = self.globals.get(node.value.id)
        if not isinstance(found, ModuleType):
            return ""
        for i, name in enumerate(reversed(chain)):
            inner = getattr(found, name, MISSING)
            if not isinstance(inner, ModuleType):
                return ".".join([found.__name__, *reversed(chain[: len(chain) - i])])
            found = inner
        return found.__name__

    def named(self, name: str) -> str:
        """A name that is no variable: of a class, a function, a constant of the module, or Python's own."""
        found = self.globals.get(name, MISSING)
        if found is MISSING or isinstance(found, ModuleType):
            return name if found is MISSING else found.__name__
        if isinstance(found, bool | int | float | str | tuple | None):
            return _constant(found)
        plain = name.replace("_", "").lower()
        shortened = plain.removeprefix(self.model) if self.model else plain
        if isinstance(found, type | FunctionType) and (found.__module__ or "").split(".")[0] == "torch":
            return f"{found.__module__}.{found.__qualname__}"
        return shortened or name


def _arguments(node: ast.arguments) -> Iterator[ast.arg]:
    yield from (*node.posonlyargs, *node.args, *node.kwonlyargs)
    yield from filter(None, (node.vararg, node.kwarg))


def _last_name(node: ast.AST) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
