"""Attention of the few queries that are read: a forward of an attention layer made of its own, whose keys and values are of all tokens.

    q = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)       of the rows that are read
    q, k = apply_rotary_pos_emb(q, k, cos, sin)                             each by the tables of its own tokens
    out, weights = attention_interface(self, q, k, v, attention_mask, ...)  one query a sample, its row of the mask
    out = out.reshape(*input_shape, -1)                                     as many rows as there are queries

:func:`of_queries` rewrites these statements, by what a forward's code says, for layers whose :class:`~fastpeft.fused.layout.LastLayout`
reads one row of each sample (``column``). Where anything else depends on the queries, there is no such forward, and the attention is
computed in full.
"""

from __future__ import annotations

import ast
import re
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from fastpeft.forms import as_written, cache_by_forward
from fastpeft.fused.attention.interface import looking_up_ours
from fastpeft.fused.attention.rotary import kind_of as rotary_kind
from fastpeft.fused.attention.tokens import LAYOUT
from fastpeft.fused.layers.shared_input import compiled, join_tree, tree_of
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.stack.row_wise import ATTENTION

ROWS, AT = "_fastpeft_rows", "_fastpeft_at_rows"
HEADS = re.compile(r"\(\*(\w+), -1, [\w.]+\)").fullmatch  # (*input_shape, -1, self.head_dim)


def rows(rest: dict[str, Any], value: Any) -> Any:
    """The rows of ``value`` that are read, as the layout in a layer's keyword arguments says: of tokens [1, T, ...], or, where it is not
    flat, of [B or 1, L, ...]. What has those alone stays. Of what an attention returned, its output's."""
    layout = rest.get(LAYOUT)
    if isinstance(value, tuple) and value:
        return rows(rest, value[0]), *value[1:]
    if not isinstance(value, Tensor) or not isinstance(layout, LastLayout) or value.dim() < 3:
        return value
    if layout.flat:
        return value.index_select(1, layout.read) if value.shape[:2] == (1, layout.tokens) else value
    return layout.of_each(value) if value.shape[1] == layout.columns and value.shape[0] in (1, layout.rows) else value


def _name(name: str, store: bool = False) -> ast.Name:
    return ast.Name(name, ast.Store() if store else ast.Load())


def _loads(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _stores(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


class _NotThis(Exception):
    """Code that no forward at some queries is made of."""


@cache_by_forward
def of_queries(cls: type[nn.Module]) -> FunctionType | None:
    """A forward of an attention layer of ``cls``, as transformers wrote it, that returns the rows that are read; None where its code does
    not allow it."""
    function = as_written(cls.forward)
    tree = None if function.__closure__ else tree_of(function)
    if tree is None or tree.args.kwarg is None:
        return None
    try:
        _Rewriter(tree, function.__globals__).rewrite()
    except _NotThis:
        return None
    function.__globals__.setdefault(ROWS, rows)
    join_tree(tree)
    return looking_up_ours(compiled(function, tree))


class _Rewriter:
    """Rewrites the tree of one forward."""

    def __init__(self, tree: ast.FunctionDef, namespace: dict[str, Any]):
        self.tree, self.namespace = tree, namespace
        self.hidden, self.rest = tree.args.args[1].arg, tree.args.kwarg.arg

    def rewrite(self) -> None:
        before, attends, behind = self._parts()
        call, out = attends.value, attends.targets[0].elts[0].id
        self.query, self.key = call.args[1].id, call.args[2].id
        assigns = [s for s in before if isinstance(s, ast.Assign)]
        self.shapes = {name for s in assigns if _is_shape(s.value, self.hidden) for name in _stores(s)}
        self.tuples = {ast.unparse(s.targets[0]): m.group(1) for s in assigns if (m := HEADS(ast.unparse(s.value)))}
        arguments = {a.arg for a in (*self.tree.args.args[1:], *self.tree.args.kwonlyargs)}
        self.tokenwise = set().union(*map(_stores, before), arguments) - self.shapes - self.tuples.keys()  # may have all tokens' rows
        made = [new for statement in before for new in self._before(statement)]
        if any(self.query in _loads(n) for n in (*call.args[3:], *call.keywords)):
            raise _NotThis
        if any(_loads(s) & (self.tokenwise - _stores(attends)) for s in behind):
            raise _NotThis
        behind = [_Flatten(out, self.shapes).visit(s) for s in behind]
        if any(_loads(s) & (self.shapes | self.tuples.keys()) for s in behind):
            raise _NotThis
        taken = ast.Assign([_name(AT, True)], ast.Call(_name(ROWS), [_name(self.rest), _name(self.hidden)], []))
        self.tree.body = [taken, *made, attends, *behind]

    def _parts(self) -> tuple[list[ast.stmt], ast.Assign, list[ast.stmt]]:
        """What is before ``out, weights = attention_interface(self, q, k, v, mask, ...)``, this, and what is behind."""
        body = self.tree.body
        at = [i for i, s in enumerate(body) if any(isinstance(n, ast.Call) and _is(n, ATTENTION) for n in ast.walk(s))]
        if len(at) != 1 or any(self.hidden in _stores(s) for s in body):
            raise _NotThis
        attends = body[at[0]]
        call = attends.value if isinstance(attends, ast.Assign) else None
        if not isinstance(call, ast.Call) or not isinstance(attends.targets[0], ast.Tuple) or len(call.args) < 5:
            raise _NotThis
        if not all(isinstance(node, ast.Name) for node in (*attends.targets[0].elts, *call.args[1:4])):
            raise _NotThis
        return body[: at[0]], attends, body[at[0] + 1 :]

    def _before(self, statement: ast.stmt) -> list[ast.stmt]:
        """What takes the place of a statement before the attention."""
        if self.query not in _stores(statement):
            if self.query in _loads(statement):
                raise _NotThis
            return [statement]
        if isinstance(statement, ast.If) and self.query not in _loads(statement.test):
            statement.body = [new for inner in statement.body for new in self._before(inner)]
            statement.orelse = [new for inner in statement.orelse for new in self._before(inner)]
            return [statement]
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise _NotThis
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Name):
            if _loads(value) & (self.tokenwise - {self.query, self.hidden}):
                raise _NotThis
            statement.value = _AtRows(self).visit(value)
            return [statement]
        return self._turned(target, value)

    def _turned(self, target: ast.expr, value: ast.expr) -> list[ast.stmt]:
        """``q, k = rotary(q, k, cos, sin)``, queries and keys each by themselves."""
        pair = f"({self.query}, {self.key})"
        if ast.unparse(target) not in (pair, pair[1:-1]) or not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name):
            raise _NotThis
        names = [a.id if isinstance(a, ast.Name) else None for a in value.args]
        if len(names) != 4 or None in names or names[:2] != [self.query, self.key]:
            raise _NotThis
        if rotary_kind(self.namespace.get(value.func.id)) is None or any(keyword.arg != "unsqueeze_dim" for keyword in value.keywords):
            raise _NotThis
        tables = [_name(name) for name in names[2:]]
        read = [ast.Call(_name(ROWS), [_name(self.rest), _name(name)], []) for name in names[2:]]
        made = []
        for which, (name, of) in enumerate(((self.query, read), (self.key, tables))):
            call = ast.Call(_name(value.func.id), [_name(name), _name(name), *of], value.keywords)
            made.append(ast.Assign([_name(name, True)], ast.Subscript(call, ast.Constant(which), ast.Load())))
        return made


