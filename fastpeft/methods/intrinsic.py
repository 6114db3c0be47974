"""Treatments that add nothing and train a subset of the base: F (nothing), T (all), LayerNorm, Attention, FFN.

Source: Chen et al., "Efficiency in Focus: LayerNorm as a Catalyst for Fine-tuning Medical Visual Language Pre-trained Models",
section 3 (intrinsic parameters). LayerNorm tuning has a PEFT format (LN_TUNING); the others are saved under the base's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.methods.base import Method, Part, find, is_adapter, matches
from fastpeft.methods.peft_config import COMMON, MODULES_TO_SAVE, NEUTRAL, Refused, check_fields
from fastpeft.methods.quantized import refuse_training

# Of LN_TUNING; the tensors' names say which norms it has, and they must be all of the part's.
PEFT_FIELDS = {**COMMON, "target_modules": NEUTRAL, "exclude_modules": NEUTRAL, "modules_to_save": MODULES_TO_SAVE}


@dataclass(frozen=True)
class Frozen(Method):
    """F: nothing is trained. The part runs as in evaluation (no dropout, no drop-path) unless ``dropout`` asks otherwise, so that
    its output for an input is a constant."""

    name: ClassVar[str] = "F"
    dropout: bool = False

    def attach(self, root: nn.Module, part: Part) -> None:
        pass


class _Intrinsic(Method):
    """Trains what :meth:`trains` names, and adds nothing."""

    def attach(self, root: nn.Module, part: Part) -> None:
        found = self.trains(root, part)
        if not found:
            raise ValueError(f"{self.name} is not defined for part {part.name!r}: it has no such parameters")
        refuse_training(f"{self.name} of part {part.name!r}", found)
        for parameter in found.values():
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Full(_Intrinsic):
    """T: every parameter of the part is trained."""

    name: ClassVar[str] = "T"

    def trains(self, root: nn.Module, part: Part) -> dict[str, nn.Parameter]:
        return {name: p for name, p in root.named_parameters() if part.holds(name) and not is_adapter(name)}


@dataclass(frozen=True)
class LayerNorm(_Intrinsic):
    """Scale and shift of the part's norms are trained."""

    name: ClassVar[str] = "LayerNorm"
    peft_type: ClassVar[str] = "LN_TUNING"
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS

    def trains(self, root: nn.Module, part: Part) -> dict[str, nn.Parameter]:
        return {f"{name}.{key}": p for name, module in self.norms(root, part) for key, p in module.named_parameters(recurse=False)}

    @staticmethod
    def norms(root: nn.Module, part: Part) -> list[tuple[str, nn.Module]]:
        """Norms are told by what they hold, as RMSNorm classes differ from model to model: one vector, and maybe a bias."""
        return [
            (name, module)
            for name, module in root.named_modules()
            if "norm" in type(module).__name__.lower()
            and hasattr(module, "weight")
            and part.holds(name)
            and not matches(name, part.norms_left_out)
        ]

    def tensors(self, root: nn.Module, part: Part) -> dict[str, torch.Tensor]:
        """``base_model.model.<norm>.ln_tuning_layers.weight``: PEFT's keys."""
        halves = ((*name.rsplit(".", 1), p) for name, p in self.trains(root, part).items())
        return {f"base_model.model.{module}.ln_tuning_layers.{key}": p.detach() for module, key, p in halves}

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        return {
            "peft_type": self.peft_type,
            "task_type": part.peft_task,
            "target_modules": [name for name, _ in self.norms(root, part)],
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> LayerNorm:
        """The method that a PEFT ``adapter_config.json`` describes; ValueError for options that would change the mathematics."""
        check_fields(cls.name, cls.peft_fields, config)
        return cls()


class _Modules(_Intrinsic):
    """Trains whole modules, named by the part."""

    def targets(self, part: Part) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must name its modules")

    def trains(self, root: nn.Module, part: Part) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": p
            for name, module in find(root, self.targets(part))
            for key, p in module.named_parameters()
            if part.holds(name) and not is_adapter(key)
        }


@dataclass(frozen=True)
class Attention(_Modules):
    """Self- and cross-attention; in a post-norm (BERT) layer with the norm that belongs to its output."""

    name: ClassVar[str] = "Attention"

    def targets(self, part: Part) -> tuple[str, ...]:
        return part.attention


@dataclass(frozen=True)
class FFN(_Modules):
    """The feed-forward linears, without any norm."""

    name: ClassVar[str] = "FFN"

    def targets(self, part: Part) -> tuple[str, ...]:
        return part.ffn
