"""LoRA (Hu et al., 2021): y = W x + b + scaling * B A x, scaling = lora_alpha / r.

On a convolution the factors are PEFT's: A is the base's kernel with r outputs, B a 1x1 convolution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.methods.adapted import Adapted, adapted, new_parameter
from fastpeft.methods.base import Method, Part, as_json, check_layers, check_targets, find, in_layers, matched, matches, targets_read
from fastpeft.methods.peft_config import COMMON, MODULES_TO_SAVE, NEUTRAL, READ, WITH_PEFT, Refused, check_fields

_RUN_BY_PEFT = Refused(f"it is another method than LoRA: {WITH_PEFT}", accepted=(None, False))  # {} switches it on
_CONVERT = "convert it to plain LoRA with PEFT first (save_pretrained's path_initial_model_for_weight_conversion)"
# These start adapters without touching the base; pissa, olora, corda, loftq and lora_ga also change its weights.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")

PEFT_FIELDS = {
    **COMMON,
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"), READ),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"), READ),
    "modules_to_save": MODULES_TO_SAVE,
    "init_lora_weights": Refused("it may have changed the base: " + _CONVERT, accepted=_STARTS),
    "bias": Refused("train with bias='none', or merge it with PEFT first", accepted=(None, "none")),
    "lora_bias": Refused(),
    "fan_in_fan_out": Refused("it is for layers such as GPT-2's Conv1D, which fastpeft does not adapt: merge it with PEFT first"),
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
    exclude_modules: what of them is left alone, named alike. layers_to_transform: numbers of the layers that have an adapter (a target's
    whole name counts in any layer); layers_pattern: the name before the number. rank_pattern, alpha_pattern: an r or lora_alpha of their
    own for modules, by regular expressions for the ends of their names, the first that matches; a mapping, kept as pairs.
    """

    name: ClassVar[str] = "LoRA"
    peft_type: ClassVar[str] = "LORA"
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS
    r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        for field in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, field, _pairs(field, getattr(self, field)))
        for r in (self.r, *dict(self.rank_pattern).values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"LoRA: r must be a positive integer, not {r!r}")
        for alpha in (self.lora_alpha, *dict(self.alpha_pattern).values()):
            if not _is_number(alpha) or not math.isfinite(alpha):
                raise ValueError(f"LoRA: lora_alpha must be a number, not {alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA: lora_dropout must be in [0, 1), not {self.lora_dropout!r}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"LoRA: use_rslora must be true or false, not {self.use_rslora!r}")
        for field in ("target_modules", "exclude_modules"):
            object.__setattr__(self, field, check_targets("LoRA", getattr(self, field)) or None)
        object.__setattr__(self, "layers_to_transform", check_layers("LoRA", self.layers_to_transform))
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        object.__setattr__(self, "layers_pattern", tuple(p for p in check_targets("LoRA", patterns) or () if p))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("LoRA: layers_to_transform needs names in target_modules, not a regular expression, as in PEFT")

    @property
    def scaling(self) -> float:
        """Where no pattern says otherwise."""
        return self._scaling(self.r, self.lora_alpha)

    def _scaling(self, r: int, lora_alpha: float) -> float:
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def selects(self, name: str, targets: tuple[str, ...] | str) -> bool:
        """Whether the module of this name, one of ``targets``, has an adapter."""
        if self.exclude_modules and matches(name, self.exclude_modules):
            return False
        return self.layers_to_transform is None or name in targets or in_layers(name, self.layers_to_transform, self.layers_pattern)

    def attach(self, root: nn.Module, part: Part) -> None:
        targets = self.target_modules or part.lora
        found = [(n, m) for n, m in find(root, targets, (nn.Linear, nn.Conv2d)) if part.holds(n) and self.selects(n, targets)]
        if not found:
            names = ("exclude_modules", "layers_to_transform", "layers_pattern")
            more = "".join(f", {name}={value!r}" for name in names if (value := getattr(self, name)))
            raise ValueError(f"LoRA: no linear layer or convolution of {part.name!r} matches target_modules={targets!r}{more}")
        above = []
        for name, module in found:
            module = adapted(module)
            r, lora_alpha = _by_name(name, self.rank_pattern, self.r), _by_name(name, self.alpha_pattern, self.lora_alpha)
            if isinstance(module, nn.Conv2d):
                if module.groups != 1:
                    raise ValueError("LoRA on a grouped convolution is not defined here; leave it out of target_modules")
                shape_a = (r, module.in_channels, *module.kernel_size)
                shape_b = (module.out_channels, r, 1, 1)
            else:
                shape_a, shape_b = (r, module.in_features), (module.out_features, r)
            above += [r] if r > min(math.prod(shape_a[1:]), shape_b[0]) else []
            module.lora_A, module.lora_B = new_parameter(module, *shape_a), new_parameter(module, *shape_b)
            nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B)
            module.scaling, module.lora_dropout = self._scaling(r, lora_alpha), self.lora_dropout
        if 2 * len(above) > len(found):  # a slip of the keyboard, rather than a head of two classes among large layers
            counted = f"{len(above)} of {len(found)} weights of {part.name!r}"
            warnings.warn(f"LoRA: r={max(above)} is above the rank of {counted}: they train more numbers than they have", stacklevel=2)

    def equivalent(self, other: Method, part: Part) -> bool:
        return isinstance(other, LoRA) and self._meaning(part) == other._meaning(part)

    def _meaning(self, part: Part) -> tuple:
        """What two methods that compute the same on ``part`` agree in."""
        patterned = (self.lora_alpha, self.use_rslora, self.rank_pattern, self.alpha_pattern)
        size = (self.r, self.scaling, patterned if self.rank_pattern or self.alpha_pattern else None)
        named = (self.target_modules or part.lora, self.exclude_modules or ())
        layers = None if self.layers_to_transform is None else (set(self.layers_to_transform), set(self.layers_pattern))
        return (size, *(t if isinstance(t, str) else set(t) for t in named), layers)

    def tensors(self, root: nn.Module, part: Part) -> dict[str, torch.Tensor]:
        """``base_model.model.<module>.lora_A.weight``: PEFT's keys."""
        return {
            f"base_model.model.{name}.weight": p.detach()
            for name, p in root.named_parameters()
            if name.endswith((".lora_A", ".lora_B")) and part.holds(name)
        }

    def merge(self, root: nn.Module, part: Part, mixtures: Mapping[nn.Module, torch.Tensor]) -> bool:
        for name, module in root.named_modules():
            if isinstance(module, Adapted) and module.lora_A is not None and part.holds(name):
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
            "target_modules": as_json(targets),
            "exclude_modules": as_json(self.exclude_modules),
            "layers_to_transform": as_json(self.layers_to_transform),
            "layers_pattern": list(self.layers_pattern) if self.layers_pattern and self.layers_to_transform else None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
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
            exclude_modules=config.get("exclude_modules"),
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern") or (),
            rank_pattern=config.get("rank_pattern") or (),
            alpha_pattern=config.get("alpha_pattern") or (),
        )


def _pairs(field: str, pattern: Any) -> tuple[tuple[str, Any], ...]:
    """A pattern's mapping from expressions for names to numbers, as pairs; ValueError for anything else."""
    if not isinstance(pattern, Mapping | list | tuple) and pattern:
        raise ValueError(f"LoRA: {field}={pattern!r} is no mapping from names of modules to numbers")
    pairs = list(pattern.items() if isinstance(pattern, Mapping) else pattern or ())
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError(f"LoRA: {field}={pattern!r} is no mapping from names of modules to numbers")
    check_targets("LoRA", "|".join(f"(?:{expression})" for expression, _ in pairs))
    return tuple((expression, number) for expression, number in pairs)


def _by_name(name: str, pattern: tuple[tuple[str, Any], ...], other: Any) -> Any:
    """The number of the first expression that matches the end of ``name``, from a dot on (PEFT's rule); ``other`` where none does."""
    return next((number for expression, number in pattern if matched(rf"(.*\.)?({expression})$", name)), other)


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
