"""Models whose head reads one row of each sample of the last hidden state: classifiers of images and texts.

Nobody sees the other rows, in training or not, so their last layer computes that row alone: queries, output projection, feed-forward and
norms; keys and values it computes for all (:mod:`fastpeft.fused.stack.last_layer`). Where nothing is kept in a cache, no layer computes
padding (:mod:`fastpeft.fused.stack.rows`).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from fastpeft.forms import as_written, is_of_transformers
from fastpeft.fused.code.state_reads import FIRST, LAST_TOKEN, Unknown, may_pool
from fastpeft.fused.head.any_head import arguments_of, may_have_output_head
from fastpeft.fused.head.token_heads import token_head
from fastpeft.fused.layers.shared_input import tree_of
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.stack.any_stack import Read
from fastpeft.fused.stack.last_layer import MASK
from fastpeft.fused.stack.llama import FusedLlamaModel
from fastpeft.fused.stack.rows import RowsCall, cannot_be_read, layers_may, may_leave_rows_out, standing_in
from fastpeft.fused.stack.state_walk import StatePath, StateWalk
from fastpeft.registry import fuses, original_class, signature_of_replaced

NOTE = "the head reads one row of each sample of the last hidden state: the last layer computes no other, and no layer computes padding"


@dataclass
class Pooled(StatePath):
    """A model whose head reads one row of each sample of the last hidden state: the first one, or that of the last token (``last_token``).
    ``row_wise`` modules get that row alone."""

    last_token: bool = False
    reads_text_config: bool = False


def pooled_read(model: nn.Module) -> Pooled | None:
    """How ``model`` reads one row of each sample of its stack's last hidden state; None where it reads others too, hands the state out, or
    that cannot be told."""
    walk = StateWalk(model, Pooled)
    try:
        reads = walk.walk(model)
    except Unknown:
        return None
    pooled = walk.path
    pooled.called.remove(model)
    pooled.last_token = reads == {LAST_TOKEN}
    if pooled.last_token:
        tree = tree_of(as_written(original_class(model).forward))
        pooled.reads_text_config = "self.config.get_text_config().pad_token_id" in ast.unparse(tree)
        if not any(module is model for module, _ in pooled.expanded):
            return None  # what is indexed would have one row
    return pooled if reads in ({FIRST}, {LAST_TOKEN}) else None


def reads_one_row(cls: type[nn.Module]) -> bool:
    """Whether models of ``cls``, as transformers wrote it, may read one row of each sample of a stack's last hidden state, and make no
    logits of a vocabulary."""
    if not issubclass(cls, PreTrainedModel) or not is_of_transformers(cls):
        return False
    return not may_have_output_head(cls) and may_pool(cls) and token_head(cls) is None


@fuses(rule=reads_one_row, applies=lambda module: pooled_read(module) is not None, note=NOTE)
class FusedPooledModel:
    """transformers' own forward, whose stack computes in its last layer the rows alone that the head reads."""

    computes_only = staticmethod(lambda module: None)  # its layers compute

    @signature_of_replaced
    def forward(self, *args, **kwargs):
        call = _call_of(self, arguments_of(self, args, kwargs))
        with standing_in(self, call):
            return super().forward(*args, **kwargs)


def _call_of(model: nn.Module, given: dict[str, Any]) -> _PooledCall | None:
    """How this call of ``model`` runs; None where it is the model's own."""
    pooled = pooled_read(model) if may_leave_rows_out(model, given) else None
    if pooled is None or not layers_may(model, pooled, given):
        return None
    if pooled.gives_loss and given.get("labels") is not None and model.loss_function is not ForSequenceClassificationLoss:
        return None  # it may read the logits of every token
    column, columns = _column(model, pooled, given)
    if isinstance(pooled.stack, FusedLlamaModel):
        read = _read_of_llama(pooled.stack, column, columns, given)
        return None if read is None else _PooledCall(pooled, column, columns, read)
    return None if column is None else _PooledCall(pooled, column, columns)


def _column(model: nn.Module, pooled: Pooled, given: dict[str, Any]) -> tuple[int | Tensor | None, int]:
    """(where in each sample the row is that is read, [B] int64 or the same of all; how many tokens a sample has, where that matters)"""
    if not pooled.last_token:
        return 0, 0
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() != (3 if ids is None else 2) or tokens.shape[1] == 0:
        return None, 0
    pad = (model.config.get_text_config() if pooled.reads_text_config else model.config).pad_token_id
    if pad is None or ids is None:
        return tokens.shape[1] - 1, tokens.shape[1]
    real = (ids != pad).to(torch.int32)
    return (torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32) * real).argmax(-1), ids.shape[1]


class _PooledCall(RowsCall):
    """One call of a model that reads the row at ``column`` of each sample, of ``columns`` tokens."""

    def __init__(self, pooled: Pooled, column: int | Tensor, columns: int, read: Read | None = None):
        super().__init__(pooled, read)
        self.column, self.columns = column, columns

    def instead(self) -> list[tuple[nn.Module, str]]:
        return self.path.expanded

    def wanted(self, device: torch.device) -> Tensor:
        return torch.arange(self.columns, device=device) == torch.as_tensor(self.column, device=device).view(-1, 1)

    def at_last(self, device: torch.device) -> LastLayout:
        return LastLayout.of_columns(self.rows, self.columns, self.column, device, self.layout)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Every row of the output is the one that is read."""
        if x.shape[1] > 1:
            x = LastLayout.of_columns(len(x), self.columns, self.column, x.device).of_each(x)
        return module(x).expand(-1, self.columns, -1)


def _read_of_llama(stack: nn.Module, column: int | Tensor | None, columns: int, given: dict[str, Any]) -> Read | None:
    uses_cache = given.get("use_cache")
    uses_cache = stack.uses_cache_by_default() if uses_cache is None else uses_cache
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if uses_cache or not isinstance(column, int | Tensor) or columns == 0 or cannot_be_read(tokens):
        return None
    at = torch.arange(columns, device=tokens.device) == torch.as_tensor(column, device=tokens.device).view(-1, 1)
    return Read(given.get(MASK), at.expand(len(tokens), -1), alone=True)
