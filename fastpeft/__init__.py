"""fastpeft: parameter-efficient fine-tuning that computes, keeps and moves only what the trainable parameters need."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

from fastpeft._when_imported import when_imported

if TYPE_CHECKING:
    from fastpeft import nn, ops
    from fastpeft.adapters import load_adapter, merge, save_adapter
    from fastpeft.cost.estimate import estimate
    from fastpeft.cost.memory_budget import MemoryBudget
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
        register_method,
    )
    from fastpeft.optimize import Report, optimize, restore
    from fastpeft.peft import ExcitorConfig
    from fastpeft.plan import Plan, adapt, build, count
    from fastpeft.runs.ask import load
    from fastpeft.savings import without
    from fastpeft.train import TrainConfig, Trainer
    from fastpeft.verify import verify

__version__ = "0.1.0"

# Everything is loaded on first use: `import fastpeft` and the command line's help import neither torch nor transformers.
_HOMES = {
    "methods": (
        *("FFN", "IA3", "AdaptionPrompt", "Attention", "Excitor", "Frozen", "Full", "LayerNorm", "LoRA", "MMAdapter"),
        *("PTv2", "Prefix", "RepAdapter", "register_method"),
    ),
    "savings": ("without",),
    "optimize": ("Report", "optimize", "restore"),
    "plan": ("Plan", "adapt", "build", "count"),
    "adapters": ("load_adapter", "merge", "save_adapter"),
    "peft": ("ExcitorConfig",),
    "train": ("TrainConfig", "Trainer"),
    "verify": ("verify",),
    "cost.estimate": ("estimate",),
    "runs.ask": ("load",),
    "cost.memory_budget": ("MemoryBudget",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_PACKAGES = ("nn", "ops")
__all__ = sorted([*_HOME, *_PACKAGES, "__version__"])


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"fastpeft.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastpeft.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """``fastpeft.optimize`` is the function, although its module has the same name: Python sets the module there after importing it."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _extend_peft() -> None:
    with suppress(ImportError):  # too old a peft: `import fastpeft.peft` says so
        importlib.import_module("fastpeft.peft")


when_imported("peft", _extend_peft)
