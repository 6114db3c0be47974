"""(IA)^3 (Liu et al., 2022): learned vectors rescale keys, values and inner activations.

l_k and l_v multiply the outputs of the key and value projections (bias included, as in PEFT); l_ff multiplies the input of a
feed-forward module. All start at one, so a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.methods.adapted import AdaptedLinear, adapted, new_parameter
from fastpeft.methods.base import Method, Part, as_json, check_targets, find, matched, matches, targets_read
from fastpeft.methods.peft_config import COMMON, MODULES_TO_SAVE, NEUTRAL, READ, Refused, check_fields

PEFT_FIELDS = {
    **COMMON,
    "target_modules": READ,
    "feedforward_modules": READ,
    "exclude_modules": READ,
    "modules_to_save": MODULES_TO_SAVE,
    "fan_in_fan_out": Refused("it is for layers such as GPT-2's Conv1D, which fastpeft does not adapt: merge it with PEFT first"),
    "init_ia3_weights": NEUTRAL,
}


@dataclass(frozen=True)
class IA3(Method):
    """Rescaling vectors.

    target_modules / feedforward_modules: as PEFT's IA3Config; a target that also is a feed-forward module is rescaled at its
    input, any other at its output. None: the part's own lists. exclude_modules: what of the targets is left alone, named alike.
    """

    name: ClassVar[str] = "IA3"
    merge_order: ClassVar[int] = 1
    peft_type: ClassVar[str] = "IA3"
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS
    target_modules: tuple[str, ...] | str | None = None
    feedforward_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None

    def __post_init__(self):
        for field in ("target_modules", "feedforward_modules", "exclude_modules"):
            object.__setattr__(self, field, check_targets("IA3", getattr(self, field)))

    def _targets(self, part: Part):
        feedforward = part.ia3_feedforward if self.feedforward_modules is None else self.feedforward_modules
        return self.target_modules or part.ia3, feedforward

    def attach(self, root: nn.Module, part: Part) -> None:
        targets, feedforward = self._targets(part)
        left_out = self.exclude_modules or ()
        found = [(n, m) for n, m in find(root, targets, (nn.Linear,)) if part.holds(n) and not matches(n, left_out)]
        if not found:
            raise ValueError(f"IA3: no linear layer of {part.name!r} matches target_modules={targets!r}")
        for name, module in found:
            module = adapted(module)
            module.ia3_feedforward = _is_feedforward(name, feedforward)
            module.ia3_l = new_parameter(module, module.in_features if module.ia3_feedforward else module.out_features)
            nn.init.ones_(module.ia3_l)

    def equivalent(self, other: Method, part: Part) -> bool:
        if not isinstance(other, IA3):
            return False
        named = ((*m._targets(part), m.exclude_modules or ()) for m in (self, other))
        mine, theirs = ([t if isinstance(t, str) else set(t) for t in names] for names in named)
        return mine == theirs

    def tensors(self, root: nn.Module, part: Part) -> dict[str, torch.Tensor]:
        """``base_model.model.<module>.ia3_l``, ``[out, 1]`` or, on a feed-forward module, ``[1, in]``: PEFT's keys and shapes."""
        return {
            f"base_model.model.{name}.ia3_l": module.ia3_l.detach().view((1, -1) if module.ia3_feedforward else (-1, 1))
            for name, module in root.named_modules()
            if isinstance(module, AdaptedLinear) and module.ia3_l is not None and part.holds(name)
        }

    def merge(self, root: nn.Module, part: Part, mixtures: Mapping[nn.Module, torch.Tensor]) -> bool:
        for name, module in root.named_modules():
            if isinstance(module, AdaptedLinear) and module.ia3_l is not None and part.holds(name):
                merge_ia3(module)
        return True

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        targets, feedforward = map(as_json, self._targets(part))
        return {
            "peft_type": self.peft_type,
            "task_type": part.peft_task,
            "target_modules": targets,
            "feedforward_modules": feedforward,
            "exclude_modules": as_json(self.exclude_modules),
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> IA3:
        """The method a PEFT ``adapter_config.json`` describes; ValueError for options that would change the mathematics."""
        check_fields(cls.name, cls.peft_fields, config)
        feedforward = check_targets(cls.name, config.get("feedforward_modules")) or ()
        feedforward = feedforward if isinstance(feedforward, str) else tuple(sorted(feedforward))
        return cls(targets_read(cls.name, config["target_modules"]), feedforward, config.get("exclude_modules") or None)


def _is_feedforward(name: str, modules: tuple[str, ...] | str) -> bool:
    """PEFT's rule, which differs from that of target_modules: any ending of the name, within a word too."""
    return matched(modules, name, whole=True) if isinstance(modules, str) else name.endswith(tuple(modules))


def merge_ia3(module: AdaptedLinear) -> None:
    """Scale the weight's columns (feed-forward) or rows and bias, in float32 (float64 for float64), rounded once; the vector is removed."""
    acc = torch.promote_types(module.weight.dtype, torch.float32)
    l, weight = module.ia3_l.detach().to(acc), module.weight.detach().to(acc)
    module.weight.copy_(weight * l if module.ia3_feedforward else weight * l[:, None])
    if module.bias is not None and not module.ia3_feedforward:
        module.bias.copy_(module.bias.detach().to(acc) * l)
    module.ia3_l = None
