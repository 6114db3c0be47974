"""Which rows of a stack's last hidden state are read: found in code, once for a class, and put together for a model.

A model with a head calls a model, which calls a stack, which loops over its layers. Each forward says where the last hidden state goes
(:func:`state_of`): out, with what it returns; through a module; or some rows of it are taken. Three answers let the last layer leave rows
out: the loss reads labelled positions (:func:`reads_labels_alone`); the head reads the first token of each sample; or its last token that
is no padding (:func:`pooled_read`). Whatever a forward does that is not known here means that all rows are read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import NamedTuple

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastpeft.forms import as_written
from fastpeft.fused.layers.shared_input import tree_of
from fastpeft.registry import original_class

LAST = "last_hidden_state"
CUT = "slice_logits_to_keep"
# what becomes of a state: it leaves with what is returned; of each sample its first row is taken, or that of the last token which is no
# padding; a loss gets it beside that row; it gets the shape of the batch
OUT, FIRST, LAST_TOKEN, LOSS, BACK = "out", "first", "last token", "loss", "back"
# how transformers finds the last token that is no padding
LAST_TOKEN_CODE = """\
if self.config.pad_token_id is None:
    last_non_pad_token = -1
elif input_ids is not None:
    non_pad_mask = (input_ids != self.config.pad_token_id).to(logits.device, torch.int32)
    token_indices = torch.arange(input_ids.shape[-1], device=logits.device, dtype=torch.int32)
    last_non_pad_token = (token_indices * non_pad_mask).argmax(-1)
