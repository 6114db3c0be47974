"""Encoder-decoders: where the last hidden states of both stacks are read, found in the code of a model, once for a class.

    encoder_outputs = self.encoder(input_ids, attention_mask=attention_mask, ...)
    decoder_outputs = self.decoder(..., encoder_hidden_states=encoder_outputs[0], encoder_attention_mask=attention_mask, ...)
    lm_logits = self.lm_head(decoder_outputs[0])
    loss = loss_fct(lm_logits.view(-1, ...), labels.view(-1))

A model whose forward does this, and no more, reads its encoder at tokens alone, and its decoder at labelled positions alone. (What it
returns besides, nobody reads in a training step whose logits nobody reads: it is left out.) The calls of encoder and decoder may be in a
model inside, whose output the model with the head hands on.
"""

from __future__ import annotations

import ast
from operator import attrgetter
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from fastpeft.forms import cache_by_forward
from fastpeft.fused.code.forward_code import Code, called_path, is_state, keywords_of
from fastpeft.fused.code.state_reads import CUT, LAST, handed_on
from fastpeft.fused.stack.layer_arguments import MASK, SOURCE_MASK, STATES
from fastpeft.registry import original_class

ENCODER_STATE = "encoder_last_hidden_state"  # what outputs call it
RENAMES = frozenset(("view", "reshape", "float", "to", "contiguous"))  # of logits: the same in another shape or dtype
SIZES = frozenset(("device", "dtype", "shape", "size"))
LOSSES = (ForCausalLMLoss, ForMaskedLMLoss)


class Stacks(NamedTuple):
    """``encoder``, ``decoder``: of one model. ``home``: the module whose forward calls them; ``above``: those around it, whose forwards
    hand its output on."""

    encoder: nn.Module
    decoder: nn.Module
    home: nn.Module
    above: list[nn.Module]


def stacks_of(model: nn.Module, decoder: nn.Module) -> Stacks | None:
    """The encoder and decoder of ``model``; None where no forward known to do so calls them."""
    above, home = [], model
    while (paths := _calls(original_class(home))) is None:
        path = handed_on(original_class(home)) if above else _state_of(original_class(home))
        if path is None or not isinstance(inner := attrgetter(path)(home), PreTrainedModel) or inner is home:
            return None
        above, home = [*above, home], inner
    encoder, own = (attrgetter(path)(home) for path in paths)
    return Stacks(encoder, own, home, above) if own is decoder else None


def read_at_tokens(stacks: Stacks) -> bool:
    """Whether the encoder's last hidden state is read by the decoder alone, and returned."""
    return _encoder_is_handed_on(original_class(stacks.home)) and all(_only_returned(original_class(module)) for module in stacks.above)


def read_at_labels(model: nn.Module, head: nn.Module, stacks: Stacks) -> bool:
    """Whether the decoder's last hidden state goes to ``head`` alone, and its logits to a cross entropy of the labels alone."""
    name = _head_of(original_class(model))
    if name is None or getattr(model, name, None) is not head or (stacks.above and not _state_is_returned(original_class(stacks.home))):
        return False
    return "loss_function" not in Code.of(original_class(model)).attributes or getattr(model, "loss_function", None) in LOSSES


@cache_by_forward
def labels_handed_to(cls: type[nn.Module]) -> frozenset[str]:
    """The modules that the forward of ``cls`` calls with labels."""
    code = Code.of(cls)
    calls = [] if code is None else [node for node in code.nodes if called_path(node)]
    return frozenset(called_path(call) for call in calls if _is_name(keywords_of(call).get("labels"), "labels"))


class _Pair(NamedTuple):
    """The calls of encoder and decoder in a forward, and the variables of their outputs."""

    encoder: ast.Call
    decoder: ast.Call
    encoder_output: str
    decoder_output: str


@cache_by_forward
def _pair(cls: type[nn.Module]) -> _Pair | None:
    """The two calls in the forward of ``cls``."""
    code = Code.of(cls)
    if code is None:
        return None
    decoders = [node for node in code.nodes if isinstance(node, ast.Call) and called_path(node) and STATES in keywords_of(node)]
    if len(decoders) != 1:
        return None
    states, output = keywords_of(decoders[0])[STATES], code.target(decoders[0])
    if isinstance(states, ast.Name):
        (states,) = code.assigned(states.id) if len(code.assigned(states.id)) == 1 else (None,)
    if output is None or not is_state(states) or not isinstance(states.value, ast.Name):
        return None
    encoders = [value for value in code.assigned(states.value.id) if called_path(value)]
    return _Pair(encoders[0], decoders[0], states.value.id, output) if len(encoders) == 1 else None


