"""Summary of a run: the fields of summary.json."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import fastpeft
from fastpeft.cost.profile import StepCost
from fastpeft.methods.mm_adapter import ATTENTION
from fastpeft.plan import count
from fastpeft.train.config import TrainConfig

WINDOW = 20  # steps, or a fifth of a shorter run: one batch's loss says how long its answers are more than how well the model does


def summary_of(model: nn.Module, config: TrainConfig, device: torch.device, done: dict[str, Any]) -> dict[str, Any]:
    """Fields of ``summary.json`` but for scores and notes; bytes, seconds, FLOPs. ``done``: the run's totals.

    Cost fields are of the run's first batch. ``loss_first`` and ``loss_last`` are means over 20 steps, or a fifth of a run of under 100.
    ``samples_per_second`` is over all steps, waiting for data included; the steady one leaves out each process's first steps.
    """
    cost = done["cost"] or asdict(StepCost()) | {"samples": 1}
    steady = ("steady_samples", "steady_seconds") if done["steady_seconds"] else ("samples", "seconds")
    parts = {
        name: {
            "flops_per_sample": cost["flops_by_part"].get(name, 0) / cost["samples"],
            "saved_bytes": cost["saved_by_part"].get(name, 0),
        }
        for name in dict.fromkeys([*cost["flops_by_part"], *cost["saved_by_part"]])
    }
    window = max(1, min(WINDOW, done["step"] // 5))
    return {
        "steps": done["step"],
        "samples": done["samples"],
        "samples_per_second": done["samples"] / max(done["seconds"], 1e-9),
        "steady_samples_per_second": done[steady[0]] / max(done[steady[1]], 1e-9),
        "tokens_per_second": done["tokens"] / max(done["seconds"], 1e-9),
        "peak_memory_bytes": done["peak_memory_bytes"],
        "saved_bytes_per_step": cost["saved_bytes"],
        "flops_per_sample": cost["flops"] / cost["samples"],
        "loss_first": statistics.fmean(done["first_losses"][:window]) if done["step"] else None,
        "loss_last": statistics.fmean(done["last_losses"][-window:]) if done["step"] else None,
        "loss_window": window,
        "model": model.fastpeft_source.get("model") if hasattr(model, "fastpeft_source") else type(model).__name__,
        "plan": str(model.fastpeft_plan),
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        "batch_size": config.batch_size,
        "seed": config.seed,
        "treatments": json.loads(json.dumps(model.fastpeft_plan.to_dict())),
        "config": {name: value for name, value in asdict(config).items() if name not in ("resume", "progress", "allow_change")},
        "seconds": done["seconds"],
        "parameters": count(model),
        "parts": parts,
        **_routing(model),
        **_sources(done),
        **({"validation": done["validation"] | {"by": config.best_by}} if done["validation"] else {}),
        "versions": {"fastpeft": fastpeft.__version__, "torch": torch.__version__, "transformers": transformers.__version__, **_commit()},
    }


@functools.cache
def _commit() -> dict[str, str]:
    """Of a checkout: its commit, and whether files have changed since."""
    root = Path(fastpeft.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {}
    try:
        told = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": told.stdout.strip()} if told.returncode == 0 and told.stdout.strip() else {}


def _sources(done: dict[str, Any]) -> dict[str, Any]:
    """Samples and last loss of each data set, where several are mixed."""
    found = {
        name: {"samples": of["samples"], "loss_last": statistics.fmean(of["losses"]) if of["losses"] else None}
        for name, of in done["sources"].items()
    }
    return {"sources": found} if found else {}


def _routing(model: nn.Module) -> dict[str, Any]:
    """Weights of each layer's experts by modality, of a model with MM-Adapters."""
    lists: dict[str, list] = {}
    for name, mixtures in (model.mixtures() if hasattr(model, "mixtures") else {}).items():
        for place, weights in mixtures.items():
            kind = name if place.before == ATTENTION else f"{name}, before feed-forward"
            lists.setdefault(kind, []).append(weights.tolist())
    return {"routing": lists} if lists else {}


def over_ranks(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of what each rank has measured for itself: the highest peak, and features of all together."""
    fields: dict[str, Any] = {"peak_memory_bytes": max(of["peak_memory_bytes"] for of in measured)}
    if (found := [of["features"] for of in measured])[0] is not None:
        fields["features"] = {name: sum(of[name] for of in found) if isinstance(v, int) else v for name, v in found[0].items()}
    return fields