else:
    last_non_pad_token = -1"""


@dataclass(frozen=True)
class Through:
    """A module of ``self`` gets the state; what it returns goes where ``uses`` say (None: that cannot be told)."""

    name: str
    uses: frozenset[str | Through] | None


class State(NamedTuple):
    """Of a forward: where it has a last hidden state from, a module inside (``inner``) or its loop over ``layers``, and its ``uses``.
    ``skips``: the loop may leave layers out."""

    inner: str | None
    layers: str | None
    uses: frozenset[str | Through]
    skips: bool = False


def reads_labels_alone(model: nn.Module, head: nn.Module, decoder: nn.Module | None) -> bool:
    """Whether the loss of ``model`` reads the last hidden state of ``decoder``, through ``head``, at labelled positions, and nobody reads
    it elsewhere. For training steps whose logits and hidden states nobody reads."""
    if decoder is None or getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return False
    found = read_by_head(original_class(model))
    if found is None or getattr(model, found[1], None) is not head:
        return False
    inner = attrgetter(found[0])(model)
    while isinstance(inner, nn.Module) and inner is not decoder:
        path = handed_on(original_class(inner))
        inner = None if path is None else attrgetter(path)(inner)
    return inner is decoder


def read_by_head(cls: type[nn.Module]) -> tuple[str, str] | None:
    """(the module whose output's last hidden state the forward of ``cls`` reads, the head that it goes to), by their names; None where it
    goes elsewhere too, or that cannot be told."""
    state = state_of(cls, labels=True)
    heads = [] if state is None or state.inner is None else [getattr(use, "name", None) for use in state.uses]
    return (state.inner, heads[0]) if len(heads) == 1 and heads[0] is not None else None


def handed_on(cls: type[nn.Module]) -> str | None:
    """The module whose output's last hidden state the forward of ``cls`` returns as its own, and does nothing else with."""
    state = state_of(cls, labels=True)
    return None if state is None or state.uses != {OUT} else state.inner


def ends_row_by_row(cls: type[nn.Module]) -> bool:
    """Whether the forward of a stack's class, behind its loop over layers, calls norms and projections on the hidden states alone."""
    state = state_of(cls, labels=True)
    return state is not None and state.layers is not None and _ends(state.uses) <= {OUT, BACK}


def state_of(cls: type[nn.Module], labels: bool = False) -> State | None:
    """Where the last hidden state in the forward of ``cls`` goes; None where that cannot be told. ``labels``: what is read of it is read
    at labelled positions, whatever rows the forward takes before its head."""
    return _state_of(as_written(cls.forward), getattr(cls, "base_model_prefix", ""), labels)


@cache
def _state_of(function: Callable, prefix: str, labels: bool) -> State | None:
    tree = tree_of(function)
    if tree is None:
        return None
    found = _loop_of(tree)
    try:
        return _of_loop(tree, *found, labels) if found is not None else _of_inner(tree, prefix, labels)
    except Unknown:
        return None


def argument_uses(cls: type[nn.Module]) -> frozenset[str | Through] | None:
    """Where the forward of ``cls`` reads its first argument; None where that cannot be told."""
    return _argument_uses(as_written(cls.forward))


@cache
def _argument_uses(function: Callable) -> frozenset[str | Through] | None:
    tree = tree_of(function)
    if tree is None or len(tree.args.args) < 2:
        return None
    try:
        return _Tracer(tree).of_variable(tree.args.args[1].arg)
    except Unknown:
        return None


class Unknown(Exception):
    """A use of a state that is not known."""


class _Tracer:
    """Follows a state through one forward, wherever the variables that hold it are read: which assignment comes first does not matter."""

    def __init__(self, tree: ast.FunctionDef, scope: Iterable[ast.stmt] | None = None, labels: bool = False):
        self.tree, self.labels = tree, labels
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.nodes = [node for statement in (tree.body if scope is None else scope) for node in ast.walk(statement)]
        self.visiting: set[str] = set()

    def of_variable(self, name: str) -> frozenset[str | Through]:
        """The uses of a variable that holds the state."""
        if name in self.visiting:
            return frozenset()
        self.visiting.add(name)
        try:
            return self.of_nodes(loads_of(self.nodes, name))
        finally:
            self.visiting.remove(name)

    def of_nodes(self, nodes: Iterable[ast.AST]) -> frozenset[str | Through]:
        return frozenset().union(*map(self.of_node, nodes))

    def of_node(self, node: ast.AST) -> frozenset[str | Through]:
        """The uses of the value of ``node``, the state."""
        parent = self.parents[node]
        handle = getattr(self, f"_in_{type(parent).__name__}", None)
        if handle is None:
            raise Unknown
        return handle(parent, node)

    def _in_Subscript(self, parent: ast.Subscript, node: ast.AST) -> frozenset[str | Through]:
        if node is not parent.value:
            raise Unknown
        if self.labels:
            return self.of_node(parent)
        index = parent.slice.elts if isinstance(parent.slice, ast.Tuple) else ()
        if len(index) > 1 and is_whole(index[0]) and ast.unparse(index[1]) == "0" and all(map(is_whole, index[2:])):
            return frozenset((FIRST,))
        if len(index) == 2 and ast.unparse(index[0]).startswith("torch.arange(") and last_token_config(self.tree, index[1]) is not None:
            return frozenset((LAST_TOKEN,))
        raise Unknown

    def _in_Attribute(self, parent: ast.Attribute, node: ast.AST) -> frozenset[str | Through]:
        if parent.attr in ("device", "dtype"):
            return frozenset()
        call = self.parents[parent]
        if parent.attr == "shape" and isinstance(call, ast.Subscript) and ast.unparse(call.slice) == "0":
            return frozenset()
        if not isinstance(call, ast.Call) or call.func is not parent:
            raise Unknown
        if parent.attr == "to":
            return self.of_node(call)
        if parent.attr == "view" and ast.unparse(call.args[0]) == "output_shape":  # GPT-2: as the batch came
            return self.of_node(call) | {BACK}
        raise Unknown

    def _in_Call(self, parent: ast.Call, node: ast.AST) -> frozenset[str | Through]:
        if isinstance(parent.func, ast.Name) and parent.func.id == CUT and self.labels and parent.args[0] is node:
            return self.of_node(parent)
        if not is_of_self(parent.func) or parent.args != [node] or parent.keywords:
            raise Unknown
        return frozenset((Through(parent.func.attr, frozenset() if self.labels else self._behind(parent)),))

    def _behind(self, call: ast.Call) -> frozenset[str | Through] | None:
        try:
            return self.of_node(call)
        except Unknown:
            return None

    def _in_keyword(self, parent: ast.keyword, node: ast.AST) -> frozenset[str | Through]:
        call = self.parents[parent]
        if parent.arg == LAST and isinstance(self.parents[call], ast.Return):
            return frozenset((OUT,))
        if parent.arg == "logits" and isinstance(call, ast.Call) and ast.unparse(call.func) == "self.loss_function":
            return frozenset((LOSS,))
        raise Unknown

    def _in_Tuple(self, parent: ast.Tuple, node: ast.AST) -> frozenset[str | Through]:
        around = self.parents[parent]
        if isinstance(around, ast.BinOp) and around.left is parent:
            around = self.parents[around]
        if parent.elts[0] is node and isinstance(around, ast.Return):
            return frozenset((OUT,))
        raise Unknown

    def _in_Return(self, parent: ast.Return, node: ast.AST) -> frozenset[str | Through]:
        return frozenset((OUT,))

    def _in_IfExp(self, parent: ast.IfExp, node: ast.AST) -> frozenset[str | Through]:
        if node is parent.test:
            raise Unknown
        return self.of_node(parent)

    def _in_Compare(self, parent: ast.Compare, node: ast.AST) -> frozenset[str | Through]:
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops):
            raise Unknown
        return frozenset()

    def _in_Assign(self, parent: ast.Assign, node: ast.AST) -> frozenset[str | Through]:
        if len(parent.targets) != 1 or not isinstance(parent.targets[0], ast.Name):
            raise Unknown
        return self.of_variable(parent.targets[0].id)


