"""Recompute activations in backward from tensors autograd already saves.

A norm keeps its input, an activation keeps its input; what they return is one pass of arithmetic away. An op that makes such a tensor
says so with :func:`mark_recomputable`; an op that would save its own input asks :func:`to_save` what to save, and
calls :func:`recompute` in backward:

    y = norm(h)     mark_recomputable(y, norm, h, weight, bias)     the norm's own backward saves h
    z = y W^T       to_save(y) -> (h, weight, bias)                 dW = dz^T norm(h, weight, bias), the same bits as y

So a linear layer after a norm, GELU, SwiGLU or (IA)^3 factor saves nothing of its own: 10C instead of 16C elements per token in a ViT
layer, whichever parameters are trained.

The recipe travels on the tensor. A tensor that lost it (a view, another's product) or that was changed in place is saved as ever: a recipe
decides about memory, never about numbers. FSDP and checkpoints hand views on where a module begins, behind which a recipe's parameters may
be gone, so that a recipe survives a view only where it says so (``in_views``: its inputs are no parameters). ``fastpeft.without("remake")``
switches recipes off; under torch.compile there are none, as its partitioner makes this choice itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.savings import on


class Recipe(NamedTuple):
    """``function(*inputs)`` recomputes the tensor, as it was at ``version``; ``peek`` does so for another recipe that builds on it.
    ``pack``, of the tensor and the inputs, makes one input more, the first, as soon as somebody asks for them. ``in_views``: views that
    show all of the tensor in another shape have it too."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]
    version: int
    peek: Callable[..., Tensor]
    pack: Callable[..., Tensor] | None = None
    in_views: bool = False


def recomputes() -> bool:
    """Whether recipes are on."""
    return on("remake") and not torch.compiler.is_compiling()


def _held(x: Tensor | None) -> Recipe | None:
    """x's recipe, whether or not recipes are on."""
    recipe = getattr(x, "_fastpeft_recipe", None)
    return recipe if recipe is not None and recipe.version == x._version else None


def _packed(x: Tensor, recipe: Recipe) -> Recipe:
    """x's recipe with all of its inputs there."""
    if recipe.pack is None:
        return recipe
    with torch.no_grad():
        inputs = recipe.pack(x, *recipe.inputs), *recipe.inputs
    x._fastpeft_recipe = recipe = recipe._replace(inputs=inputs, pack=None)
    return recipe


def recipe_of(x: Tensor) -> Recipe | None:
    return _held(x) if recomputes() else None


def mark_recomputable(
    y: Tensor,
    function: Callable[..., Tensor],
    *inputs: Tensor | None,
    smaller: bool = False,
    peek: Callable[..., Tensor] | None = None,
    pack: Callable[..., Tensor] | None = None,
    in_views: bool = False,
) -> Tensor:
    """``y``, marked as equal to ``function(*inputs)`` bit for bit. The inputs are tensors that backward saves anyway, or ``smaller``
    than y; one that has a recipe of its own is replaced by what that recipe needs. With ``pack`` it is
    ``function(pack(y, *inputs), *inputs)``, and y is packed when somebody would keep it."""
    if not recomputes() or not (y.requires_grad or (smaller and torch.is_grad_enabled())):
        return y
    peek = function if peek is None else peek
    recipes = [None if (recipe := _held(x)) is None else _packed(x, recipe) for x in inputs]
    if any(recipes):
        flat = tuple(t for x, recipe in zip(inputs, recipes) for t in ((x,) if recipe is None else recipe.inputs))
        function, peek, inputs = _composed(function, recipes), _composed(peek, recipes), flat
    y._fastpeft_recipe = Recipe(function, inputs, y._version, peek, pack, in_views and not any(recipes))
    return y


def _composed(function: Callable[..., Tensor], recipes: list[Recipe | None]) -> Callable[..., Tensor]:
    """``function`` of inputs some of which have to be made first. It holds no tensor: those are autograd's to keep and to let go."""
    steps = [None if recipe is None else (recipe.peek, len(recipe.inputs)) for recipe in recipes]

    def compose(*tensors):
        rest = iter(tensors)
        return function(*(next(rest) if step is None else step[0](*islice(rest, step[1])) for step in steps))

    return compose