def _is_name(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _calls(cls: type[nn.Module]) -> tuple[str, str] | None:
    pair = _pair(cls)
    return None if pair is None else (called_path(pair.encoder), called_path(pair.decoder))


@cache_by_forward
def _encoder_is_handed_on(cls: type[nn.Module]) -> bool:
    """Whether the encoder's state goes to the decoder, with the mask that the encoder gets, or is returned, and goes nowhere else."""
    code, pair = Code.of(cls), _pair(cls)
    masks = keywords_of(pair.encoder).get(MASK), keywords_of(pair.decoder).get(SOURCE_MASK)
    states = code.states(pair.encoder_output)
    if states is None or not all(_is_name(mask, MASK) for mask in masks) or code.names(MASK, ast.Store):
        return False
    for state in states:
        if (name := code.target(state)) is not None:
            states += [use for use in code.names(name) if use not in states]
            continue
        call = code.parents[code.parents[state]]
        to_decoder = call is pair.decoder and keywords_of(call)[STATES] is state
        if not (to_decoder or code.is_returned(state) or (isinstance(call, ast.Call) and code.target(call) == pair.encoder_output)):
            return False
    return True


@cache_by_forward
def _only_returned(cls: type[nn.Module]) -> bool:
    """Whether the forward of ``cls`` does nothing with the encoder's state in a model's output but return it."""
    code = Code.of(cls)
    return all(code.is_returned(node) for node in code.nodes if isinstance(node, ast.Attribute) and node.attr == ENCODER_STATE)


@cache_by_forward
def _state_is_returned(cls: type[nn.Module]) -> bool:
    """Whether the decoder's state is returned as the last hidden state, and goes nowhere else."""
    code = Code.of(cls)
    states = code.states(_pair(cls).decoder_output)
    return states is not None and all(
        isinstance(keyword := code.parents[state], ast.keyword) and keyword.arg == LAST and code.is_returned(state) for state in states
    )


@cache_by_forward
def _state_of(cls: type[nn.Module]) -> str | None:
    """The module whose output's last hidden state the forward of ``cls``, a model with a head, reads."""
    code = Code.of(cls)
    calls = [] if code is None else [node for node in code.nodes if called_path(node) and (name := code.target(node)) and code.states(name)]
    return called_path(calls[0]) if len(calls) == 1 else None


@cache_by_forward
def _head_of(cls: type[nn.Module]) -> str | None:
    """The head that the decoder's state goes to in the forward of ``cls``; None where it goes elsewhere too, or the head's logits do."""
    code, pair = Code.of(cls), _pair(cls)
    calls = [node for node in code.nodes if called_path(node) == _state_of(cls) and code.target(node)] if pair is None else [pair.decoder]
    states = code.states(code.target(calls[0])) if len(calls) == 1 else None
    if not states:
        return None
    heads = {}
    for state in states:
        to = _onward(code, state)
        if to is None:
            return None
        states += [node for node in to if node not in states and not _is_head(node)]
        heads |= {node: node.func.attr for node in to if _is_head(node)}
    return next(iter(heads.values())) if len(heads) == 1 and _is_for_loss(code, list(heads)) else None


def _is_head(node: ast.AST) -> bool:
    path = called_path(node)
    return path is not None and "." not in path and len(node.args) == 1 and not node.keywords


def _onward(code: Code, node: ast.expr) -> list[ast.expr] | None:
    """Where a hidden state goes: the expressions that hold it, or rows of it, next; None where it cannot be told."""
    parent = code.parents[node]
    if (name := code.target(node)) is not None:
        return list(code.names(name))
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Mult | ast.Div):
        return [parent]
    if isinstance(parent, ast.Subscript) and parent.value is node:  # rows that logits are kept of
        return [parent]
    if isinstance(parent, ast.Attribute) and parent.attr == "to" and _is_called(code, parent):
        return [code.parents[parent]]
    if isinstance(parent, ast.Attribute) and parent.attr in SIZES:
        return []
    if isinstance(parent, ast.Call) and parent.args[:1] == [node] and (_is_head(parent) or ast.unparse(parent.func) == CUT):
        return [parent]
    return None


def _is_called(code: Code, attribute: ast.Attribute) -> bool:
    call = code.parents[attribute]
    return isinstance(call, ast.Call) and call.func is attribute


def _is_for_loss(code: Code, logits: list[ast.expr]) -> bool:
    """Whether logits go to a cross entropy, or are returned, and go nowhere else."""
    made = (node for node in code.nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("CrossEntropyLoss"))
    losses = {code.target(node) for node in made}
    for node in logits:
        parent = code.parents[node]
        if code.is_returned(node) or (isinstance(parent, ast.Attribute) and parent.attr in SIZES):
            continue
        if (name := code.target(node)) is not None:
            logits += [use for use in code.names(name) if use not in logits]
        elif isinstance(parent, ast.BinOp | ast.Tuple) or (isinstance(parent, ast.Call) and ast.unparse(parent.func) == "torch.tanh"):
            logits.append(parent)
        elif isinstance(parent, ast.Attribute) and parent.attr in RENAMES and _is_called(code, parent):
            logits.append(code.parents[parent])
        elif not _is_loss(parent if isinstance(parent, ast.Call) else code.parents[parent], losses):
            return False
    return True


def _is_loss(call: ast.AST, losses: set[str | None]) -> bool:
    """Whether a call is of a cross entropy made before, or of the model's ``loss_function``."""
    if not isinstance(call, ast.Call):
        return False
    return ast.unparse(call.func) == "self.loss_function" or (isinstance(call.func, ast.Name) and call.func.id in losses)
