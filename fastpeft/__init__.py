"""fastpeft: parameter-efficient fine-tuning that computes, keeps and moves only what the trainable parameters need."""

from __future__ import annotations

import importlib
from contextlib import suppress

from fastpeft import ops
from fastpeft._when_imported import when_imported
from fastpeft.methods import (
    FFN,
    IA3,
    AdaptionPrompt,
    Attention,
    Excitor,
    Frozen,
    Full,
    LayerNorm,
    LoRA,
    MMAdapter,
    Prefix,
    PTv2,
    RepAdapter,
)
from fastpeft.ops._savings import without
from fastpeft.optimize import Report, optimize, restore
from fastpeft.plan import Plan, adapt, build, count

__version__ = "0.1.0"

# what a model alone does not need is loaded on first use
_LATER = {
    "save_adapter": "fastpeft.checkpoints",
    "load_adapter": "fastpeft.checkpoints",
    "merge": "fastpeft.checkpoints",
    "ExcitorConfig": "fastpeft.peft",
    "estimate": "fastpeft.train.estimate",
    "Trainer": "fastpeft.train",
    "TrainConfig": "fastpeft.train",
    "MemoryBudget": "fastpeft.train.recompute",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")


def _extend_peft() -> None:
    with suppress(ImportError):  # too old a peft: `import fastpeft.peft` says so
        importlib.import_module("fastpeft.peft")


when_imported("peft", _extend_peft)

__all__ = [
    "FFN", "IA3", "AdaptionPrompt", "Attention", "Excitor", "Frozen", "Full", "LayerNorm", "LoRA", "MMAdapter", "MemoryBudget", "PTv2",
    "Plan", "Prefix", "RepAdapter", "Report", "TrainConfig", "Trainer", "__version__", "adapt", "build", "count", "load_adapter",
    "merge", "ops", "optimize", "restore", "save_adapter", "without",
]  # fmt: skip
