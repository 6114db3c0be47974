"""The last hidden state of a model's stack, followed out through the modules that this model has.

What a forward does with it is found in its code (:mod:`fastpeft.fused.code.state_reads`); here that is put together for one model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpeft.fused.code.state_reads import BACK, FIRST, LAST_TOKEN, LOSS, OUT, Through, Unknown, argument_uses, state_of
from fastpeft.fused.stack.flatten import is_row_wise
from fastpeft.fused.stack.row_wise import is_row_wise_code
from fastpeft.registry import original_class, path_of

WRAPPER = "peft.utils.other.ModulesToSaveWrapper"


@dataclass
class StatePath:
    """The way of the last hidden state of ``stack``, whose layers have the name ``layers``.

    ``row_wise``: modules that get what is read of it alone; ``called``: those between, which take it out or hand it on; ``expanded``:
    (module, name) of those whose output must have the shape of the batch; ``through``: (module, name) of all that are row-wise."""

    stack: nn.Module
    layers: str
    gives_loss: bool = False
    row_wise: list[nn.Module] = field(default_factory=list)
    called: list[nn.Module] = field(default_factory=list)
    expanded: list[tuple[nn.Module, str]] = field(default_factory=list)
    through: list[tuple[nn.Module, str]] = field(default_factory=list)


class StateWalk:
    """Follows the state from the stack in ``model`` out; ``path`` is there once it has."""

    def __init__(self, model: nn.Module, kind: type[StatePath] = StatePath):
        self.model, self.kind, self.path = model, kind, None

    def walk(self, module: nn.Module) -> set[str]:
        """What is read of the state that ``module`` has from its stack, in it or below; ``OUT`` where it hands the state on."""
        state = known(state_of(original_class(module)))
        if state.layers is not None:
            layers, dropped = module._modules.get(state.layers), getattr(module, "layerdrop", None)
            if (state.skips and dropped != 0) or not isinstance(layers, nn.ModuleList):
                raise Unknown
            if {isinstance(layer, GradientCheckpointingLayer) for layer in layers} != {True}:
                raise Unknown
            self.path, reads = self.kind(module, state.layers), {OUT}
        else:
            reads = self.walk(module.get_submodule(state.inner))
        self.path.called.append(module)
        return (reads - {OUT}) | (self.settle(module, state.uses) if OUT in reads else set())

    def settle(self, module: nn.Module, uses: frozenset[str | Through]) -> set[str]:
        """What ``uses`` in the forward of ``module`` read."""
        reads: set[str] = set()
        through = [use for use in uses if isinstance(use, Through)]
        for use in uses - set(through):
            if use == LOSS:
                self.path.gives_loss = True
            elif use == BACK:
                self.path.expanded.append((module, known(through[0] if len(through) == 1 else None).name))
            else:
                reads.add(use)
        for use in through:
            reads |= self.through(module, use)
        return reads

    def through(self, module: nn.Module, use: Through) -> set[str]:
        inner = getattr(module, use.name, None)
        if inner is None:
            return set()
        if not isinstance(inner, nn.Module):
            raise Unknown
        if self.takes_rows(module, use.name):
            reads = self.settle(module, known(use.uses))
            if LAST_TOKEN in reads and module is self.model:
                self.path.expanded.append((module, use.name))
            return reads
        own = unwrapped(inner)
        if self.settle(own, known(argument_uses(original_class(own)))) != {FIRST}:
            raise Unknown
        self.path.called += [inner, own]
        return {FIRST}

    def takes_rows(self, module: nn.Module, name: str) -> bool:
        """Whether the module of this name in ``module`` treats every token by itself; it is noted then."""
        inner = getattr(module, name)
        own = unwrapped(inner)
        if not (is_row_wise(type(own)) or getattr(type(own), "takes_flat_tokens", False) or is_row_wise_code(own)):
            return False
        self.path.row_wise.append(own)
        self.path.called += [inner] if inner is not own else []
        self.path.through.append((module, name))
        return True


def known(value: Any) -> Any:
    if value is None:
        raise Unknown
    return value


def unwrapped(module: nn.Module) -> nn.Module:
    """What PEFT wraps in copies of the same class, where it does."""
    return module.original_module if path_of(type(module)) == WRAPPER else module
