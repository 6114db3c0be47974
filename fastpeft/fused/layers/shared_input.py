"""Layers that one forward hands the same tensor (queries, keys and values), found in its code and run as one operator.

    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)

:func:`join_calls` reads a forward and puts, before the statement with the first of such calls, one that runs all of the layers together
(:func:`together`); each call then takes its own output (:func:`take`). The layers share one product for the A of all LoRAs, one input for
backward and one sum of its gradients (:mod:`fastpeft.ops.lora_linear`). Whatever cannot run together at this call, a layer with hooks, of
another kind, or given another tensor, is called in its place as ever: what is joined is decided by the tensors' identity, when it runs.

A call joins where it has one argument, a variable, or another variable that is assigned from it by an expression without side effects
(``current_states = key_value_states if is_cross_attention else hidden_states``). A call under a condition joins one before it where the
condition cannot keep it from running then (the ``else`` of ``if is_cross_attention and is_updated``); else its output might be for nobody.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.fused.layers.projections import joined, rescaled
from fastpeft.methods.adapted import linear_spec

TOGETHER, TAKE = "_fastpeft_together", "_fastpeft_take"
OUTPUTS = "_fastpeft_outputs_{}".format  # the variable that holds a group's outputs
PURE = (ast.IfExp, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Name, ast.Constant, ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.ClassDef)
LOOPS = (ast.For, ast.While, ast.AsyncFor)


class Outputs(NamedTuple):
    """What layers gave for ``x``, as it was at ``version``, by their names."""

    x: Tensor
    version: int
    of: dict[str, Tensor]


def together(before: Outputs | None, module: nn.Module, x: Tensor, *others: tuple[str, Tensor]) -> Outputs | None:
    """The outputs of ``module``'s layers of these names that are handed ``x``; None where fewer than two can run as one, or nothing is
    gained. A layer with hooks is called in its place. ``before``: what is there already, which may be of ``x``."""
    if before is not None and before.x is x:
        return before
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    layers = {name: getattr(module, name, None) for name, given in others if given is x}
    specs = {name: spec for name, layer in layers.items() if isinstance(layer, nn.Module) and (spec := linear_spec(layer)) is not None}
    outputs = joined(list(specs.values()), x) if len(specs) > 1 else None
    if outputs is None:
        return None
    return Outputs(x, x._version, {name: rescaled(layers[name], y) for name, y in zip(specs, outputs)})


def take(outputs: Outputs | None, name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, of ``outputs`` where it is there."""
    if outputs is None or x is not outputs.x or x._version != outputs.version or name not in outputs.of:
        return layer(x)
    return outputs.of.pop(name)


def join_calls(function: FunctionType) -> FunctionType:
    """``function``, a forward, whose calls of layers with one input run together; itself where there are none, or no source."""
    if function.__closure__ or (tree := tree_of(function)) is None:
        return function
    return compiled(function, tree) if join_tree(tree) else function


def join_tree(tree: ast.FunctionDef) -> bool:
    """Join such calls in the code of a forward; whether there were any."""
    return _Joiner(tree).join()


def compiled(function: FunctionType, tree: ast.FunctionDef) -> FunctionType:
    """``function`` with the code of ``tree``, made of its own."""
    tree.decorator_list = []
    ast.increment_lineno(tree, function.__code__.co_firstlineno - tree.lineno)
    module = compile(ast.Module([ast.fix_missing_locations(tree)], []), function.__code__.co_filename, "exec")
    code = next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == tree.name)
    namespace = function.__globals__
    namespace.setdefault(TOGETHER, together)
    namespace.setdefault(TAKE, take)
    code = code.replace(co_firstlineno=function.__code__.co_firstlineno)
    ours = FunctionType(code, namespace, function.__name__, function.__defaults__)
    ours.__kwdefaults__, ours.__doc__, ours.__module__ = function.__kwdefaults__, function.__doc__, function.__module__
    ours.__annotations__, ours.__qualname__ = function.__annotations__, function.__qualname__
    ours.__dict__.update(function.__dict__)
    return ours


def tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """The code of a function, to be changed and compiled: without annotations and defaults. None where there is no source, and of what
    wraps another function (:func:`fastpeft.forms.as_written`)."""
    if hasattr(function, "__wrapped__"):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    same = isinstance(tree, ast.FunctionDef) and tree.name == function.__name__
    first = min([tree.lineno, *(d.lineno for d in tree.decorator_list)]) if same else 0
    if not same or first != 1 or not (tree.args.posonlyargs or tree.args.args):
        return None
    for node in ast.walk(tree):  # annotations are evaluated by nobody here
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]  # the function keeps its own
    tree.args.kw_defaults = [d if d is None else ast.Constant(None) for d in tree.args.kw_defaults]
    tree.lineno = first
    return tree


class _Condition(NamedTuple):
    """``test``, which must be ``true``, or false, for a call to run; None: it is not looked at."""

    test: ast.expr | None
    true: bool = True


class _Site(NamedTuple):
    """A call ``self.name(variable)``."""

    call: ast.Call
    name: str
    variable: str
    conditions: tuple[_Condition, ...]


class _Joiner:
    """Rewrites one function's tree."""

    def __init__(self, tree: ast.FunctionDef):
        self.tree, self.me = tree, (*tree.args.posonlyargs, *tree.args.args)[0].arg
        self.arguments = {a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)}
        self.groups, self.used = 0, {}  # how many groups there are, and that of each call in one

    def join(self) -> bool:
        """Whether there was something to join."""
        self.block(self.tree.body, set(self.arguments))
        return self.groups > 0

    def block(self, body: list[ast.stmt], bound: set[str]) -> None:
        """Join within a list of statements, ``bound``: the names that have values before it."""
        i, inside = 0, set()
        while i < len(body):
            statement = body[i]
            for site in self.sites(statement):
                group = self.used.get(id(site.call))
                if site.conditions or site.variable not in bound or (group is not None and group in inside):
                    continue
                made = self.group(site, body[i:], bound) if group is None else self.rest_of(group, site, body[i:])
                inside.add(self.used.get(id(site.call)))
                if made is not None:
                    body.insert(i, made)
                    i += 1
            if isinstance(statement, ast.If):
                for inner in (statement.body, statement.orelse):
                    self.block(inner, set(bound))
            bound |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            i += 1

    def sites(self, statement: ast.stmt) -> Iterator[_Site]:
        """The calls in a statement, in the order of its text."""
        yield from self._sites(statement, ())

    def _sites(self, node: ast.AST, conditions: tuple[_Condition, ...]) -> Iterator[_Site]:
        if isinstance(node, (*SCOPES, *LOOPS, ast.Try, ast.With)):
            return
        if isinstance(node, ast.Call) and (site := self._site(node, conditions)) is not None:
            yield site
        if isinstance(node, ast.If):
            for true, branch in ((True, node.body), (False, node.orelse)):
                for statement in branch:
                    yield from self._sites(statement, (*conditions, _Condition(node.test, true)))
            return
        perhaps = (_Condition(None),) if isinstance(node, ast.IfExp | ast.BoolOp) else ()
        for child in ast.iter_child_nodes(node):
            yield from self._sites(child, conditions + perhaps)

    def _site(self, call: ast.Call, conditions: tuple[_Condition, ...]) -> _Site | None:
        if id(call) in self.used:  # take(outputs, name, layer, x)
            return _Site(call, call.args[1].value, call.args[3].id, conditions)
        func = call.func
        own = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == self.me
        if not own or call.keywords or len(call.args) != 1 or not isinstance(call.args[0], ast.Name):
            return None
        return _Site(call, func.attr, call.args[0].id, conditions)

    def group(self, first: _Site, body: list[ast.stmt], bound: set[str]) -> ast.stmt | None:
        """The statement that runs ``first`` and what joins it, which now take its outputs; None where nothing does."""
        members: dict[str, tuple[_Site, ast.expr]] = {}
        for statement in body:
            for site in self.sites(statement):
                if id(site.call) in self.used or site.name in members:
                    continue
                given = ast.Name(site.variable, ast.Load()) if site.variable == first.variable else self.alias(site.variable, first, bound)
                if given is not None and all(self.runs(condition, given, first.variable) for condition in site.conditions):
                    members[site.name] = site, given
            if any(isinstance(n, ast.Return) or _stores(n, first.variable) for n in ast.walk(statement)):
                break
        if len(members) < 2:
            return None
        outputs = OUTPUTS(self.groups)
        for name, (site, _) in members.items():
            self.used[id(site.call)] = self.groups
            layer, x = site.call.func, site.call.args[0]
            site.call.func = ast.copy_location(ast.Name(TAKE, ast.Load()), layer)
            site.call.args = [ast.Name(outputs, ast.Load()), ast.Constant(name), layer, x]
        self.groups += 1
        return self.run(outputs, first, {name: given for name, (_, given) in members.items()}, ast.Constant(None))

    def rest_of(self, group: int, first: _Site, body: list[ast.stmt]) -> ast.stmt | None:
        """The statement that runs those of a group that share ``first``'s variable, where that is not what the group ran on."""
        sites = [site for statement in body for site in self.sites(statement) if not site.conditions]
        names = [site.name for site in sites if self.used.get(id(site.call)) == group and site.variable == first.variable]
        given = {name: ast.Name(first.variable, ast.Load()) for name in names}
        return None if len(given) < 2 else self.run(OUTPUTS(group), first, given, ast.Name(OUTPUTS(group), ast.Load()))

    def run(self, outputs: str, first: _Site, given: dict[str, ast.expr], before: ast.expr) -> ast.stmt:
        """``outputs = together(before, self, variable, (name, given), ...)``"""
        pairs = [ast.Tuple([ast.Constant(name), value], ast.Load()) for name, value in given.items()]
        arguments = [before, ast.Name(self.me, ast.Load()), ast.Name(first.variable, ast.Load()), *pairs]
        made = ast.Assign([ast.Name(outputs, ast.Store())], ast.Call(ast.Name(TOGETHER, ast.Load()), arguments, []))
        for node in ast.walk(made):
            ast.copy_location(node, first.call)
        return made

    def runs(self, condition: _Condition, given: ast.expr, x: str) -> bool:
        """Whether ``condition`` is met where ``given`` is ``x``: a term of a test that must be false is what chooses something else."""
        if condition.test is None or condition.true or not isinstance(given, ast.IfExp) or not _loads(given.orelse, x):
            return False
        both = isinstance(condition.test, ast.BoolOp) and isinstance(condition.test.op, ast.And)
        terms = condition.test.values if both else [condition.test]
        chooses = self.in_full(given.test)
        return chooses is not None and any(self.in_full(term) == chooses for term in terms)

    def in_full(self, value: ast.expr) -> str | None:
        """``value`` as text, of arguments and constants alone; None where it is of other things."""
        pure = all(isinstance(n, PURE) for n in ast.walk(value))
        found = self.substituted(value, self.arguments, 4) if pure else None
        return None if found is None else ast.dump(found)

    def alias(self, name: str, first: _Site, bound: set[str], depth: int = 4) -> ast.expr | None:
        """What ``name`` will be, as an expression of names that are ``bound`` where the group runs; None where that is not known, or has
        nothing to do with ``first``'s variable."""
        value = self.resolved(name, bound, depth)
        reads = set() if value is None else {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
        return value if first.variable in reads else None

    def resolved(self, name: str, bound: set[str], depth: int) -> ast.expr | None:
        if name in bound:
            return ast.Name(name, ast.Load())
        assigned = [n for n in ast.walk(self.tree) if isinstance(n, ast.Assign) and any(_stores(t, name) for t in n.targets)]
        if depth == 0 or len(assigned) != 1 or sum(_stores(n, name) for n in ast.walk(self.tree)) != 1:
            return None
        value = assigned[0].value
        return self.substituted(value, bound, depth - 1) if all(isinstance(n, PURE) for n in ast.walk(value)) else None

    def substituted(self, value: ast.expr, bound: set[str], depth: int) -> ast.expr | None:
        """``value``, an expression without side effects, of names that are ``bound``."""
        inner = {n.id: self.resolved(n.id, bound, depth) for n in ast.walk(value) if isinstance(n, ast.Name)}
        return None if any(found is None for found in inner.values()) else _Substitute(inner).visit(copy.deepcopy(value))


def _stores(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name


def _loads(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


class _Substitute(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]):
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.values[node.id])
