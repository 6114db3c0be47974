"""What a stack hands its layers, as layers that see real tokens alone take it.

Masks stay as they are, since attention functions get padded queries, keys and values; tables of positions, and an encoder's states, become
those of real tokens. T5's position biases are of padded cells, whose numbers T5 takes from its hidden states: they are formed here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.forms import digest
from fastpeft.fused.layout import LastLayout, Layout
from fastpeft.registry import original_class

MASK, SOURCE_MASK, STATES = "attention_mask", "encoder_attention_mask", "encoder_hidden_states"
BIASES = ("position_bias", "encoder_decoder_position_bias")
# Digests of attentions that form a bias of so many queries and keys by ``compute_bias``, each with a class that has it.
BIASED = {"2fc8dd129ac6": "t5.modeling_t5.T5Attention"}


class Unknown(Exception):
    """An argument that a layer may read in a way of its own."""


class StackCall:
    """One call of a stack: where its tokens lie, and what its layers' arguments are on tokens. ``outputs`` [B, L] bool: the only ones of
    the last layer that are read (None: all). ``causal``: without a mask no token attends to a later one; None: masks are taken at their
    word."""

    def __init__(self, layout: Layout | None, outputs: Tensor | None = None, causal: bool | None = None):
        self.layout, self.outputs, self.causal, self.thread = layout, outputs, causal, threading.get_ident()
        self.known: dict[int, tuple[Any, Any]] = {}
        self.hiding: dict[tuple[int, int], tuple[Tensor, bool]] = {}

    def at_last(self, device: torch.device) -> LastLayout | None:
        """Where the last layer's outputs are read; None where all are."""
        return None if self.outputs is None else LastLayout.of(self.layout, self.outputs, device)

    def arguments(
        self, names: list[str], args: tuple, kwargs: dict[str, Any], layer: nn.Module | None = None
    ) -> tuple[tuple, dict[str, Any]] | None:
        """A layer's arguments behind its hidden states, on tokens; None where one is of no known kind. ``names`` of those by position."""
        if len(args) > len(names):
            return None
        try:
            given = dict(zip(names, args)) | kwargs
            given |= self._biases(layer, names, given)
            given = {name: self._argument(name, value) for name, value in given.items()}
            self._check_masks(given)
        except Unknown:
            return None
        return tuple(given.pop(name) for name in names[: len(args)]), given

    def _argument(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if name in (MASK, SOURCE_MASK, *BIASES) and isinstance(value, Tensor) and value.dim() == 4:
            return value
        if name == STATES and isinstance(value, Tensor) and self.layout.source is not None:
            return self._on_tokens(value, 3, self.layout.source)
        if name.startswith("position_embeddings") and isinstance(value, tuple) and all(isinstance(t, Tensor) for t in value):
            return tuple(self._on_tokens(t, 3) for t in value)
        if name == "position_embeddings" and isinstance(value, Tensor):
            return self._on_tokens(value, 3)
        if name == "position_ids" and isinstance(value, Tensor):
            return self._on_tokens(value, 2)
        raise Unknown

    def _on_tokens(self, table: Tensor, dims: int, layout: Layout | None = None) -> Tensor:
        """[B or 1, L, ...] -> [1, T, ...]."""
        kept = self.known.get(id(table))
        if kept is None:
            layout = self.layout if layout is None else layout
            B, L = layout.rows, layout.columns
            if table.dim() != dims or table.shape[0] not in (1, B) or table.shape[1] != L:
                raise Unknown
            full = table.expand(B, *table.shape[1:]).reshape(B, L, -1)
            kept = self.known[id(table)] = table, layout.unpad(full).view(1, -1, *table.shape[2:])
        return kept[1]

    def _biases(self, layer: nn.Module | None, names: Iterable[str], given: dict[str, Any]) -> dict[str, Tensor]:
        """The position biases that a layer would form by the number of its tokens."""
        own, across = BIASES
        found = {}
        if own in names and given.get(own) is None:
            found[own] = self._formed(layer)
        if across in names and given.get(across) is None and isinstance(states := given.get(STATES), Tensor):
            found[across] = states.new_zeros(1, 1, 1, states.shape[1])
        return found

    def _formed(self, layer: nn.Module | None) -> Tensor:
        for module in () if layer is None else layer.modules():
            if getattr(module, "has_relative_attention_bias", False) and digest(original_class(module)) in BIASED:
                device = module.relative_attention_bias.weight.device
                return module.compute_bias(self.layout.columns, self.layout.columns, device=device)
        raise Unknown

    def _check_masks(self, given: dict[str, Any]) -> None:
        """Unknown where a token that is computed may attend to one that is not."""
        layout, source = self.layout, self.layout.source
        if source is not None and given.get(STATES) is not None and not self._hides(given.get(SOURCE_MASK), source, False):
            raise Unknown
        if self.causal is not None and not self._hides(given.get(MASK), layout, self.causal):
            raise Unknown

    def _hides(self, mask: Tensor | None, keys: Layout, otherwise: bool) -> bool:
        """Whether no token attends to keys that are left out, as ``mask`` [B or 1, H or 1, M or 1, N] says, or ``otherwise`` without."""
        if keys.place is None:
            return True
        if mask is None:
            return otherwise
        kept = self.hiding.get((id(mask), id(keys)))
        if kept is None:
            kept = self.hiding[id(mask), id(keys)] = mask, self._hidden(mask, keys)
        return kept[1]

    def _hidden(self, mask: Tensor, keys: Layout) -> bool:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if allowed.shape[2] not in (1, self.layout.columns) or allowed.shape[3] != keys.columns:
            return False
        seen = allowed.any(1)
        if seen.shape[1] > 1 and self.layout.place is not None:
            seen = seen & _cells(self.layout, mask.device)[..., None]
        return not bool((seen.any(1) & ~_cells(keys, mask.device)).any())


def _cells(layout: Layout, device: torch.device) -> Tensor:
    """[rows, columns] bool: where a token lies."""
    cells = torch.zeros(layout.rows * layout.columns, dtype=torch.bool, device=device)
    return cells.index_fill_(0, layout.cells_on(device), True).view(layout.rows, layout.columns)