def _is(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


def _is_shape(value: ast.expr, hidden: str) -> bool:
    """Whether a value is the batch and the tokens of ``hidden``."""
    return ast.unparse(value) in (f"{hidden}.shape[:-1]", f"{hidden}.shape", f"{hidden}.size()", f"{hidden}.shape[:2]")


class _AtRows(ast.NodeTransformer):
    """An expression of the queries, of the rows that are read; ``.view(*shape, heads, width)`` is ``.unflatten(-1, (heads, width))``."""

    def __init__(self, rewriter: _Rewriter):
        self.of = rewriter

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.of.shapes or node.id in self.of.tuples:
            raise _NotThis
        return ast.copy_location(_name(AT), node) if node.id == self.of.hidden else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("view", "reshape"):
            return ast.Call(ast.Attribute(self.visit(node.func.value), "unflatten", ast.Load()), [ast.Constant(-1), self._heads(node)], [])
        return self.generic_visit(node)

    def _heads(self, node: ast.Call) -> ast.expr:
        """(heads, width) of what a ``view`` makes, [B, L, heads, width]."""
        args = node.args
        if node.keywords:
            raise _NotThis
        shape = args[0].value if len(args) == 1 and isinstance(args[0], ast.Starred) else args[0]
        if len(args) == 1 and isinstance(shape, ast.Name) and self.of.tuples.get(shape.id) in self.of.shapes:
            return ast.Subscript(_name(shape.id), ast.Slice(ast.UnaryOp(ast.USub(), ast.Constant(2))), ast.Load())
        if len(args) == 4 and not any(isinstance(a, ast.Starred) for a in args) and _loads(args[0]) | _loads(args[1]) <= self.of.shapes:
            return ast.Tuple(args[2:], ast.Load())
        if len(args) == 3 and isinstance(args[0], ast.Starred) and _loads(args[0]) <= self.of.shapes:
            return ast.Tuple(args[1:], ast.Load())
        raise _NotThis


class _Flatten(ast.NodeTransformer):
    """``out.reshape(*input_shape, -1)`` of an attention's output [B, M, H, d] becomes ``out.flatten(2)``."""

    def __init__(self, out: str, shapes: set[str]):
        self.out, self.shapes = out, shapes

    def visit_Call(self, node: ast.Call) -> ast.expr:
        func = node.func
        if isinstance(func, ast.Attribute) and func.attr in ("reshape", "view") and ast.unparse(func.value) == self.out:
            first = node.args[:-1]
            if node.keywords or not first or not set().union(*map(_loads, first)) <= self.shapes or len(first) > 2:
                raise _NotThis
            if len(first) == 1 and not isinstance(first[0], ast.Starred):
                raise _NotThis
            return ast.copy_location(ast.Call(ast.Attribute(func.value, "flatten", ast.Load()), [ast.Constant(2)], []), node)
        return self.generic_visit(node)
