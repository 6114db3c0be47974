"""What a method of a model computes from: the modules and tensors below it, whether they are constants, and which constants they are."""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastpeft.forms import as_written, home_of
from fastpeft.methods.base import ADAPTER_MODULES, is_adapter, sees_values, watched_globally
from fastpeft.methods.quantized import pieces_of

HARMLESS = ("config", "dtype", "device", "training", "loss_function")  # attributes of a model that hold no module; all are in a state
NO_MATHEMATICS = ("problem_type", "id2label", "label2id", "architectures", "_name_or_path", "transformers_version", "dtype", "use_cache")
ASK_FOR_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers' hook, and PEFT's
SAMPLE = 64  # bytes read at a tensor's start, middle and end


class NotUnderstood(ValueError):
    """A method's code does something that its source does not tell."""


def names_below(owner: nn.Module, method: str) -> list[str]:
    """Names of the modules, parameters and buffers of ``owner`` that its ``method`` uses, itself or in methods it calls.
    :class:`NotUnderstood` where the source does not tell."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    _follow(owner, method, found, seen)
    return list(found)


def calls(owner: nn.Module, method: str, called: str) -> bool:
    """Whether ``method`` of ``owner``'s class, or a method that it calls on itself, calls ``self.<called>``."""
    seen, waiting = set(), [method]
    while waiting:
        name = waiting.pop()
        if name in seen or (tree := source_of(type(owner), name)) is None:
            continue
        seen.add(name)
        names = {node.attr for node in ast.walk(tree) if _is_of_self(node)}
        if called in names:
            return True
        waiting += [name for name in names if callable(getattr(type(owner), name, None))]
    return False


def delegates(owner: nn.Module, method: str) -> bool:
    """Whether ``method`` calls the method of its name of a module inside."""
    tree = source_of(type(owner), method)
    return tree is not None and any(isinstance(node, ast.Attribute) and node.attr == method for node in ast.walk(tree))


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def source_of(cls: type, name: str) -> ast.AST | None:
    """The code of a method, parsed; None where there is none to read, or somebody wraps it."""
    attribute = inspect.getattr_static(cls, name, None)
    attribute = attribute.fget if isinstance(attribute, property) else attribute
    attribute = attribute.__func__ if isinstance(attribute, (staticmethod, classmethod)) else attribute
    if home_of(attribute).startswith("fastpeft."):  # a fused forward with the signature of the one that it replaces
        attribute = getattr(attribute, "__wrapped__", attribute)
    attribute = as_written(attribute)
    if hasattr(attribute, "__wrapped__"):  # by somebody else, and inspect would read what is inside
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(attribute)))
    except (TypeError, OSError, SyntaxError):
        return None


def _follow(owner: nn.Module, method: str, found: dict[str, None], seen: set[str]) -> None:
    if method in seen:
        return
    seen.add(method)
    if (tree := source_of(type(owner), method)) is None:
        raise NotUnderstood(f"the source of {type(owner).__name__}.{method} is not there")
    named = {id(node.value) for node in ast.walk(tree) if _is_of_self(node)}
    for node in ast.walk(tree):
        bare = isinstance(node, ast.Name) and node.id == "self" and isinstance(node.ctx, ast.Load) and id(node) not in named
        if bare or (isinstance(node, ast.Name) and node.id == "super"):
            raise NotUnderstood(f"{type(owner).__name__}.{method} hands itself on")
        if not _is_of_self(node) or node.attr in HARMLESS or node.attr in found:
            continue
        held = (owner._modules, owner._parameters, owner._buffers)
        if any(node.attr in table for table in held):
            found[node.attr] = None
        elif isinstance(inspect.getattr_static(type(owner), node.attr, None), property) or callable(getattr(type(owner), node.attr, None)):
            _follow(owner, node.attr, found, seen)
        elif isinstance(value := owner.__dict__.get(node.attr), (nn.Module, Tensor)) or callable(value):
            raise NotUnderstood(f"{type(owner).__name__}.{method} uses {node.attr}, which is no module of its own")


