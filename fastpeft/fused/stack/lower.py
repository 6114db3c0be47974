"""Lower layers of a stack whose outputs are kept: what stands in the stack's loop for them.

Who keeps them (:mod:`fastpeft.caching.layers`) hangs itself on a stack; here is only the way to it, so that stacks need not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LAYER_CACHE = "_fastpeft_layer_cache"  # an attribute of a stack


class Refused(Exception):
    """What a lower layer was called with cannot be served; nothing was computed or changed, and the model's own path does it."""


def run_stack(stack: nn.Module, given: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> Any:
    """``run(given)``, a forward of ``stack`` with these arguments by name, its lower layers served from a cache where it has one."""
    cache = stack.__dict__.get(LAYER_CACHE)
    call = None if cache is None or torch.compiler.is_compiling() else cache.call(stack, given)
    if call is None:
        return run(given)
    try:
        with standing(stack, call.layers):
            return run(given | {"use_cache": False})
    except Refused as error:
        cache.refused(str(error))
    return run(given)


@contextmanager
def standing(stack: nn.Module, layers: list[Any], name: str = "layers") -> Iterator[None]:
    """Inside, ``layers`` stand for those of ``stack``, or for those that stand there already, which it calls by ``name``."""
    before = stack.__dict__.get(name)
    stack.__dict__[name] = layers
    try:
        yield
    finally:
        if stack.__dict__.get(name) is layers:
            if before is None:
                del stack.__dict__[name]
            else:
                stack.__dict__[name] = before
