"""Layers of an encoder whose output nobody reads: those above the last hidden state that a model takes of it.

    image_outputs = self.vision_tower(pixel_values, ...)
    selected = image_outputs.hidden_states[vision_feature_layer]     -2 in LLaVA: one of 24 layers is for nobody
    image_outputs.pooler_output = self.multi_modal_projector(selected)
    return image_outputs

Inside the forward of a model whose methods do this, and whose forward reads no more than ``pooler_output`` of what they return, such layers
are called as ever, so that hidden states keep their number, and return what they get. Called from outside, those methods compute all: what
they return has a last hidden state, which the caller may read.
"""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

from fastpeft.forms import as_written
from fastpeft.fused.code.forward_code import Code, called_path
from fastpeft.fused.code.state_reads import is_of_self, state_of
from fastpeft.methods.base import has_hooks, must_be_called, watched_globally
from fastpeft.registry import fuses, original_class, signature_of_replaced
from fastpeft.savings import on

STATES = "hidden_states"


class Reading(NamedTuple):
    """Of the output of the module at ``path``, the hidden states at ``index`` are read: an argument of the forward, which the configuration
    has where it is not given, or an attribute ``self.index``. ``kept``: arguments of the forward that would hand the output out."""

    path: str
    index: str
    is_argument: bool
    kept: frozenset[str]


def readings(cls: type[nn.Module]) -> tuple[Reading, ...]:
    """What the forward of ``cls``, and the methods that it calls on itself, read of the modules whose hidden states they take; of modules
    that they read nothing else of."""
    return _readings(tuple(_codes(cls).items()))


@cache
def _readings(methods: tuple[tuple[str, Code], ...]) -> tuple[Reading, ...]:
    codes = dict(methods)
    paths = {path for code in codes.values() for node in code.nodes if (path := called_path(node)) and path not in codes}
    return tuple(found for path in sorted(paths) if (found := _reading(codes, path)) is not None)


def _codes(cls: type[nn.Module]) -> dict[str, Code]:
    """The code of the forward of ``cls`` and of the methods that it calls, by their names; nothing where some source is missing."""
    found, waiting = {}, ["forward"]
    while waiting:
        name = waiting.pop()
        function = as_written(getattr(cls, name))
        if name in found or not isinstance(function, FunctionType) or not function.__module__.startswith("transformers.models."):
            continue
        code = Code.of(cls, name)
        if code is None or "get_encoder" in code.attributes:
            return {}
        found[name] = code
        waiting += [attr for attr in code.of_self if isinstance(inspect.getattr_static(cls, attr, None), FunctionType)]
    return found


def _reading(codes: dict[str, Code], path: str) -> Reading | None:
    """What is read of the module at ``path``; None where that is more than some of its hidden states, or cannot be told."""
    indices, kept = set(), set()
    for name, code in codes.items():
        read = _read_in(code, path)
        if read is None or (read.returned and (name == "forward" or not _is_read_by(codes, name, read.written, kept))):
            return None
        indices |= {(index, name) for index in read.indices}
    if len({index for index, _ in indices}) != 1:
        return None
    index = next(index for index, _ in indices)
    if index.startswith("self."):
        return Reading(path, index.removeprefix("self."), False, frozenset(kept))
    given = all(name == "forward" or _hands_on(codes, name, index) for _, name in indices)
    return Reading(path, index, True, frozenset(kept)) if given else None


def _is_called_or_asked(code: Code, module: ast.Attribute) -> bool:
    """Whether a module of ``self`` is called here, or asked for an attribute that is not called."""
    node, parent = module, code.parents[module]
    if isinstance(parent, ast.Call):
        return parent.func is module
    while isinstance(parent, ast.Attribute):
        node, parent = parent, code.parents[parent]
    return node is not module and not (isinstance(parent, ast.Call) and parent.func is node)


class _Read(NamedTuple):
    """Of an output: the ``indices`` of hidden states that are read, the fields that are ``written``, and whether it is ``returned``."""

    indices: set[str]
    written: set[str]
    returned: bool


def _read_in(code: Code, path: str) -> _Read | None:
    """What one method reads of the output of the module at ``path``."""
    if not all(_is_called_or_asked(code, node) for node in code.nodes if is_of_self(node) and node.attr == path):
        return None
    outputs = {code.target(node) for node in code.nodes if called_path(node) == path}
    if None in outputs or any(len(code.assigned(output)) != 1 for output in outputs):
        return None
    return _read_of(code, [node for output in outputs for node in code.names(output)])


