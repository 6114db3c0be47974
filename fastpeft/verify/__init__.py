"""Comparison with the same model without fastpeft: losses and every gradient."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastpeft.verify.any_model import compare_on
from fastpeft.verify.compare import DTYPES, Result
from fastpeft.verify.compare import verify as compare_family


def verify(model: nn.Module, batch: Mapping[str, Any] | None = None, *, seed: int = 0, peft: bool = True) -> Result:
    """Losses and every gradient of ``model``, fused against its own modules; ``result.ok``, ``result.lines()``, ``result.to_dict()``.

    batch: keywords of the model's forward, labels among them: any transformers or PEFT model. None: small batches of every form that
    fastpeft's own models are trained in, adapters moved from their start by ``seed``, and PEFT's twin where ``peft``.
    """
    return compare_family(model, seed=seed, peft=peft) if batch is None else compare_on(model, batch)


__all__ = ["DTYPES", "Result", "verify"]
