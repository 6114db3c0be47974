"""What a training run can be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """Options of :class:`fastpeft.Trainer`; the defaults adapt a model, they do not pretrain one.

    steps: optimiser steps; None: ``epochs`` passes over the data. batch_size: samples per forward. gradient_accumulation: forwards per
    step, weighted by their samples, so that a step equals one on all of them together.
    learning_rate: of adapter parameters. base_learning_rate: of base parameters that are trained (T, LayerNorm, ...); None: a tenth.
    min_learning_rate: where the cosine ends. warmup: steps, or a fraction of all steps if below 1. weight_decay: on matrices only,
    not on biases, norms and IA3 vectors. max_grad_norm: 0 switches clipping off.
    dtype: "bf16" keeps the base in bfloat16; adapters, optimiser state and master copies of trained base weights stay float32.
    questions_per_image: group a batch's questions by image (see EpochSampler). save_every: checkpoint every so many steps (0: at the end).
    out: where a run leaves its files; None: nowhere. resume: go on from ``out``'s checkpoint. trace: torch.profiler trace of 3 steps.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 20
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    base_learning_rate: float | None = None
    min_learning_rate: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    dtype: str = "fp32"
    seed: int = 0
    questions_per_image: int = 1
    num_workers: int = 0
    save_every: int = 200
    out: str | None = None
    resume: bool = False
    device: str | None = None
    tensorboard: bool = False
    trace: bool = False
    progress: bool = True

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation", "questions_per_image"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, not {getattr(self, name)!r}")
        for name in ("seed", "num_workers", "save_every"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number of 0 or more, not {getattr(self, name)!r}")
        if self.steps is not None and (not _whole(self.steps) or self.steps < 1):
            raise ValueError(f"steps must be a whole number of 1 or more, not {self.steps!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        numbers = ("epochs", "learning_rate", "min_learning_rate", "warmup", "weight_decay", "max_grad_norm")
        for name in (*numbers, *(("base_learning_rate",) if self.base_learning_rate is not None else ())):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of 0 or more, not {value!r}")
        if self.epochs == 0 or self.learning_rate == 0:
            raise ValueError("epochs and learning_rate must be above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """ValueError names unknown options."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe: a YAML mapping of options (TrainConfig's, and model, plan, data, ...). ValueError names the file and the line."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options, such as 'learning_rate: 2.0e-5'")
    for name, value in content.items():
        if isinstance(value, str) and name in {f.name for f in dataclasses.fields(TrainConfig) if "float" in str(f.type)}:
            try:  # YAML reads 2e-5 as text: it wants 2.0e-5
                content[name] = float(value)
            except ValueError:
                raise ValueError(f"{path}: {name} must be a number, not {value!r}") from None
    return content
