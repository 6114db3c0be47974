"""LoRA (Hu et al., 2021): y = W x + b + scaling * B A x, scaling = lora_alpha / r.

On a convolution the factors are PEFT's: A is the base's kernel with r outputs, B a 1x1 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.methods.adapted import Adapted, adapted, new_parameter
from fastpeft.methods.base import Method, Part, check_targets, find, targets_read
from fastpeft.methods.peft_config import COMMON, EXCLUDE_MODULES, MODULES_TO_SAVE, NEUTRAL, READ, WITH_PEFT, Refused, check_fields

_RUN_BY_PEFT = Refused(f"it is another method than LoRA: {WITH_PEFT}", accepted=(None, False))  # {} switches it on
_BY_LAYER = Refused("merge it with PEFT first: all layers have one r and one lora_alpha here")
_CONVERT = "convert it to plain LoRA with PEFT first (save_pretrained's path_initial_model_for_weight_conversion)"
# These start adapters without touching the base; pissa, olora, corda, loftq and lora_ga also change its weights.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")

PEFT_FIELDS = {
    **COMMON,
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"), READ),
    "exclude_modules": EXCLUDE_MODULES,
    "modules_to_save": MODULES_TO_SAVE,
    "init_lora_weights": Refused("it may have changed the base: " + _CONVERT, accepted=_STARTS),
    "bias": Refused("train with bias='none', or merge it with PEFT first", accepted=(None, "none")),
    "lora_bias": Refused(),
    "fan_in_fan_out": Refused("it is for layers such as GPT-2's Conv1D, which fastpeft does not adapt: merge it with PEFT first"),
    "layers_to_transform": Refused("list the layers' modules in target_modules instead", accepted=(None, [])),
    "layers_pattern": NEUTRAL,  # where layers_to_transform counts
    "rank_pattern": _BY_LAYER,
    "alpha_pattern": _BY_LAYER,
    "layer_replication": Refused(f"it builds a model of other layers: {WITH_PEFT}"),
    "target_parameters": Refused(),
    "trainable_token_indices": Refused(f"it trains rows of the embedding: {WITH_PEFT}"),
    "ensure_weight_tying": Refused("merge it with PEFT first: tied layers share one adapter there"),
    "alora_invocation_tokens": Refused(f"the adapter acts only after these tokens: {WITH_PEFT}"),
    "use_dora": Refused(),
    "use_qalora": Refused(),
    "qalora_group_size": NEUTRAL,  # of use_qalora
    "use_bdlora": _RUN_BY_PEFT,
    "arrow_config": _RUN_BY_PEFT,
    "kasa_config": _RUN_BY_PEFT,
    "monteclora_config": _RUN_BY_PEFT,
    "velora_config": _RUN_BY_PEFT,
    "megatron_config": Refused(f"its layers are Megatron's: {WITH_PEFT}", accepted=(None, False)),
    "megatron_core": NEUTRAL,  # where Megatron's code is found, with megatron_config
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), NEUTRAL),  # of an init_lora_weights
    "merge_weights": NEUTRAL,  # PEFT 0.2: whether eval() merged
}


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adapters.

    r: rank. lora_alpha: numerator of the scaling (MILE's code uses 32). lora_dropout: on the branch's input, training only.
    target_modules: names, name endings, or a regular expression for whole names (PEFT's rule); None: the part's own list.
    """

    name: ClassVar[str] = "LoRA"
    peft_type: ClassVar[str] = "LORA"
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS
    r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"LoRA: r must be a positive integer, not {self.r!r}")
        if not _is_number(self.lora_alpha) or not math.isfinite(self.lora_alpha):
            raise ValueError(f"LoRA: lora_alpha must be a number, not {self.lora_alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA: lora_dropout must be in [0, 1), not {self.lora_dropout!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"LoRA: use_rslora must be true or false, not {self.use_rslora!r}")
        object.__setattr__(self, "target_modules", check_targets("LoRA", self.target_modules))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def attach(self, root: nn.Module, part: Part) -> None:
        targets = self.target_modules or part.lora
        found = list(find(root, targets, (nn.Linear, nn.Conv2d)))
        if not found:
            raise ValueError(f"LoRA: no linear layer or convolution of {part.name!r} matches target_modules={targets!r}")
        for _, module in found:
            module = adapted(module)
            if isinstance(module, nn.Conv2d):
                if module.groups != 1:
                    raise ValueError("LoRA on a grouped convolution is not defined here; leave it out of target_modules")
                shape_a = (self.r, module.in_channels, *module.kernel_size)
                shape_b = (module.out_channels, self.r, 1, 1)
            else:
                shape_a, shape_b = (self.r, module.in_features), (module.out_features, self.r)
            module.lora_A, module.lora_B = new_parameter(module, *shape_a), new_parameter(module, *shape_b)
            nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B)
            module.scaling, module.lora_dropout = self.scaling, self.lora_dropout

    def equivalent(self, other: Method, part: Part) -> bool:
        if not isinstance(other, LoRA) or (self.r, self.scaling) != (other.r, other.scaling):
            return False
        mine, theirs = (m.target_modules or part.lora for m in (self, other))
        return mine == theirs or (not isinstance(mine, str) and not isinstance(theirs, str) and set(mine) == set(theirs))

    def tensors(self, root: nn.Module, part: Part) -> dict[str, torch.Tensor]:
        """``base_model.model.<module>.lora_A.weight``: PEFT's keys."""
        return {
            f"base_model.model.{name}.weight": p.detach() for name, p in root.named_parameters() if name.endswith((".lora_A", ".lora_B"))
        }

    def merge(self, root: nn.Module, part: Part, mixtures: Mapping[nn.Module, torch.Tensor]) -> bool:
        for module in root.modules():
            if isinstance(module, Adapted) and module.lora_A is not None:
                merge_lora(module)
        return True

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        targets = self.target_modules or part.lora
        return {
            "peft_type": self.peft_type,
            "task_type": part.peft_task,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "use_rslora": self.use_rslora,
            "bias": "none",
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> LoRA:
        """The method a PEFT ``adapter_config.json`` describes; ValueError for options that would change the mathematics."""
        check_fields(cls.name, cls.peft_fields, config)
        return cls(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            target_modules=targets_read(cls.name, config["target_modules"]),
            use_rslora=config.get("use_rslora") or False,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def lora_update(module: nn.Module, scaling: float) -> torch.Tensor:
    """W + scaling * B A, computed in float32 (float64 for float64) and rounded once to W's dtype."""
    acc = torch.promote_types(module.weight.dtype, torch.float32)
    A, B, weight = (p.detach().to(acc) for p in (module.lora_A, module.lora_B, module.weight))
    return (weight + scaling * (B.flatten(1) @ A.flatten(1)).view(weight.shape)).to(module.weight.dtype)


def merge_lora(module: nn.Module) -> None:
    """W += scaling * B A, rounded once; the factors are removed."""
    module.weight.copy_(lora_update(module, module.scaling))
    module.lora_A = module.lora_B = None
