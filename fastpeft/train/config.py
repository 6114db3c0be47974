"""What a training run can be told."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fastpeft.ops._savings import without

DTYPES = ("fp32", "bf16")
WHOLE = dict.fromkeys(("steps", "batch_size", "gradient_accumulation", "questions_per_image"), 1)  # name -> least value
WHOLE |= dict.fromkeys(("seed", "num_workers", "save_every"), 0)
NUMBERS = ("epochs", "learning_rate", "base_learning_rate", "min_learning_rate", "warmup", "weight_decay", "max_grad_norm")
FRACTIONS = ("beta1", "beta2")
FLAGS = ("resume", "tensorboard", "trace", "progress", "feature_cache")
SWITCHES = ("quiet", "no_packing", "no_eval", "from_scratch", "no_feature_cache", "skip_bad")  # of the command line
TEXTS = ("out", "device", "memory_budget", "without", "feature_cache_dir", "feature_cache_memory", "feature_dtype")
OPTIONAL = ("steps", "base_learning_rate", *TEXTS)  # may be None


@dataclass(frozen=True)
class TrainConfig:
    """Options of :class:`fastpeft.Trainer`; the defaults adapt a model, they do not pretrain one.

    steps: optimiser steps; None: ``epochs`` passes over the data. batch_size: samples per forward. gradient_accumulation: forwards per
    step, weighted by their samples, so that a step equals one on all of them together; the last step of ``epochs`` has fewer where its
    batches run out.
    learning_rate: of adapter parameters, at its peak. base_learning_rate: of base parameters that are trained (T, LayerNorm, ...);
    None: a tenth. min_learning_rate: where the cosine ends. warmup: steps, or a fraction of all steps if below 1, of a linear rise
    from 0. weight_decay: on matrices only, not on biases, norms and IA3 vectors. max_grad_norm: 0 switches clipping off.
    dtype: "bf16" keeps the base in bfloat16; adapters, optimiser state and master copies of trained base weights stay float32.
    questions_per_image: group a batch's questions by image (see EpochSampler). save_every: checkpoint every so many steps (0: at the end).
    feature_cache: keep a frozen image encoder's features instead of computing them at every visit (where they are constants), in memory
    up to feature_cache_memory ("2GB"; None: a third of what is free) and, where feature_cache_dir names a folder, in files there, which
    later runs and other processes find by content. feature_dtype: "fp32" or "bf16", kept so; None: as computed.
    memory_budget: "6GB" (or MB, GiB, ...): compute again in backward what it takes to keep a step's weights, gradients, optimiser state and
    activations below this many bytes. without: savings to switch off, such as "remake,labelled" (see :func:`fastpeft.without`).
    out: where a run leaves its files; None: nowhere. resume: go on from ``out``'s checkpoint; without one, start afresh.
    trace: torch.profiler trace of 3 steps. ValueError names an option whose value cannot be.
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
    feature_cache: bool = True
    feature_cache_dir: str | None = None
    feature_cache_memory: str | None = None
    feature_dtype: str | None = None
    memory_budget: str | None = None
    without: str | None = None
    num_workers: int = 0
    save_every: int = 200
    out: str | None = None
    resume: bool = False
    device: str | None = None
    tensorboard: bool = False
    trace: bool = False
    progress: bool = True

    def __post_init__(self):
        for name in TEXTS:
            if isinstance(getattr(self, name), Path | torch.device):
                object.__setattr__(self, name, str(getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (wanted := _wanted(field.name, value)) and not (value is None and field.name in OPTIONAL):
                raise ValueError(f"{field.name} must be {wanted}, not {value!r}")
        if self.epochs == 0 or self.learning_rate == 0:
            raise ValueError("epochs and learning_rate must be above 0")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        for size in (self.memory_budget, self.feature_cache_memory):
            if size is not None:
                bytes_of(size)
        if self.feature_dtype not in (None, *DTYPES):
            raise ValueError(f"feature_dtype must be one of {', '.join(DTYPES)}, not {self.feature_dtype!r}")
        with without(*self.savings_off):
            pass  # it knows the names
        if self.out is None and (self.resume or self.tensorboard or self.trace):
            raise ValueError("resume, tensorboard and trace need a folder: give out")

    @property
    def savings_off(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.without or "").split(",") if name.strip())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """ValueError names unknown options."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(name) for name in values if name not in known):
            raise ValueError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)


UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def bytes_of(size: str) -> int:
    """Bytes of "6GB", "800 MB", "5.5GiB". ValueError for what is no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", size.strip().lower())
    if found is None or found[2] not in UNITS or not float(found[1]) > 0:
        raise ValueError(f"{size!r} is no size in bytes; write it as 6GB, 800MB or 5.5GiB")
    if found[2] == "" and float(found[1]) < 1000:  # nobody means 24 bytes
        raise ValueError(f"{size!r} has no unit; write it as {found[1]}GB or {found[1]}MB")
    return int(float(found[1]) * UNITS[found[2]])


def _wanted(name: str, value) -> str:
    """What the option must be, where ``value`` is something else."""
    if name in WHOLE and not (isinstance(value, int) and not isinstance(value, bool) and WHOLE[name] <= value < 2**63):
        return f"a whole number of {WHOLE[name]} or more"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in NUMBERS and not (number and 0 <= value < float("inf")):
        return "a number of 0 or more"
    if name in FRACTIONS and not (number and 0 <= value < 1):
        return "a number from 0 to below 1"
    if name in FLAGS and not isinstance(value, bool):
        return "true or false"
    if name in TEXTS and not isinstance(value, str):
        return "text"
    return f"one of {', '.join(DTYPES)}" if name == "dtype" and value not in DTYPES else ""


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that TrainConfig and DataOptions give them, from those or from the command line's (lr, no-eval, quiet)."""
    longer = {"lr": "learning_rate", "base_lr": "base_learning_rate", "min_lr": "min_learning_rate", "workers": "num_workers"}
    given = {str(name).replace("-", "_"): value for name, value in given.items()}
    given = {longer.get(name, name): value for name, value in given.items()}
    if "quiet" in given:
        given["progress"] = not given.pop("quiet")
    if "no_packing" in given:
        given["packed"] = not given.pop("no_packing")
    if isinstance(given.get("languages"), str):
        given["languages"] = given["languages"].split(",")
    return given


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe: a YAML mapping of options (TrainConfig's, and model, plan, data, ...), under their canonical names. ValueError names the
    file and the line."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options, such as 'learning_rate: 2.0e-5'")
    for name in SWITCHES:
        for written in (name, name.replace("_", "-")):
            if not isinstance(content.get(written, False), bool):
                raise ValueError(f"{path}: {written} must be true or false, not {content[written]!r}")
    content = canonical(content)
    for name in ("model", "vocab"):
        if not isinstance(content.get(name, ""), str):
            raise ValueError(f"{path}: {name} must be text, not {content[name]!r}")
    for name in (*NUMBERS, *FRACTIONS, "hold_out", "lora_alpha", "lora_dropout"):
        if isinstance(content.get(name), str):
            try:  # YAML reads 2e-5 as text: it wants 2.0e-5
                content[name] = float(content[name])
            except ValueError:
                raise ValueError(f"{path}: {name} must be a number, not {content[name]!r}") from None
    return content