def loads_of(nodes: Iterable[ast.AST], name: str) -> list[ast.Name]:
    return [n for n in nodes if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]


def is_whole(node: ast.AST) -> bool:
    """Whether an index is ``:``."""
    return isinstance(node, ast.Slice) and node.lower is node.upper is node.step is None


def is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def last_token_config(tree: ast.FunctionDef, index: ast.AST) -> str | None:
    """The configuration, as code, that says what padding is, where ``index`` is the last token that is no padding by transformers' rule;
    None where it is something else."""
    if not isinstance(index, ast.Name):
        return None
    stores = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == index.id]
    rules = [n for n in tree.body if isinstance(n, ast.If) and all(store in list(ast.walk(n)) for store in stores)]
    if not stores or len(rules) != 1:
        return None
    lines = [line for line in ast.unparse(rules[0]).splitlines() if not line.strip().startswith("logger.")]
    code = "\n".join(lines)
    config = next((c for c in ("self.config.get_text_config()", "self.config") if f"{c}.pad_token_id" in code), "self.config")
    return config if code.replace(config, "self.config") == LAST_TOKEN_CODE else None


def _loop_of(tree: ast.FunctionDef) -> tuple[int, str, set[str]] | None:
    """(which statement is the loop over layers, their name, the variables that hold a layer)"""
    found = []
    for i, statement in enumerate(tree.body):
        if isinstance(statement, ast.For):
            names = [n.attr for n in ast.walk(statement.iter) if is_of_self(n) and n.attr != "config"]
            variables = {n.id for n in ast.walk(statement.target) if isinstance(n, ast.Name)}
            called = {n.func.id for n in ast.walk(statement) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            if len(names) == 1 and variables & called:
                found.append((i, names[0], variables))
    return found[0] if len(found) == 1 else None


def _of_loop(tree: ast.FunctionDef, at: int, layers: str, variables: set[str], labels: bool) -> State:
    """The state of a stack: what its loop over layers leaves."""
    loop, behind = tree.body[at], tree.body[at + 1 :]
    calls = [n for n in ast.walk(loop) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in variables]
    assigns = [n for n in ast.walk(loop) if isinstance(n, ast.Assign) and n.value in calls]
    names = {ast.unparse(n.targets[0]) for n in assigns}
    if len(names) != 1 or len(assigns) != len(calls):
        raise Unknown
    (name,) = names
    if labels:
        return State(None, layers, _Tracer(tree, behind).of_variable(name))
    _check_loop(loop, calls, name)
    skips = any(isinstance(n, ast.Continue) for n in ast.walk(loop))
    return State(None, layers, _Tracer(tree, behind).of_variable(name), skips)


def _check_loop(loop: ast.For, calls: list[ast.Call], name: str) -> None:
    """Unknown where a loop does more with the state ``name`` than to call layers with it, first of their arguments."""
    if loop.orelse or any(isinstance(n, ast.Break) for n in ast.walk(loop)):
        raise Unknown
    inside = [n for call in calls for n in ast.walk(call)]
    stores = [n for n in ast.walk(loop) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)]
    if len(stores) != len(calls) or not all(n in inside for n in loads_of(ast.walk(loop), name)):
        raise Unknown
    if any(not call.args or ast.unparse(call.args[0]) != name for call in calls):
        raise Unknown


