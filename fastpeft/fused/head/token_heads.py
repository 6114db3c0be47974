"""Heads that treat every token by itself, and their losses at labelled tokens: token classifiers, masked language models.

    sequence_output = self.dropout(outputs[0])
    logits = self.classifier(sequence_output)
    loss = loss_fct(logits.view(-1, self.num_labels), labels.view(-1))

In a training step whose logits nobody reads, the rows without a label are for nobody: the stack's last layer, and the head, leave them out,
and no layer computes padding (:mod:`fastpeft.fused.stack.rows`). A model whose forward does this and no more is found by its code.
"""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForMaskedLMLoss, ForTokenClassification

from fastpeft.forms import cache_by_forward
from fastpeft.fused.code.forward_code import Code, called_path
from fastpeft.fused.code.state_reads import OUT, Unknown, state_of
from fastpeft.fused.head.lazy_logits import LazyLogits
from fastpeft.fused.layout import FULL, LastLayout, self_layout
from fastpeft.fused.stack.any_stack import Read
from fastpeft.fused.stack.last_layer import MASK
from fastpeft.fused.stack.llama import FusedLlamaModel
from fastpeft.fused.stack.rows import RowsCall, cannot_be_read, layers_may, may_leave_rows_out
from fastpeft.fused.stack.state_walk import StatePath, StateWalk
from fastpeft.labels import IGNORE_INDEX
from fastpeft.registry import original_class

LOSS_FUNCTIONS = (ForTokenClassification, ForMaskedLMLoss)
RENAMES = frozenset(("view", "reshape", "float", "to", "contiguous"))  # of logits: the same in another shape or dtype
SIZES = frozenset(("device", "dtype", "shape", "size"))
BY_PREFIX = "getattr(self, self.base_model_prefix)"


class TokenHead(NamedTuple):
    """The state of the module at ``inner`` goes through ``modules`` to a loss: of ``losses``, modules of ``self`` or ``loss_function``, or
    one that the forward makes."""

    inner: str
    modules: frozenset[str]
    losses: frozenset[str]


@cache_by_forward
def token_head(cls: type[nn.Module]) -> TokenHead | None:
    """Where the last hidden state in the forward of ``cls`` goes, if it goes through modules to a cross entropy with labels, and as logits
    to the caller, and nowhere else; None where that cannot be told."""
    state, code = state_of(cls, labels=True), Code.of(cls)
    if state is None or code is None or state.inner is None or "labels" not in code.arguments:
        return None
    made = [node for node in code.nodes if isinstance(node, ast.Call) and _is_of(node, state.inner, cls) and code.target(node)]
    states = code.states(code.target(made[0])) if len(made) == 1 else None
    return _Follower(code).found(state.inner, states) if states else None


def _is_of(call: ast.Call, path: str, cls: type[nn.Module]) -> bool:
    return called_path(call) == path or (ast.unparse(call.func) == BY_PREFIX and path == cls.base_model_prefix)


class _Follower:
    """Follows a state through one forward, wherever the variables that hold it are read."""

    def __init__(self, code: Code):
        self.code, self.modules, self.losses = code, set(), set()
        self.seen: set[tuple[ast.expr, bool]] = set()
        self.waiting: list[tuple[ast.expr, bool]] = []  # what holds the state, and whether it has been through a module
        calls = (node for node in code.nodes if isinstance(node, ast.Call))
        plain = (node for node in calls if ast.unparse(node.func).endswith("CrossEntropyLoss") and not (node.args or node.keywords))
        self.made = {code.target(node) for node in plain}

    def found(self, inner: str, states: list[ast.expr]) -> TokenHead | None:
        self.waiting = [(state, False) for state in states]
        while self.waiting:
            item = self.waiting.pop()
            if item not in self.seen:
                self.seen.add(item)
                if not self.follow(*item):
                    return None
        if not self.modules or not all(map(self.is_for_loss, self.code.names("labels"))):
            return None
        return TokenHead(inner, frozenset(self.modules), frozenset(self.losses))

    def follow(self, node: ast.expr, passed: bool) -> bool:
        """Note where ``node`` goes; whether that is known."""
        code, parent = self.code, self.code.parents[node]
        if (name := code.target(node)) is not None:
            self.waiting += [(use, passed) for use in code.names(name)]
            return True
        if isinstance(parent, ast.Attribute) and parent.attr in SIZES:
            return True
        if isinstance(parent, ast.Call) and (path := called_path(parent)) and parent.args == [node] and not parent.keywords:
            self.modules.add(path)
            self.waiting.append((parent, True))
            return "." not in path
        if not passed:
            return False
        if isinstance(parent, ast.Attribute) and parent.attr in RENAMES and isinstance(code.parents[parent], ast.Call):
            self.waiting.append((code.parents[parent], True))
            return True
        if isinstance(parent, ast.keyword) and code.is_returned(node):
            return parent.arg == "logits"
        return (isinstance(parent, ast.Tuple) and parent.elts[0] is node) or self.takes(parent, node)

    def takes(self, call: ast.AST, node: ast.expr) -> bool:
        """Whether a call is of a loss, with ``node``."""
        if not isinstance(call, ast.Call) or node not in call.args[:2]:
            return False
        name = ast.unparse(call.func)
        self.losses |= {name.removeprefix("self.")} if name.startswith("self.") else set()
        return name in self.made or (name.startswith("self.") and "." not in name.removeprefix("self."))

    def is_for_loss(self, labels: ast.Name) -> bool:
        """Whether labels go, as they are, to a loss."""
        code, parent = self.code, self.code.parents[labels]
        if isinstance(parent, ast.Compare):
            return True
        if not isinstance(parent, ast.Attribute) or not isinstance(call := code.parents[parent], ast.Call):
            return self.takes(parent, labels)
        moved = parent.attr == "to" and code.target(call) == "labels"
        return moved or (ast.unparse(call) == "labels.view(-1)" and self.takes(code.parents[call], call))


