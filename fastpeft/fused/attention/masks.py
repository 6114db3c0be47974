"""What a mask of transformers' says: causality, key padding, shared prefixes, any other pattern, or numbers added to the scores."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops.attention import attention
from fastpeft.ops.attention_backends import allowed_keys
from fastpeft.ops.tree_attention import PrefixTree, tree_attention


class MaskContent(NamedTuple):
    """Of a mask [B or 1, H or 1, M or 1, N].

    ``allowed``: the same as bool, True = attend; ``causal`` with ``padding`` [B or 1, N]: the same as causality (or none) and key padding,
    ``causal`` None where it is neither; ``bias``: the mask itself where it adds other numbers than 0 and its dtype's least, ``allowed`` is
    None then; ``dead``: some query has no key; ``least``: what stands for "no" in a mask of numbers; ``trees``, one for each of B rows or
    for all: the same as samples that share prefixes, as :class:`fastpeft.data.SharedPrefixCollator` lays them out."""

    allowed: Tensor | None = None
    causal: bool | None = None
    padding: Tensor | None = None
    bias: Tensor | None = None
    dead: bool = False
    least: float | None = None
    trees: tuple[PrefixTree, ...] | None = None


def read_mask(mask: Tensor) -> MaskContent:
    """The content of ``mask``. The layers of a model share a mask: it is read once, and the note stays on it until it is changed."""
    if mask.is_inference():  # without a version: it may have been changed since
        return _read(mask)
    noted = getattr(mask, "_fastpeft_content", None)
    if noted is None or noted[0] != mask._version:
        with torch.no_grad():
            noted = mask._fastpeft_content = (mask._version, _read(mask.detach()))
    return noted[1]


def adds_nothing(bias: Tensor | None, mask: Tensor | None) -> bool:
    """Whether ``bias``, added to scores beside ``mask``, is zero everywhere, as T5's of its cross-attention. It is read once, as a mask is.
    Where ``mask`` leaves a query no key, a sum with a bias is another than without: it attends to all."""
    if mask is not None and (mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point())):
        return False
    if bias is None or bias.requires_grad or bias.dim() != 4 or bias.device.type != "cpu" or not bias.is_floating_point():
        return False
    content = read_mask(bias)
    return content.allowed is not None and bool(content.allowed.all()) and (mask is None or not read_mask(mask).dead)


def attend_allowed(q: Tensor, k: Tensor, v: Tensor, content: MaskContent, *, rescale=None, bias: Tensor | None = None, **options) -> Tensor:
    """[B, H, T, d] of q [B, H, M, d] and k, v [B, H_kv, N, d] under a mask that is neither causality nor padding: by parts where samples
    share prefixes. rescale, bias, options: as :func:`fastpeft.ops.attention`'s."""
    trees = content.trees
    if trees is None or rescale is not None or bias is not None:
        return attention(q, k, v, attn_mask=content.allowed, rescale=rescale, bias=bias, **options)
    rows = [tree_attention(*(t[i : i + 1] for t in (q, k, v)), trees[i if len(trees) > 1 else 0], **options) for i in range(len(q))]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _read(mask: Tensor) -> MaskContent:
    if mask.dtype == torch.bool:
        return _pattern(mask, None)
    least, lowest = torch.finfo(mask.dtype).min, float(mask.amin())
    allowed = mask == 0
    if lowest in (least, -torch.inf) and bool((allowed | (mask == lowest)).all()):
        return _pattern(allowed, lowest)
    if lowest == 0.0 and bool(allowed.all()):
        return _pattern(allowed, least)
    return MaskContent(bias=mask, dead=bool((mask.amax(-1) <= least / 2).any()))


def _pattern(allowed: Tensor, least: float | None) -> MaskContent:
    content = MaskContent(allowed, dead=not bool(allowed.any(-1).all()), least=least)
    if allowed.shape[1] != 1:
        return content
    rows = allowed[:, 0]
    padding = rows.any(1)  # keys that some query sees
    seen, padding = padding[:, None], None if bool(padding.all()) else padding
    if bool((rows == seen).all()):
        return content._replace(causal=False, padding=padding)
    triangle = allowed_keys(rows[:, None], rows[:, None].mT, True, None) if rows.shape[1] == rows.shape[2] else None
    if triangle is not None and bool((rows == (seen & triangle[0])).all()):
        return content._replace(causal=True, padding=padding)
    if triangle is not None and bool((rows <= triangle[0]).all()):
        return content._replace(trees=_trees(rows))
    return content


def _trees(rows: Tensor) -> tuple[PrefixTree, ...] | None:
    """Of a mask [B, T, T] within causality; None where it is something else, or nothing is shared."""
    trees = tuple(map(_tree, rows.cpu()))
    if None in trees or not any(any(tree.shared) for tree in trees):
        return None
    return tuple(replace(tree, device=rows.device) for tree in trees)


def _tree(row: Tensor) -> PrefixTree | None:
    before = row.diagonal(-1)  # whether a token sees the one before it
    starts = (0, *((~before).nonzero().squeeze(1) + 1).tolist())
    try:
        tree = PrefixTree((*starts, len(row)), tuple((row[list(starts)].sum(1) - 1).tolist()))
    except ValueError:
        return None
    return tree if torch.equal(tree.mask(), row) else None
