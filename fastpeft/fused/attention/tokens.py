"""Attention functions where queries, keys and values are of real tokens alone, as a layout among their keyword arguments says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType

import torch
from torch import Tensor, nn

from fastpeft.fused.layout import CrossLayout, LastLayout, Layout
from fastpeft.ops._recompute import mark_recomputable, recipe_of

LAYOUT = "fastpeft_layout"  # the keyword argument by which layers hand on where tokens lie
KEY_STATES = ("key_value_states", "encoder_hidden_states")  # what attentions call the states of another sequence, an encoder's


def told_of_keys(forward: FunctionType) -> FunctionType:
    """``forward`` of an attention, where it may get states of another sequence for its keys: it then hands on where those lie."""
    names = list(inspect.signature(forward).parameters)
    at = next((i for i, name in enumerate(names) if name in KEY_STATES), None)
    if at is None:
        return forward

    @wraps(forward)
    def ours(*args, **kwargs):
        layout = kwargs.get(LAYOUT)
        if layout is not None and (args[at] if len(args) > at else kwargs.get(names[at])) is not None:
            kwargs[LAYOUT] = None if layout.source is None else CrossLayout(layout, layout.source)
        return forward(*args, **kwargs)

    return ours


def of_real_tokens(function: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """``function``, an attention function, where ``fastpeft_layout`` among the keyword arguments says that query, key and value
    [1, H, T, d] are those of real tokens only: they are padded for it, as the mask is. Or that one query of each sample is there."""
    layout = kwargs.pop(LAYOUT, None)
    if isinstance(layout, CrossLayout):
        queries, keys = layout
        if isinstance(queries, LastLayout) and query.shape[2] != queries.tokens:
            queries = queries.outputs
    else:
        flat = layout is not None and key.shape[::2] == (1, layout.tokens)
        if query.shape[2] != key.shape[2] and isinstance(layout, LastLayout):
            return _of_each(layout, flat, function, module, query, key, value, *args, **kwargs)
        if not flat:
            return function(module, query, key, value, *args, **kwargs)
        queries = keys = layout
    output, weights = function(module, _pad(queries, query), _pad(keys, key), _pad(keys, value), *args, **kwargs)
    B, L, H, d = output.shape
    laid = output.reshape(B, L, H * d)
    tokens = queries.unpad(laid)
    if queries.place is not None and getattr(output, "_fastpeft_is_kept", False):  # by the attention, for its backward
        mark_recomputable(tokens, queries.unpad, laid, in_views=True)  # models lay its heads side by side
    return tokens.view(1, -1, H, d), weights


def _of_each(layout: LastLayout, flat: bool, function, module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    """``function`` for one query of each sample, [1, H, B, d] or [B, H, 1, d], under its row of the mask."""
    _, H, _, d = query.shape
    query = query.transpose(1, 2).reshape(layout.rows, H, 1, d)
    if flat:
        key, value = _pad(layout, key), _pad(layout, value)
    if mask is not None and mask.shape[2] > 1:
        mask = layout.of_each(mask.transpose(1, 2)).transpose(1, 2)
    elif mask is None and (module.config._attn_implementation or "eager") != "eager":
        causal = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:
            at = torch.arange(key.shape[2], device=key.device)
            mask = (at <= torch.as_tensor(layout.column, device=key.device).view(-1, 1))[:, None, None]
    output, weights = function(module, query, key, value, mask, **kwargs)
    return output.view(*((1, layout.rows) if flat else (layout.rows, 1)), H, d), weights


def _pad(layout: Layout, x: Tensor) -> Tensor:
    """[1, H, T, d] -> [B, H, L, d]; what backward can form again, it can also pad."""
    padded = _padded(layout, x)
    return padded if recipe_of(x) is None else mark_recomputable(padded, partial(_padded, layout), x)


def _padded(layout: Layout, x: Tensor) -> Tensor:
    _, H, T, d = x.shape
    return layout.pad(x.transpose(1, 2).reshape(T, H * d)).view(layout.rows, layout.columns, H, d).transpose(1, 2)
