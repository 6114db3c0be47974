"""A forward as a tree with ways up: where it calls modules, and where what they return goes."""

from __future__ import annotations

import ast
from functools import cache
from types import FunctionType

from torch import nn

from fastpeft.forms import as_written
from fastpeft.fused.code.state_reads import LAST, is_of_self
from fastpeft.fused.layers.shared_input import tree_of


class Code:
    """A forward as a tree, with ways up from each node."""

    def __init__(self, tree: ast.FunctionDef):
        self.tree, self.nodes = tree, list(ast.walk(tree))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.arguments = {a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)}
        self.attributes = {node.attr for node in self.nodes if isinstance(node, ast.Attribute)}
        self.of_self = {node.attr for node in self.nodes if is_of_self(node)}

    @staticmethod
    def of(cls: type[nn.Module], method: str = "forward") -> Code | None:
        """The code of a method; None where its source is not there."""
        return _code_of(as_written(getattr(cls, method)))

    def names(self, name: str, how: type[ast.expr_context] = ast.Load) -> list[ast.Name]:
        return [node for node in self.nodes if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, how)]

    def assigned(self, name: str) -> list[ast.expr]:
        """What is assigned to a variable."""
        statements = (node for node in self.nodes if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None)
        return [statement.value for statement in statements if self.target(statement.value) == name]

    def target(self, value: ast.expr) -> str | None:
        """The variable that an expression is assigned to."""
        statement = self.parents[value]
        (target,) = statement.targets if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else (None,)
        target = statement.target if isinstance(statement, ast.AnnAssign) else target
        return target.id if isinstance(target, ast.Name) and statement.value is value else None

    def is_returned(self, node: ast.AST) -> bool:
        while node in self.parents:
            if isinstance(node, ast.Return):
                return True
            node = self.parents[node]
        return False

    def states(self, output: str) -> list[ast.expr] | None:
        """Where the last hidden state of the variable ``output`` is taken out; None where it goes on as a whole."""
        found = []
        for node in self.names(output):
            parent = self.parents[node]
            if is_state(parent):
                found.append(parent)
            elif isinstance(parent, ast.Subscript | ast.Attribute | ast.Compare) or self.is_returned(node):
                continue
            elif not (isinstance(parent, ast.Call) and ast.unparse(parent.func) in ("isinstance", "len")):
                return None
        return found


def is_state(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and ast.unparse(node.slice) == "0"
    return isinstance(node, ast.Attribute) and node.attr == LAST


def called_path(call: ast.AST) -> str | None:
    """``a.b`` of a call ``self.a.b(...)``."""
    text = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
    return text.removeprefix("self.") if text.startswith("self.") and text.replace(".", "").isidentifier() else None


def keywords_of(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


@cache
def _code_of(function: FunctionType) -> Code | None:
    tree = tree_of(function)
    return None if tree is None else Code(tree)
