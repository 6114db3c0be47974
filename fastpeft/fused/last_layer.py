"""The last layer of any stack at labelled positions only: what follows its attention there is computed for no other token.

Three things make it sound, each found in code, once for a class:

- the model's forward hands the last hidden state to its head and to nothing else (:func:`reads_labels_alone`), and models between it and
  the stack hand it on;
- behind its loop over layers, the stack has norms and projections only (:func:`ends_row_by_row`);
- a layer is row-wise but for its attention (:mod:`fastpeft.fused.row_wise`). :func:`at_rows` makes a forward of it that, behind the
  statement with its attention, goes on with some rows of what it has.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastpeft.fused.attention_interface import LAYOUT
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.row_wise import is_silent
from fastpeft.fused.shared_input import tree_of
from fastpeft.registry import replaced_class

ROWS = "_fastpeft_rows"
MASK, LAST = "attention_mask", "last_hidden_state"
LOOPS = frozenset(("layers", "h", "block"))  # what a stack calls its layers
CUT = "slice_logits_to_keep"
ELSEWHERE = "encoder_hidden_states"  # of cross-attention, which no stack without padding has


def reads_labels_alone(model: nn.Module, head: nn.Module, decoder: nn.Module | None) -> bool:
    """Whether the loss of ``model`` reads the last hidden state of ``decoder``, through ``head``, at labelled positions, and nobody reads
    it elsewhere. For training steps whose logits and hidden states nobody reads."""
    if decoder is None or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return False
    found = read_by_head(replaced_class(type(model)) or type(model))
    if found is None or getattr(model, found[1], None) is not head:
        return False
    inner = attrgetter(found[0])(model)
    while isinstance(inner, nn.Module) and inner is not decoder:
        path = handed_on(replaced_class(type(inner)) or type(inner))
        inner = None if path is None else attrgetter(path)(inner)
    return inner is decoder


@cache
def read_by_head(cls: type[nn.Module]) -> tuple[str, str] | None:
    """(the module whose output's last hidden state the forward of ``cls`` reads, the head that it goes to), by their names; None where it
    goes elsewhere too, or that cannot be told."""
    read = _Uses.of(cls)
    if read is None:
        return None
    module, uses = read
    states = uses.states()
    if states is None:
        return None
    heads: set[str] = set()
    waiting, known = list(states), set()
    while waiting:
        to = _consumer(waiting.pop(), uses.parents)
        if isinstance(to, str):
            heads.add(to)
        elif isinstance(to, ast.Name):
            if to.id not in known:
                known.add(to.id)
                waiting += [n for n in uses.nodes if isinstance(n, ast.Name) and n.id == to.id and isinstance(n.ctx, ast.Load)]
        else:
            return None
    return (module, heads.pop()) if len(heads) == 1 and states else None


def _consumer(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str | ast.Name | None:
    """Where a hidden state goes: the name of a module of ``self`` that is called with it, or with some of its rows or in another dtype; the
    variable that it is assigned to; None for anything else."""
    while True:
        child, node = node, parents[node]
        if isinstance(node, ast.Subscript) and child is node.value:
            continue
        if isinstance(node, ast.Attribute) and node.attr == "to" and isinstance(parents[node], ast.Call) and parents[node].func is node:
            node = parents[node]
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == CUT and node.args[0] is child:
            continue
        if isinstance(node, ast.Call) and _of_self(node.func) and node.args == [child] and not node.keywords:
            return node.func.attr
        whole = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        return node.targets[0] if whole else None


@cache
def handed_on(cls: type[nn.Module]) -> str | None:
    """The module whose output's last hidden state the forward of ``cls`` returns as its own, and does nothing else with."""
    read = _Uses.of(cls)
    if read is None:
        return None
    module, uses = read
    for node in uses.of_output:
        parent = uses.parents[node]
        if isinstance(parent, ast.Return) or uses.is_returned(parent):
            continue
        if not isinstance(parent, ast.Attribute):
            return None
        keyword = uses.parents[parent]
        if parent.attr == LAST and not (isinstance(keyword, ast.keyword) and keyword.arg == LAST):
            return None
    return module


class _Uses:
    """A forward whose one call of a model inside has an output with a last hidden state. ``of_output``: where it is read."""

    def __init__(self, tree: ast.FunctionDef, name: str):
        self.nodes = list(ast.walk(tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.of_output = [n for n in self.nodes if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]

    @classmethod
    def of(cls, model: type[nn.Module]) -> tuple[str, _Uses] | None:
        """(the module's name, its uses)"""
        tree = tree_of(inspect.unwrap(model.forward))
        if tree is None:
            return None
        calls = {}
        for node in ast.walk(tree):
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and isinstance(node.value, ast.Call):
                calls.setdefault(target.id, []).append(node.value.func)
        found = [(made, uses) for name, made in calls.items() if (uses := cls(tree, name)).has_state]
        if len(found) != 1:
            return None
        ((made, uses),) = found
        path = ast.unparse(made[0]).removeprefix("self.")
        return (path, uses) if len(made) == 1 and _PATH(ast.unparse(made[0])) else None

    def states(self) -> list[ast.AST] | None:
        """Where the last hidden state is taken out, as an attribute or as the first item; None where the output goes on as a whole."""
        found = []
        for node in self.of_output:
            parent = self.parents[node]
            index = ast.unparse(parent.slice) if isinstance(parent, ast.Subscript) else None
            if not isinstance(parent, ast.Attribute) and index not in ("0", "1:"):
                return None
            if index == "0" or (index is None and parent.attr == LAST):
                found.append(parent)
        return found

    @property
    def has_state(self) -> bool:
        """Whether a last hidden state is read of it, or it is returned."""
        around = [self.parents[node] for node in self.of_output]
        return any(
            isinstance(parent, ast.Return)
            or (isinstance(parent, ast.Attribute) and parent.attr == LAST)
            or (isinstance(parent, ast.Subscript) and ast.unparse(parent.slice) == "0")
            or self.is_returned(parent)
            for parent in around
        )

    def is_returned(self, node: ast.AST) -> bool:
        """Whether ``node`` hands all on to what is returned: ``return Output(**outputs)``."""
        return isinstance(node, ast.keyword) and node.arg is None and isinstance(self.parents[self.parents[node]], ast.Return)


_PATH = re.compile(r"self(\.[A-Za-z_]\w*)+").fullmatch


def _of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


@cache
def ends_row_by_row(cls: type[nn.Module]) -> bool:
    """Whether the forward of a stack's class, behind its loop over layers, calls norms and projections on the hidden states alone."""
    tree = tree_of(inspect.unwrap(cls.forward))
    body = [] if tree is None else tree.body
    loops = [i for i, statement in enumerate(body) if isinstance(statement, ast.For) and _reads_layers(statement.iter)]
    if len(loops) != 1:
        return False
    assigned = {
        ast.unparse(n.targets[0]) for n in ast.walk(body[loops[0]]) if isinstance(n, ast.Assign) and _calls(n.value, body[loops[0]])
    }
    return len(assigned) == 1 and all(_is_row_by_row(s, *assigned) for s in body[loops[0] + 1 :])


def _reads_layers(node: ast.AST) -> bool:
    return any(_of_self(n) and n.attr in LOOPS for n in ast.walk(node))


def _calls(value: ast.AST, loop: ast.For) -> bool:
    """Whether a value is a call of the loop's variable, the layer."""
    names = {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in names


def _is_row_by_row(statement: ast.stmt, name: str) -> bool:
    if isinstance(statement, ast.If) and not statement.orelse and not _loads(statement.test, name):
        return all(_is_row_by_row(inner, name) for inner in statement.body)
    if isinstance(statement, ast.Return) or not _loads(statement, name):
        return True
    if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) != name or not isinstance(statement.value, ast.Call):
        return False
    call = statement.value
    back = ast.unparse(call) == f"{name}.view(output_shape)"  # GPT-2: as the batch came
    return back or (_of_self(call.func) and len(call.args) == 1 and ast.unparse(call.args[0]) == name and not call.keywords)


def rows(rest: dict[str, Any], value: Any) -> Any:
    """The rows of ``value`` [1, T, ...] that are read, as the layout in a layer's keyword arguments says."""
    layout = rest.get(LAYOUT)
    if not isinstance(value, Tensor) or not isinstance(layout, LastLayout) or value.dim() < 3 or value.shape[:2] != (1, layout.tokens):
        return value
    return value.index_select(1, layout.read)


def at_rows(cls: type[nn.Module]) -> FunctionType | None:
    """A forward of the layers of ``cls``, row-wise but for their attention, that computes what follows the attention for the rows alone
    that a :class:`LastLayout` among its keyword arguments names; None where its code does not allow it."""
    return _at_rows(inspect.unwrap(cls.forward))


def handing_on(cls: type[nn.Module]) -> FunctionType | None:
    """A forward of the layers of ``cls`` that hands its other keyword arguments, which say where tokens lie, on to its attention too; None
    where its own does, and for what stands for a layer."""
    return _handing_on(inspect.unwrap(cls.forward)) if issubclass(cls, nn.Module) else None


def run_handing_on(layer: Callable, *args: Any, **kwargs: Any) -> Any:
    """What ``layer`` gives where all its keyword arguments reach its attention; what stands for a layer sees to that itself."""
    forward = handing_on(type(layer))
    return layer(*args, **kwargs) if forward is None else forward(layer, *args, **kwargs)


@cache
def _handing_on(function: FunctionType) -> FunctionType | None:
    tree = _tree_of(function)
    return None if tree is None or not _give_rest(tree) else _compiled(function, tree)


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


def _compiled(function: FunctionType, tree: ast.FunctionDef) -> FunctionType:
    """``function`` with the code of ``tree``."""
    tree.decorator_list = []
    code = compile(ast.fix_missing_locations(ast.Module([tree], [])), function.__code__.co_filename, "exec")
    code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == tree.name)
    ours = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    ours.__kwdefaults__ = function.__kwdefaults__
    return ours


@cache
def _at_rows(function: FunctionType) -> FunctionType | None:
    tree = _tree_of(function)
    if tree is None:
        return None
    attends = [i for i, statement in enumerate(tree.body) if _hands_mask(statement)]
    if len(attends) != 1 or not isinstance(tree.body[attends[0]], ast.Assign):
        return None
    before, after, rest = tree.body[: attends[0] + 1], tree.body[attends[0] + 1 :], tree.args.kwarg.arg
    needed = _needed(tree.args, before, after)
    if rest in needed or any(map(_keeps_shape, before)):
        return None
    _give_rest(tree)
    for name in sorted(needed):
        value = ast.Call(ast.Name(ROWS, ast.Load()), [ast.Name(rest, ast.Load()), ast.Name(name, ast.Load())], [])
        before.append(ast.Assign([ast.Name(name, ast.Store())], value))
    tree.body = before + after
    function.__globals__.setdefault(ROWS, rows)
    return _compiled(function, tree)


def _needed(arguments: ast.arguments, before: list[ast.stmt], after: list[ast.stmt]) -> set[str]:
    """Variables that have a value ``before`` and are read ``after``, but for the module itself and what goes to attention."""
    me, *others = (a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.kwarg))
    stored, read = _names(before, ast.Store), _names(after, ast.Load)
    return (stored | set(others)) & read - {me, MASK, ELSEWHERE}


def _names(statements: list[ast.stmt], how: type[ast.expr_context]) -> set[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, how)}


def _hands_mask(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == f"{ELSEWHERE} is not None":
        return False
    return _loads(statement, MASK)


def _keeps_shape(statement: ast.stmt) -> bool:
    """Whether a statement keeps the shape of something, which rows do not have."""
    return any(isinstance(n, ast.Attribute) and n.attr in ("shape", "size") for n in ast.walk(statement))


def _loads(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(node))
