"""Modules that mix tokens in a way of their own, in a stack whose other modules see real tokens alone (any_stack.py).

Falcon's attention, GPT-J's, BLOOM's, MPT's or XGLM's are written out in the model's file, and Mamba and gated delta rules are no attention:
none can be told where tokens lie. Such a module, the mixer of its layer, gets the states padded, as its masks and tables are, zero where no
token lies, and what it returns of real tokens goes on. Norms, residual sums and feed-forwards, most of a layer, see those alone.
"""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fastpeft.forms import as_written, cache_by_forward, digest
from fastpeft.fused.attention.tokens import LAYOUT
from fastpeft.fused.code.forward_code import Code, called_path
from fastpeft.fused.layout import Layout
from fastpeft.registry import original_class

# Digests of mixers, each with a class that has it, in which no token reads another one that the mask hides from it, nor a later one.
ATTENTIONS = {
    "bf35f5894ab4": "falcon.modeling_falcon.FalconAttention",
    "a7f02475271c": "gptj.modeling_gptj.GPTJAttention",
    "f5f71e77a8c0": "xglm.modeling_xglm.XGLMAttention",
    "acfb8fe8b692": "bloom.modeling_bloom.BloomAttention",
    "b4c9b7321bfd": "mpt.modeling_mpt.MptAttention",
}
# Likewise recurrences and short convolutions: a mask [B, L] of several samples says what padding is, and makes states zero there before
# tokens meet. Two digests: of transformers 5.17, and of later ones.
RECURRENCES = {
    "0dbe76a42a76": "qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet",
    "c36598e21911": "qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet",
    "664a4d156ccf": "qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet",
    "bc82c31c8c1f": "qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet",
    "2bb9bd683a6a": "olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet",
    "b0b8f9c88002": "olmo_hybrid.modeling_olmo_hybrid.OlmoHybridGatedDeltaNet",
    "e43775257ea8": "bamba.modeling_bamba.BambaMixer",  # and of Zamba 2, Nemotron-H, Granite's hybrids
    "fa23af7f86d9": "bamba.modeling_bamba.BambaMixer",
    "71dda7b0c975": "jamba.modeling_jamba.JambaMambaMixer",
    "630a5877c434": "jamba.modeling_jamba.JambaMambaMixer",
    "15e266c0b31c": "lfm2.modeling_lfm2.Lfm2ShortConv",
    "a179b55acd07": "lfm2.modeling_lfm2.Lfm2ShortConv",
}


def mixer_in(layer: nn.Module) -> str | None:
    """The name of the mixer in a layer, where it has one and hands no other module what it mixes by."""
    names = [name for name, module in layer._modules.items() if module is not None and kind_of(original_class(module)) is not None]
    return names[0] if len(names) == 1 and Code.of(original_class(layer)) is not None else None


def mixes_by_recurrence(layer: nn.Module) -> bool:
    name = mixer_in(layer)
    return name is not None and kind_of(original_class(getattr(layer, name))) is RECURRENCES


@cache_by_forward
def kind_of(cls: type[nn.Module]) -> dict[str, str] | None:
    """The table that has the code of ``cls``, if it is a mixer."""
    code = digest(cls)
    return next((kind for kind in (ATTENTIONS, RECURRENCES) if code in kind), None)


@cache_by_forward
def _names_elsewhere(cls: type[nn.Module], present: frozenset[str], mixer: str) -> frozenset[str]:
    """The arguments of a layer of ``cls``, behind its hidden states, that it reads elsewhere than in the call of its ``mixer``; calls of
    modules that are not ``present`` are not made."""
    code = Code.of(cls)
    calls = [node for node in code.nodes if (path := called_path(node)) is not None and "." not in path]
    own = [call for call in calls if called_path(call) == mixer or not (called_path(call) in present or hasattr(cls, called_path(call)))]
    inside = {node for call in own for node in ast.walk(call)}
    names = set(list(inspect.signature(as_written(cls.forward)).parameters)[2:])
    loads = (node for node in code.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return frozenset(node.id for node in loads if node.id in names and node not in inside)


@cache_by_forward
def takes_rest(cls: type[nn.Module], mixer: str) -> bool:
    """Whether a layer of ``cls`` hands its ``mixer`` the keyword arguments that it does not name; else a forward made of its own does."""
    calls = [node for node in Code.of(cls).nodes if called_path(node) == mixer]
    return any(keyword.arg is None for call in calls for keyword in call.keywords)


def may_be_given(layer: nn.Module, mixer: str, given: dict[str, Any]) -> bool:
    """Whether a layer gets what is ``given`` behind its hidden states, of padded tokens, for its mixer alone."""
    elsewhere = _names_elsewhere(original_class(layer), frozenset(n for n, m in layer._modules.items() if m is not None), mixer)
    return all(given.get(name) is None or isinstance(given[name], bool | int | float | str) for name in elsewhere)


class OnPadded:
    """Stands for a mixer in its layer: hands it the states of real tokens [1, T, C] padded, and on what it returns of them. Whatever else
    is asked of it, the mixer answers."""

    def __init__(self, mixer: Callable, layout: Layout, given: list[Any], dropped: Iterable[str] = ()):
        self.mixer, self.layout, self.given, self.thread = mixer, layout, set(map(id, given)), threading.get_ident()
        self.dropped = {LAYOUT, *dropped}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.mixer(*args, **kwargs)
        kwargs = {name: self._padded(value) for name, value in kwargs.items() if name not in self.dropped}
        output = self.mixer(*map(self._padded, args), **kwargs)
        states, *others = (output,) if isinstance(output, Tensor) else output
        states = self.layout.unpad(states)[None]
        return states if isinstance(output, Tensor) else (states, *others)

    def _padded(self, value: Any) -> Any:
        """What the layer itself was given stays."""
        if isinstance(value, Tensor) and id(value) not in self.given and value.shape[:2] == (1, self.layout.tokens):
            return self.layout.pad(value)
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixer, name)
