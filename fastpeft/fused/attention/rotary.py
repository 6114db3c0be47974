"""Rotary embedding inside attention layers of any model: the function of the model's file that turns queries and keys, by its code."""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import ops
from fastpeft.forms import function_digest
from fastpeft.ops._common import accumulator
from fastpeft.ops._recompute import mark_recomputable, recipe_of
from fastpeft.ops.attention_inputs import both_turned, one_pass


class Kind(NamedTuple):
    """How a function turns [..., d] by tables [..., rot]."""

    partial: bool = False  # rot may be less than d
    keeps_dtype: bool = False  # the result has the input's dtype, whatever the tables'
    unsqueezed: int | None = None  # where the tables get the dimension of heads; None: the function takes unsqueeze_dim, 1 by itself
    alone: bool = False  # it turns queries or keys, one tensor a call


# Digests (fastpeft.forms.function_digest) of the functions in transformers' model files, each with a file that has it.
ROTARY = {
    "f2feead6e418": Kind(),  # llama
    "b4ced6899b54": Kind(),  # falcon
    "b8f9ffb9f4c4": Kind(keeps_dtype=True),  # olmo2
    "9cd03d9be402": Kind(partial=True),  # gpt_neox
    "890f50e3894a": Kind(keeps_dtype=True, unsqueezed=-2),  # qwen2_5_vl's images
    "34684829be0b": Kind(alone=True),  # gemma4
}


@cache
def kind_of(function: Any) -> Kind | None:
    """How a function turns; None where that is not known."""
    return ROTARY.get(function_digest(function)) if isinstance(function, FunctionType) else None


class Rotary:
    """The function that a name of a model file leads to, on ``ops.rotary`` where that is the same and a gradient is asked for."""

    def __init__(self, namespace: dict[str, Any], name: str):
        self.namespace, self.name = namespace, name

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """q, k [B, H, L, d] or as the function takes them; cos, sin [B, L, rot]."""
        theirs = self.namespace[self.name]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or (kind := kind_of(theirs)) is None:
            return theirs(q, k, cos, sin, *args, **kwargs)
        dim = kwargs.get("unsqueeze_dim", 1) if kind.unsqueezed is None else kind.unsqueezed
        if args or kwargs.keys() - {"unsqueeze_dim"} or not all(_fits(kind, t, cos, sin) for t in (q, k)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        if dim == 1 and _alike(q, k, cos) and one_pass(q, k):
            return both_turned(q, k, cos, sin)
        cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
        if not all(_broadcasts(cos, t) for t in (q, k)):
            return theirs(q, k, cos.squeeze(dim), sin.squeeze(dim), *args, **kwargs)
        return ops.rotary(recomputable(q), cos, sin), ops.rotary(recomputable(k), cos, sin)


class RotaryOfOne(Rotary):
    """Likewise, of one tensor a call."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        theirs = self.namespace[self.name]
        kind = None if torch.compiler.is_compiling() or not torch.is_grad_enabled() else kind_of(theirs)
        tables = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if kind is None or not _fits(kind, x, cos, sin) or not _broadcasts(tables[0], x):
            return theirs(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return ops.rotary(recomputable(x), *tables)


def _alike(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Whether q and k are heads [B, H, L, d] of the same tokens, and the tables theirs, [B or 1, L, rot]."""
    if not q.dim() == k.dim() == cos.dim() + 1 == 4 or q.dtype != k.dtype:
        return False
    return (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:]) and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[2]


def recomputable(x: Tensor) -> Tensor:
    """``x`` with the recipe of the tensor that it is a view of: norms of queries and keys come before their heads are moved."""
    base = x._base
    if base is None or recipe_of(x) is not None or recipe_of(base) is None or not base.is_contiguous():
        return x
    return mark_recomputable(x, partial(_view, x.shape, x.stride(), x.storage_offset()), base)


def _view(shape: torch.Size, stride: tuple[int, ...], offset: int, base: Tensor) -> Tensor:
    return base.contiguous().as_strided(shape, stride, offset)


def _fits(kind: Kind, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    rot = cos.shape[-1]
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.requires_grad or sin.requires_grad or rot % 2:
        return False
    dtypes = (x.dtype, accumulator(x.dtype)) if kind.keeps_dtype else (x.dtype,)
    return cos.dtype in dtypes and x.is_floating_point() and (rot == x.shape[-1] or (kind.partial and rot < x.shape[-1]))


def _broadcasts(cos: Tensor, x: Tensor) -> bool:
    lead = x.shape[x.dim() - cos.dim() : -1]
    return cos.dim() <= x.dim() and all(c in (1, n) for c, n in zip(cos.shape[:-1], lead))
