"""Activations that backward forms again from what is kept anyway, instead of keeping them too.

A norm keeps its input, an activation keeps its input; what they return is one pass of arithmetic away. An op that makes such a tensor
says so with :func:`remade`; an op that would save its own input asks :func:`keep` what to save, and :func:`again` for it in backward:

    y = norm(h)     remade(y, norm, h, weight, bias)     the norm's own backward keeps h
    z = y W^T       keep(y) -> (h, weight, bias)         dW = dz^T norm(h, weight, bias), the same bits as y

So a linear layer after a norm, GELU, SwiGLU or (IA)^3 factor saves nothing of its own: 10C instead of 16C elements per token in a ViT
layer, whichever parameters are trained.

The recipe travels on the tensor. A tensor that lost it (a view, another's product) or that was changed in place is saved as ever: a recipe
decides about memory, never about numbers. ``fastpeft.without("remake")`` switches recipes off; under torch.compile there are none, as its
partitioner makes this choice itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops._savings import on


class Recipe(NamedTuple):
    """``remake(*inputs)`` gives the tensor again, as it was at ``version``."""

    remake: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]
    version: int


def recipe_of(x: Tensor) -> Recipe | None:
    recipe = getattr(x, "_fastpeft_recipe", None) if on("remake") and not torch.compiler.is_compiling() else None
    return recipe if recipe is not None and recipe.version == x._version else None


def remade(y: Tensor, remake: Callable[..., Tensor], *inputs: Tensor | None, smaller: bool = False) -> Tensor:
    """``y``, noted to equal ``remake(*inputs)`` bit for bit. The inputs must be such that backward keeps them in any case, or ``smaller``
    than y; one that has a recipe of its own is replaced by what that recipe needs."""
    if not on("remake") or torch.compiler.is_compiling() or not (y.requires_grad or (smaller and torch.is_grad_enabled())):
        return y
    recipes = [None if x is None else recipe_of(x) for x in inputs]
    if any(recipe is not None for recipe in recipes):
        remake, inputs = _composed(remake, inputs, recipes)
    y._fastpeft_recipe = Recipe(remake, inputs, y._version)
    return y


def _composed(remake, inputs, recipes):
    flat, ends = [], []
    for x, recipe in zip(inputs, recipes):
        flat += [x] if recipe is None else recipe.inputs
        ends.append(len(flat))

    def compose(*tensors):
        pieces = [tensors[start:end] for start, end in zip([0, *ends], ends)]
        return remake(*(piece[0] if recipe is None else recipe.remake(*piece) for piece, recipe in zip(pieces, recipes)))

    return compose, tuple(flat)


def keep(x: Tensor | None) -> tuple[Callable[..., Tensor] | None, tuple[Tensor | None, ...]]:
    """(how, tensors): what a Function saves in place of ``x``; :func:`again` takes both."""
    recipe = None if x is None else recipe_of(x)
    return (None, (x,)) if recipe is None else (recipe.remake, recipe.inputs)


def again(how: Callable[..., Tensor] | None, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The tensor that :func:`keep` was asked about."""
    return tensors[0] if how is None else how(*tensors)