def tensors_below(owner: nn.Module, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name in ``owner``, tensor) of every parameter and buffer at or below ``names`` ("" : owner itself)."""
    for name in names:
        value = owner if name == "" else getattr(owner, name)
        if isinstance(value, nn.Module):
            for kind in (value.named_parameters(remove_duplicate=False), value.named_buffers(remove_duplicate=False)):
                yield from ((".".join(filter(None, (name, inner))), tensor) for inner, tensor in kind)
        elif isinstance(value, Tensor):
            yield name, value


def modules_below(owner: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    for name in names:
        value = owner if name == "" else getattr(owner, name)
        if isinstance(value, nn.Module):
            yield from ((".".join(filter(None, (name, inner))), module) for inner, module in value.named_modules())


def why_not_constant(owner: nn.Module, names: list[str]) -> str:
    """'' where what is below computes the same from the same input now; else the reason it may not."""
    for name, tensor in tensors_below(owner, names):
        if tensor.requires_grad:
            return f"{name} is trained"
        if is_adapter(name):
            return f"{name} belongs to an adapter"
        if tensor.device.type == "meta":
            return f"{name} has no data"
        if type(tensor).__name__ == "DTensor":
            return f"{name} is sharded: processes would wait for each other where one has met an image and another has not"
    for name, module in modules_below(owner, names):
        cls = type(module)
        if cls.__module__.startswith("peft.tuners.") or any(module._modules.get(kind) is not None for kind in ADAPTER_MODULES):
            return f"an adapter is on {name}"
        if _is_watched(module):
            return f"{name or cls.__name__} has hooks"
        if module.training and (why := _why_random(module)):
            return f"{name or cls.__name__} {why}"
    return ""


def _is_watched(module: nn.Module) -> bool:
    """As ``has_hooks``, but for an image cache of ours and for hooks that only ask for gradients."""
    if not isinstance(module.__dict__.get("forward", WRAPPED), Wrapper):
        return True
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    return any(getattr(hook, "__name__", "") not in ASK_FOR_GRADIENTS and sees_values(hook) for hook in hooks) or watched_globally()


def asks_for_gradients(owner: nn.Module, names: list[str]) -> bool:
    """Whether a hook below makes outputs require gradients that no parameter does: ``enable_input_require_grads``, for checkpointing."""
    hooks = (hook for _, module in modules_below(owner, names) for hook in module._forward_hooks.values())
    return any(getattr(hook, "__name__", "") in ASK_FOR_GRADIENTS for hook in hooks)


def _why_random(module: nn.Module) -> str:
    """'' or why a module in training draws random numbers or depends on its batch."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "normalises over its batch"
    for name, value in module.__dict__.items():
        rate = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if rate and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
            return f"drops at random ({name} = {value:g})"
    return ""


def state_of(owner: nn.Module, names: list[str]) -> tuple:
    """Equal as long as nothing below was changed: identity, place, version, dtype of every tensor, modules, configuration, and on the
    host some of the bytes, because edits through ``.data`` raise no version. Waits for no device."""
    state: list[Any] = [type(owner), str(getattr(owner, "dtype", "")), configuration_of(owner)]
    modules = [module for _, module in modules_below(owner, names)]
    state += [(id(module), type(module)) for module in modules]
    fixed = {id(buffer) for module in modules for name, buffer in module._buffers.items() if _is_fixed(module, name)}
    for _, tensor in tensors_below(owner, names):
        version = None if tensor.is_inference() or id(tensor) in fixed else tensor._version
        state.append((id(tensor), tensor.dtype, tensor.device, version))
        state += [(piece.data_ptr(), _sample(piece)) for piece in pieces_of(tensor)]
    return tuple(state)


def _is_fixed(module: nn.Module, name: str) -> bool:
    """Whether a buffer follows from the configuration (positions, rotary frequencies): DDP writes to these before every forward."""
    buffer = module._buffers[name]
    return buffer is not None and (name in module._non_persistent_buffers_set or not buffer.is_floating_point())


def _sample(tensor: Tensor) -> bytes:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return b""
    size, at = tensor.nbytes, tensor.data_ptr()
    if size <= 3 * SAMPLE:
        return ctypes.string_at(at, size)
    return b"".join(ctypes.string_at(at + begin, SAMPLE) for begin in (0, size // 2, size - SAMPLE))


def configuration_of(owner: nn.Module) -> str:
    """The model's configuration as text, without what names a file, a task or a loss (transformers sets ``problem_type`` in a step)."""
    config = getattr(owner, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps({name: value for name, value in told.items() if name not in NO_MATHEMATICS}, sort_keys=True, default=str)


class Wrapper:
    """A callable that stands in a module's ``__dict__`` over a method of the module's class."""


WRAPPED = Wrapper()