def _read_of(code: Code, loads: list[ast.Name]) -> _Read | None:
    """What one method reads of an output that variables hold."""
    read = _Read(set(), set(), False)
    for node in loads:
        parent = code.parents[node]
        if isinstance(parent, ast.Return):
            read = read._replace(returned=True)
        elif isinstance(parent, ast.Attribute) and isinstance(parent.ctx, ast.Store):
            if code.parents[parent] in code.tree.body:  # in every call
                read.written.add(parent.attr)
        elif isinstance(parent, ast.Attribute) and parent.attr == STATES and (index := _index(code, parent)) is not None:
            read.indices.add(index)
        else:
            return None
    once = sum(isinstance(node, ast.Return) for node in code.nodes) == 1
    return read if once or not read.returned else None


def _index(code: Code, states: ast.Attribute) -> str | None:
    """The argument, or attribute ``self.name``, that says which of ``states`` is taken, itself or one after the other."""
    taken = code.parents[states]
    if not isinstance(taken, ast.Subscript) or taken.value is not states:
        return None
    text = ast.unparse(taken.slice)
    for node in code.nodes:
        if isinstance(node, ast.comprehension) and ast.unparse(node.target) == text:
            text = ast.unparse(node.iter)
    if text in code.arguments:
        return text if not code.names(text, ast.Store) else None
    return text if text.startswith("self.") and text.replace(".", "").isidentifier() else None


def _is_read_by(codes: dict[str, Code], method: str, written: set[str], kept: set[str]) -> bool:
    """Whether all that is read of what ``method`` returns are fields that it has ``written``; adds to ``kept``."""
    for code in codes.values():
        for call in [node for node in code.nodes if called_path(node) == method]:
            parent = code.parents[call]
            if isinstance(parent, ast.Attribute) and parent.attr in written:
                continue
            if not isinstance(parent, ast.Assign) or len(parent.targets) != 1:
                return False
            (target,) = parent.targets
            base = target.value if isinstance(target, ast.Subscript) else target
            if not isinstance(base, ast.Name) or not all(_is_written(code, node, target, written) for node in code.names(base.id)):
                return False
            if base.id in code.arguments:  # a dictionary of the caller's would get the output
                kept.add(base.id)
    return True


def _is_written(code: Code, node: ast.Name, target: ast.expr, written: set[str]) -> bool:
    """Whether a variable that holds an output, itself or by a key, is read for a field that is ``written``, or asked whether it is one."""
    above = code.parents[node]
    if isinstance(target, ast.Subscript):
        if isinstance(above, ast.Compare | ast.IfExp):  # ``given if given is not None else {}``
            return True
        if isinstance(above, ast.Attribute) and above.attr == "get":
            return isinstance(code.parents[code.parents[above]], ast.Compare)
        if not isinstance(above, ast.Subscript):
            return False
        node, above = above, code.parents[above]
        if isinstance(node.ctx, ast.Store):
            return True
    return isinstance(above, ast.Compare) or (isinstance(above, ast.Attribute) and above.attr in written)


def _hands_on(codes: dict[str, Code], method: str, argument: str) -> bool:
    """Whether the forward calls ``method`` with its own ``argument`` of that name, or without one."""
    forward = codes["forward"]
    calls = [(code, node) for code in codes.values() for node in code.nodes if called_path(node) == method]
    given = [keyword for _, call in calls for keyword in call.keywords if keyword.arg == argument]
    own = all(isinstance(keyword.value, ast.Name) and keyword.value.id == argument for keyword in given)
    return own and all(code is forward for code, _ in calls) and all(keyword.arg for _, call in calls for keyword in call.keywords)


