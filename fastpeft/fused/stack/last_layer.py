"""The last layer of any stack at the rows that are read only: what follows its attention there is computed for no other token.

Two things make it sound, each found in code, once for a class: nobody reads other rows (:mod:`fastpeft.fused.code.state_reads`), and a
layer is row-wise but for its attention (:mod:`fastpeft.fused.stack.row_wise`). :func:`at_rows` makes a forward of it that, behind the
statement with its attention, goes on with some rows of what it has; where one row of each sample is read, so does the attention
(:mod:`fastpeft.fused.stack.queries`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from fastpeft.forms import as_written
from fastpeft.fused.attention.interface import FusedInterfaceAttention
from fastpeft.fused.attention.tokens import LAYOUT
from fastpeft.fused.layers.shared_input import compiled, tree_of
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.stack.queries import ROWS, of_queries, rows
from fastpeft.fused.stack.row_wise import is_silent
from fastpeft.methods.base import must_be_called
from fastpeft.registry import replaced_class

ATTEND = "_fastpeft_attend"
MASK = "attention_mask"
ELSEWHERE = "encoder_hidden_states"  # of cross-attention, which no stack without padding has


def at_rows(cls: type[nn.Module]) -> FunctionType | None:
    """A forward of the layers of ``cls``, row-wise but for their attention, that computes what follows the attention for the rows alone
    that a :class:`LastLayout` among its keyword arguments names; None where its code does not allow it."""
    return _at_rows(as_written(cls.forward))


def handing_on(cls: type[nn.Module]) -> FunctionType | None:
    """A forward of the layers of ``cls`` that hands its other keyword arguments, which say where tokens lie, on to its attention too; None
    where its own does, and for what stands for a layer."""
    return _handing_on(as_written(cls.forward)) if issubclass(cls, nn.Module) else None


def run_handing_on(layer: Callable, *args: Any, **kwargs: Any) -> Any:
    """What ``layer`` gives where all its keyword arguments reach its attention; what stands for a layer sees to that itself."""
    forward = handing_on(type(layer))
    return layer(*args, **kwargs) if forward is None else forward(layer, *args, **kwargs)


@cache
def _handing_on(function: FunctionType) -> FunctionType | None:
    tree = _tree_of(function)
    return None if tree is None or not _give_rest(tree) else compiled(function, tree)


def _tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """The code of a forward that has keyword arguments besides those it names."""
    tree = None if function.__closure__ else tree_of(function)
    return None if tree is None or tree.args.kwarg is None else tree


def _give_rest(tree: ast.FunctionDef) -> bool:
    """Give the calls that get the mask alone all keyword arguments; whether there was one."""
    silent = list(filter(is_silent, ast.walk(tree)))
    for call in silent:
        call.keywords.append(ast.keyword(None, ast.Name(tree.args.kwarg.arg, ast.Load())))
    return bool(silent)


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``module``, an attention or what has one inside, gives; for the rows alone that are read, where it can."""
    layout, forward = kwargs.get(LAYOUT), None
    if isinstance(layout, LastLayout) and isinstance(module, nn.Module) and not must_be_called(module):
        if not isinstance(module, FusedInterfaceAttention):
            forward = at_rows(type(module))
        elif layout.column is not None:
            forward = of_queries(replaced_class(type(module)))
    return module(*args, **kwargs) if forward is None else forward(module, *args, **kwargs)


@cache
def _at_rows(function: FunctionType) -> FunctionType | None:
    tree = _tree_of(function)
    if tree is None:
        return None
    attends = [i for i, statement in enumerate(tree.body) if _hands_mask(statement)]
    if len(attends) != 1 or not isinstance(tree.body[attends[0]], ast.Assign):
        return None
    before, after, rest = tree.body[: attends[0] + 1], tree.body[attends[0] + 1 :], tree.args.kwarg.arg
    across = list(filter(_attends_elsewhere, after))  # it hands on where tokens lie
    needed = _needed(tree.args, before, [statement for statement in after if statement not in across])
    needed |= _names(before, ast.Store) & _names(across, ast.Load)
    if rest in needed or any(map(_keeps_shape, before)):
        return None
    _give_rest(tree)
    _attend_at_rows(before[-1])
    attended = list(before)
    for name in sorted(needed):
        value = ast.Call(ast.Name(ROWS, ast.Load()), [ast.Name(rest, ast.Load()), ast.Name(name, ast.Load())], [])
        taken = ast.Assign([ast.Name(name, ast.Store())], value)
        before.append(taken if _is_bound(tree.args, attended, name) else _if_bound(taken))
    tree.body = before + after
    function.__globals__.setdefault(ROWS, rows)
    function.__globals__.setdefault(ATTEND, attend)
    return compiled(function, tree)


def _attend_at_rows(statement: ast.stmt) -> None:
    """Let the module that gets the mask be called through :func:`attend`."""
    for call in [n for n in ast.walk(statement) if isinstance(n, ast.Call)]:
        of_self = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "self"
        if of_self and any(_is_mask(a) for a in (*call.args, *(keyword.value for keyword in call.keywords))):
            call.args.insert(0, call.func)
            call.func = ast.Name(ATTEND, ast.Load())


def _is_mask(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == MASK


def _needed(arguments: ast.arguments, before: list[ast.stmt], after: list[ast.stmt]) -> set[str]:
    """Variables that have a value ``before`` and are read ``after``, but for the module itself and what goes to attention."""
    me, *others = (a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.kwarg))
    stored, read = _names(before, ast.Store), _names(after, ast.Load)
    return (stored | set(others)) & read - {me, MASK, ELSEWHERE}


def _is_bound(arguments: ast.arguments, before: list[ast.stmt], name: str) -> bool:
    """Whether a variable has a value ``before``, whatever the configuration is."""
    given = (a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    return name in given or any(name in _names([s], ast.Store) for s in before if not isinstance(s, ast.If))


def _if_bound(statement: ast.stmt) -> ast.Try:
    return ast.Try([statement], [ast.ExceptHandler(ast.Name("UnboundLocalError", ast.Load()), None, [ast.Pass()])], [], [])


def _names(statements: list[ast.stmt], how: type[ast.expr_context]) -> set[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, how)}


def _hands_mask(statement: ast.stmt) -> bool:
    chooses = isinstance(statement, ast.Assign) and list(map(ast.unparse, statement.targets)) == [MASK]
    return not chooses and not _attends_elsewhere(statement) and _loads(statement, MASK)


def _attends_elsewhere(statement: ast.stmt) -> bool:
    """Whether a statement is cross-attention, where there is something to attend to."""
    test = statement.test if isinstance(statement, ast.If) else None
    terms = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return test is not None and not statement.orelse and f"{ELSEWHERE} is not None" in map(ast.unparse, terms)


def _keeps_shape(statement: ast.stmt) -> bool:
    """Whether a statement keeps the shape of something, which rows do not have."""
    return any(isinstance(n, ast.Attribute) and n.attr in ("shape", "size") for n in ast.walk(statement))


def _loads(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(node))