def token_path(model: nn.Module) -> StatePath | None:
    """The way of the last hidden state of ``model``'s stack to its loss, token by token; None where there is no such."""
    head = token_head(original_class(model))
    if head is None or not all(_is_known_loss(getattr(model, name, None)) for name in head.losses):
        return None
    walk = StateWalk(model)
    try:
        reads = walk.walk(model.get_submodule(head.inner))
    except (Unknown, AttributeError):
        return None
    modules = [name for name in head.modules if isinstance(getattr(model, name, None), nn.Module)]
    return walk.path if reads == {OUT} and len(modules) == len(head.modules) and all(walk.takes_rows(model, n) for n in modules) else None


def _is_known_loss(loss: Any) -> bool:
    """Whether a loss is a cross entropy over labelled tokens."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.ignore_index == IGNORE_INDEX
    return loss in LOSS_FUNCTIONS


def labelled_call(model: nn.Module, given: dict[str, Any]) -> LabelledCall | None:
    """How a training step of ``model`` computes what its labels need; None where it computes all."""
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or "ignore_index" in given or not may_leave_rows_out(model, given):
        return None
    path = token_path(model)
    if path is None or not layers_may(model, path, given) or given.get("use_cache") or cannot_be_read(labels):
        return None
    wanted = labels.cpu() != IGNORE_INDEX
    if not bool(wanted.any()):
        return None
    if not isinstance(path.stack, FusedLlamaModel):
        return LabelledCall(path, wanted)
    mask = given.get(MASK)
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == labels.shape):
        return None
    return LabelledCall(path, wanted, Read(mask, labels != IGNORE_INDEX, alone=True))


class LabelledCall(RowsCall):
    """One call of a model that reads rows where ``labelled`` [B, L] bool."""

    def __init__(self, path: StatePath, labelled: Tensor, read: Read | None = None):
        super().__init__(path, read)
        self.labelled, self.columns = labelled, labelled.shape[1]
        self.few = int(labelled.sum()) <= FULL * labelled.numel()

    def instead(self) -> list[tuple[nn.Module, str]]:
        """A stack of LLaMA's computes its norm itself."""
        found = self.path.through if self.read is None else [pair for pair in self.path.through if pair[0] is not self.path.stack]
        return list(dict.fromkeys(found))

    def wanted(self, device: torch.device) -> Tensor:
        return self.labelled.to(device)

    def kept(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """As of any call; where no token is left out, all of them, for the last layer."""
        if (self.rows, self.columns) != self.labelled.shape:
            return None
        kept = super().kept(mask, device)
        return torch.ones_like(self.labelled) if kept is None and self.few else kept

    def at_last(self, device: torch.device) -> LastLayout | None:
        return None if self.layout is None else LastLayout.of(self.layout, self.labelled, device)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Rows that are not read are zero."""
        if x.shape[:2] != self.labelled.shape:
            return module(x)
        layout = self_layout(tuple(self.labelled.shape), self.labelled, x.device)
        y = module(layout.unpad(x)[None])
        if isinstance(y, LazyLogits):
            return y.derived(layout.pad, (), {}, hidden=layout.pad(y.hidden))
        return layout.pad(y)
