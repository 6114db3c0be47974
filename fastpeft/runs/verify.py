"""Verification run: builds and adapts a model, compares it with plain PyTorch and PEFT (`fastpeft verify`)."""

from __future__ import annotations

import torch

from fastpeft.device import choose_device
from fastpeft.models import ModelSource, resolve
from fastpeft.plan import Plan, adapt, build, plan_for
from fastpeft.verify.compare import DTYPES, Result, verify


def verify_run(
    model: str | ModelSource,
    plan: str | None = None,
    *,
    dtype: str = "fp32",
    rank: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> tuple[Result, Plan]:
    """(the comparisons, the plan). ``plan`` None: LoRA in every part. ``seed``: of weights, adapters and the batch. ValueError for an
    unknown dtype, and as `build` and `adapt` raise it."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    source = resolve(model)
    network = build(source, device=choose_device(device), dtype=DTYPES[dtype], seed=seed)
    torch.manual_seed(seed)
    parts = source.family.parts
    adapt(network, plan_for(parts, plan or "/".join("LoRA" for _ in parts), r=rank))
    return verify(network, seed=seed), network.fastpeft_plan