def without_recipe(x: Tensor | None) -> Tensor | None:
    """x without its recipe."""
    return x if x is None or recipe_of(x) is None else x.view_as(x)


def to_save(x: Tensor | None) -> tuple[Callable[..., Tensor] | None, tuple[Tensor | None, ...]]:
    """(function, tensors): what a Function saves in place of ``x``; :func:`recompute` takes both."""
    if x is None:
        return None, (x,)
    if (recipe := recipe_of(x)) is not None:
        recipe = _packed(x, recipe)
        return recipe.function, recipe.inputs
    if (base := _shown_whole(x)) is not None:
        recipe = _packed(base, recipe_of(base))
        return partial(_in_shape, x.shape, recipe.function), recipe.inputs
    return None, (x,)


def _shown_whole(x: Tensor) -> Tensor | None:
    """The tensor with a recipe that ``x`` is, in another shape; None where it is none."""
    base = x._base
    if base is None or base.numel() != x.numel() or not (x.is_contiguous() and base.is_contiguous() and x.dtype == base.dtype):
        return None
    recipe = recipe_of(base)
    return base if recipe is not None and recipe.in_views else None


def _in_shape(shape: torch.Size, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    return function(*inputs).view(shape)


def recompute(function: Callable[..., Tensor] | None, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    """The tensor that :func:`to_save` was asked about."""
    if function is None:
        return tensors[0]
    with torch.no_grad():  # also where backward itself runs with a graph
        return function(*tensors)


def to_save_all(*tensors: Tensor | None) -> tuple[list[tuple[Callable[..., Tensor] | None, int]], tuple[Tensor | None, ...]]:
    """:func:`to_save` for several: (notes, tensors), both of which :func:`recompute_all` takes."""
    kept = [to_save(x) for x in tensors]
    return [(function, len(pieces)) for function, pieces in kept], tuple(t for _, pieces in kept for t in pieces)


def recompute_all(notes: list[tuple[Callable[..., Tensor] | None, int]], tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    rest = iter(tensors)
    return [recompute(function, tuple(islice(rest, n))) for function, n in notes]


class _Computed:
    """Several outputs of one computation that backward repeats once: an op that kept one of them takes it away; one that builds on it
    before (the linear layer after an activation, whose backward comes first) leaves it for that op."""

    def __init__(self, call: Callable[..., tuple[Tensor, ...]]):
        self.call, self.values = call, {}

    def peek(self, i: int, *inputs: Tensor) -> Tensor:
        if i not in self.values:
            self.values = dict(enumerate(self.call(*inputs)))
        return self.values[i]

    def take(self, i: int, *inputs: Tensor) -> Tensor:
        self.peek(i, *inputs)
        return self.values.pop(i)


def recomputed(
    call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, parameters: tuple[Tensor, ...], random: bool = False
) -> tuple[Tensor, ...]:
    """``call(x)``, whose outputs backward recomputes, once, instead of saving them: memory for FLOPs.

    ``parameters`` are what ``call`` uses besides x: they are saved, so that a change before backward is an error. ``random``: it draws
    random numbers; the same are redrawn. Under autocast it is recomputed under the same autocast.
    """
    if not recomputes() or not torch.is_grad_enabled():
        return call(x)
    device, devices = x.device.type, [x.device] if x.device.type == "cuda" else []
    cast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
    states = (torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)) if random else ()

    def replay(x, *_):
        with torch.no_grad(), torch.autocast(device, **cast), torch.random.fork_rng(devices, enabled=random):
            if random:
                torch.set_rng_state(states[0])
                for d, state in zip(devices, states[1:]):
                    torch.cuda.set_rng_state(state, d)
            return call(x)

    outputs, computed = call(x), _Computed(replay)
    return tuple(
        mark_recomputable(y, partial(computed.take, i), x, *parameters, peek=partial(computed.peek, i)) for i, y in enumerate(outputs)
    )