def may_read_lower_layers(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls``, as transformers wrote it, read lower layers of a module inside alone."""
    if not isinstance(cls.forward, FunctionType) or not cls.__module__.startswith("transformers.models."):
        return False
    functions = (as_written(value) for value in vars(cls).values() if isinstance(value, FunctionType))
    return any(STATES in function.__code__.co_names for function in functions) and bool(readings(cls))


def _layers_in(tower: nn.Module) -> list[nn.Module] | None:
    """The layers in ``tower`` whose outputs are its hidden states, behind the input of the first; None where that is not known."""
    recorded = getattr(original_class(tower), "_can_record_outputs", None)
    kind = recorded.get(STATES) if isinstance(recorded, dict) else None
    if isinstance(kind, OutputRecorder):
        plain = kind.index == 0 and kind.layer_name is None and getattr(kind, "capture_initial_hidden_state", True)
        kind = kind.target_class if plain else None
    if not isinstance(kind, type):
        return None
    every = [module for module in _outside(tower, kind) if isinstance(module, kind)]
    for module in _outside(tower, kind):
        layers = next((found for name in ("layers", "layer") if (found := module._modules.get(name)) is not None), None)
        if isinstance(layers, nn.ModuleList) and list(layers) == every:
            state = state_of(original_class(module))
            known = state is not None and module._modules.get(state.layers or "") is layers and not state.skips
            return every if known and all(isinstance(layer, GradientCheckpointingLayer) for layer in every) else None
    return None


def _outside(module: nn.Module, kind: type | tuple[type, ...] = (), same: frozenset[nn.Module] = frozenset()) -> Iterator[nn.Module]:
    """``module`` and what is in it, but for the insides of modules of ``kind``, and of those that stay the ``same``, and these."""
    yield module
    for child in () if isinstance(module, kind) else module.children():
        if child not in same:
            yield from _outside(child, kind, same)


@fuses(rule=may_read_lower_layers)
class FusedLowerLayersReader:
    """transformers' own forward, in which layers compute nothing whose output it does not read."""

    computes_only = staticmethod(lambda module: None)  # the modules in it compute

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_interpreter_stack() or not on("labelled"):
            return super().forward(*args, **kwargs)
        with _left_out(_unread(self, args, kwargs)):
            return super().forward(*args, **kwargs)


def _unread(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[nn.Module]:
    """The layers in ``model`` whose outputs this call reads none of."""
    try:
        given = inspect.signature(original_class(model).forward).bind(model, *args, **kwargs).arguments
    except TypeError:  # the model says what is wrong
        return []
    found = []
    if not any(isinstance(value, Tensor) and value.dim() > 3 for value in given.values()):  # no images: a token that is generated
        return found
    for reading in readings(original_class(model)):
        if watched_globally() or any(given.get(name) is not None for name in reading.kept):
            continue
        tower = getattr(model, reading.path, None)
        layers = _layers_in(tower) if isinstance(tower, PreTrainedModel) else None
        if layers is None or any(name in model.__dict__ for name in _codes(original_class(model))):  # an image cache of ours
            continue
        read = _highest(_index_in(model, reading, given), len(layers))
        if read is not None and not _is_watched(tower, layers[:read]):
            found += layers[read:]
    return found


def _is_watched(tower: nn.Module, read: list[nn.Module]) -> bool:
    """Whether something is done around the call of a module in ``tower``, but for the layers that are ``read`` and what is before them."""
    before = {*read}
    with suppress(AttributeError, NotImplementedError):
        before.add(tower.get_input_embeddings())
    return any(has_hooks(module) or must_be_called(module) for module in _outside(tower, same=frozenset(before)))


def _index_in(model: nn.Module, reading: Reading, given: dict[str, Any]) -> Any:
    """Which hidden states a call reads."""
    if not reading.is_argument:
        return attrgetter(reading.index)(model)
    value = given.get(reading.index)
    return getattr(model.config, reading.index, None) if value is None else value


def _highest(index: Any, count: int) -> int | None:
    """How many of ``count`` layers are needed for hidden states at ``index``; None where that is not known."""
    indices = index if isinstance(index, list | tuple) else [index]
    if not indices or any(isinstance(i, bool) or not isinstance(i, int) or not -count - 1 <= i <= count for i in indices):
        return None
    return max(i if i >= 0 else count + 1 + i for i in indices)


@contextmanager
def _left_out(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, and on this thread, ``layers`` return what they get."""
    thread, given = threading.get_ident(), []
    for layer in layers:
        given.append(_handing_through(layer, thread))
        layer.__dict__["forward"] = given[-1]
    try:
        yield
    finally:
        for layer, forward in zip(layers, given):
            if layer.__dict__.get("forward") is forward:  # else another thread's is there
                del layer.__dict__["forward"]


def _handing_through(layer: nn.Module, thread: int) -> Any:
    own = type(layer).forward.__get__(layer)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden if threading.get_ident() == thread else own(hidden, *args, **kwargs)

    return forward
