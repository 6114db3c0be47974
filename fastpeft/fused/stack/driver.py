"""Driver of a stack of text layers: padding removed, prefixes handed down, a last layer at labelled positions, padding back.

A model says in a :class:`~fastpeft.fused.layout.TokenPlan` how the tokens of a call lie; :func:`run_layers` lays them out, runs the layers
and returns [B, L, C]. BLIP's text stack and LLaMA's call it. ``plan.layout`` is the one place that says which tokens attend together: so
too where samples share a prefix, whose tokens are there once (:class:`~fastpeft.fused.layout.TreeLayout`); the driver, linear layers,
norms and losses see tokens [T, C] and do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastpeft.fused.layout import LabelledQueries, TokenPlan, queries_at
from fastpeft.savings import on

REENTRANT_BY_DEFAULT = ("torch.utils.checkpoint", "transformers.modeling_utils")  # modules of what checkpoints a layer
HANDED = ("routing", "visual")  # options of layers that hold tensors with a gradient, as prefixes do


def prefixes_of(stack: nn.Module, layers: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor] | None]:
    """Of each layer its prefix (P_k, P_v), each [H_kv, n, d]; None for each where the stack has no prefix."""
    encoder = getattr(stack, "prefix_encoder", None)
    return [None] * len(layers) if encoder is None else encoder()


@contextmanager
def without_checkpoints(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers run as if none were checkpointed: what they leave elsewhere than in their outputs would have no gradient, or be left twice."""
    on_before = [(layer, layer.gradient_checkpointing) for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    for layer, _ in on_before:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, before in on_before:
            layer.gradient_checkpointing = before


def checkpoint_without_reentrance(layers: Sequence[nn.Module]) -> None:
    """Make checkpointed layers of reentrant ones such that also differentiate what they are handed by name: a reentrant one runs backward
    through its graph by itself, layer by layer, and the layers' graphs share what made prefixes, routes or images. The same gradients."""
    for layer in layers:
        how = getattr(layer, "_gradient_checkpointing_func", None)
        func, args, options = (how.func, how.args, how.keywords) if isinstance(how, partial) else (how, (), {})
        asked = options.get("use_reentrant")
        if asked or (asked is None and getattr(func, "__module__", None) in REENTRANT_BY_DEFAULT):
            layer._gradient_checkpointing_func = partial(func, *args, **options | {"use_reentrant": False})


def run_layers(
    layers: Sequence[nn.Module],
    hidden: Tensor,
    plan: TokenPlan,
    *inputs: Tensor | None,
    prefixes: Sequence[tuple[Tensor, Tensor] | None],
    norm: Callable[[Tensor], Tensor] | None = None,
    states: list[Tensor] | None = None,
    at_labels: Callable[[LabelledQueries], dict[str, Any]] | None = None,
    **options: Any,
) -> Tensor:
    """Last hidden states [B, L, C] of hidden [B, L, C], after ``norm`` where one is given; zero where no token is computed.

    Layers are called with hidden ([T, C] where ``plan.tokens`` lays tokens out, else [B, L, C]), ``inputs`` (by position: gradient
    checkpointing differentiates no others) and ``options``; with ``layout``, ``prefix`` and ``labelled`` only where there is one, so that
    a module left as transformers wrote it gets no more than its own arguments. Where ``plan.output_mask`` says that few outputs are read,
    the last layer computes these alone, and ``at_labels(labelled)`` gives the options that differ there. ``states`` takes what comes
    before and after each layer, [B, L, C].
    """
    tokens, pad, labelled = plan.tokens, _unchanged, None
    if any(prefixes) or any(options.get(name) is not None for name in HANDED):
        checkpoint_without_reentrance(layers)
    if tokens is not None:
        pad, hidden = tokens.pad, tokens.unpad(hidden)
        if plan.output_mask is not None and on("labelled"):
            labelled = queries_at(tokens, plan.output_mask, bool(plan.causal), hidden.device, plan.layout)
    if plan.layout is not None:
        options["layout"] = plan.layout
    for layer, prefix in zip(layers, prefixes):
        if states is not None:
            states.append(pad(hidden))
        if labelled is not None and layer is layers[-1]:
            pad = labelled.outputs.pad
            options |= {"labelled": labelled} | ({} if at_labels is None else at_labels(labelled))
        hidden = layer(hidden, *inputs, **options | ({} if prefix is None else {"prefix": prefix}))
    hidden = pad(hidden if norm is None else norm(hidden))
    if states is not None:
        states.append(hidden)
    return hidden


def _unchanged(x: Tensor) -> Tensor:
    return x