_PATH = re.compile(r"self(\.[A-Za-z_]\w*)+").fullmatch


def _of_inner(tree: ast.FunctionDef, prefix: str, labels: bool) -> State:
    """The state of a forward that has it from one module inside."""
    made: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and isinstance(node.value, ast.Call):
            made.setdefault(target.id, []).append(_module_path(prefix, node.value.func))
    tracer = _Tracer(tree, labels=labels)
    found = [(paths, uses) for name, paths in made.items() if (uses := _of_output(tracer, name, labels)) is not None]
    if not found and not labels:
        returned = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return)]
        if len(returned) == 1 and isinstance(returned[0], ast.Call):
            found = [([_module_path(prefix, returned[0].func)], frozenset((OUT,)))]
    found = [(paths, uses) for paths, uses in found if any(paths)]
    if len(found) != 1 or len(found[0][0]) != 1:
        raise Unknown
    ((path,), uses) = found[0]
    if uses is _ALL:
        raise Unknown
    return State(path, None, uses)


def _module_path(prefix: str, called: ast.AST) -> str | None:
    """The path of a module inside that is called; None for other functions."""
    if ast.unparse(called) == "getattr(self, self.base_model_prefix)":
        return prefix
    text = ast.unparse(called)
    return text.removeprefix("self.") if _PATH(text) else None


_ALL: frozenset[str | Through] = frozenset(("unknown",))  # anywhere


def _of_output(tracer: _Tracer, name: str, labels: bool) -> frozenset[str | Through] | None:
    """The uses of the last hidden state in a model's output, held by variable ``name``; None where nothing shows that it is one."""
    states, handed, is_output = [], False, False
    for node in loads_of(tracer.nodes, name):
        parent = tracer.parents[node]
        if isinstance(parent, ast.Attribute):
            is_output |= parent.attr == LAST or (not labels and parent.attr in ("pooler_output", "hidden_states"))
            states += [parent] if parent.attr == LAST else []
        elif isinstance(parent, ast.Subscript) and (index := ast.unparse(parent.slice)) in ("0", "1", "2", "1:", "2:"):
            is_output |= index == "0" or not labels
            states += [parent] if index == "0" else []
        elif isinstance(parent, ast.Return) or _is_returned(tracer, parent):
            handed = is_output = True
        elif not isinstance(parent, ast.Compare):
            states.append(None)
    if not is_output:
        return None
    try:
        if None in states:
            raise Unknown
        return tracer.of_nodes(states) | ({OUT} if handed else frozenset())
    except Unknown:
        return _ALL


def _is_returned(tracer: _Tracer, node: ast.AST) -> bool:
    """Whether ``node`` hands all on to what is returned: ``return Output(**outputs)``."""
    return isinstance(node, ast.keyword) and node.arg is None and isinstance(tracer.parents[tracer.parents[node]], ast.Return)


def may_pool(cls: type[nn.Module]) -> bool:
    """Whether the forward of ``cls`` keeps the last hidden state of the model inside to itself, as far as its own code tells."""
    state = state_of(cls)
    return state is not None and state.inner is not None and OUT not in _ends(state.uses)


def _ends(uses: frozenset[str | Through] | None) -> set[str]:
    """Where a state goes in the end, behind the modules that it goes through; "unknown" too where that cannot be told."""
    if uses is None:
        return set(_ALL)
    return {end for use in uses for end in ((use,) if isinstance(use, str) else _ends(use.uses))}
