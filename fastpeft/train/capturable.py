"""Whether a step can be captured, and what a captured one has read of Python: a replay reads it no more, so a graph is used only while it
is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastpeft import savings
from fastpeft.fused.layers.projections import Recomputes
from fastpeft.methods.quantized import is_held
from fastpeft.models import family_of
from fastpeft.ops._private import module_hooks, step_hooks
from fastpeft.ranks import Ranks
from fastpeft.train.config import TrainConfig
from fastpeft.train.optimizer import Optimizer

SIMPLE = {bool, int, float, str}
_tables = itemgetter("_parameters", "_buffers", "_modules")
_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_for(config: TrainConfig, model: nn.Module, device: torch.device, mixed: bool, ranks: Ranks) -> str:
    """'' or why no step of a run is captured, as far as that is known before it."""
    if not config.cuda_graph:
        return "cuda_graph is off"
    if reason := why_not(model, device, budget=config.memory_budget is not None, mixed=mixed):
        return reason
    if config.cache_layers is not None:
        return "cache_layers looks up on the host what it keeps"
    if config.on_nan == "skip":
        return "on_nan=skip reads each step's loss before its update"
    return "" if ranks.alone else "gradients of several ranks travel between backward and update"


def why_not(model: nn.Module, device: torch.device, *, budget: bool = False, mixed: bool = False) -> str:
    """'' or why steps of a model as it is now cannot be captured."""
    if device.type != "cuda":
        return f"there are no CUDA graphs on {device.type}"
    if budget:
        return "memory_budget chooses by the batch what to compute again"
    if mixed:
        return "losses are told apart by data set, token by token"
    if not _is_ours(model):
        return f"what a {type(model).__name__} reads of a batch is not known"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, which keeps casts of weights"
    if torch.is_anomaly_enabled():
        return "anomaly detection looks at each step's backward"
    if any(module_hooks()):
        return "a hook on every module is registered"
    methods = (method for methods in model.fastpeft_plan.treatments.values() for method in methods)
    if foreign := next((type(method).__name__ for method in methods if not _known(type(method))), None):
        return f"what {foreign} does from step to step is not known"
    if watched := next((name for name, p in model.named_parameters() if _foreign_hooks(p)), None):
        return f"the gradient of {watched} has hooks"
    return next(filter(None, (_unfit(name or "the model", module) for name, module in model.named_modules())), "")


def why_not_updated(optimizer: Optimizer) -> str:
    """'' or why updates by an optimiser as it is now cannot be captured."""
    adamw = optimizer.adamw
    if any(step_hooks(adamw)):
        return "the optimiser has hooks"
    return "" if _known(type(adamw)) else f"what {type(adamw).__name__} does from step to step is not known"


def _is_ours(model: nn.Module) -> bool:
    try:
        return isinstance(model, family_of(model).model)
    except ValueError:
        return False


def _known(code) -> bool:
    """Whether a class or a function is of a library whose numbers stay as they are from step to step."""
    return (code.__module__ or "").partition(".")[0] in ("fastpeft", "transformers", "peft", "torch")


def _foreign_hooks(p: Tensor) -> bool:
    hooks = chain((p._backward_hooks or {}).values(), (p._post_accumulate_grad_hooks or {}).values())
    return not all(_known(getattr(hook, "func", hook)) for hook in hooks)  # ours are partial


def _unfit(name: str, module: nn.Module) -> str:
    """'' or why a graph cannot hold what a module does, or would not know that it has changed."""
    if is_held(module):
        return f"{name} is quantised"
    if getattr(module, "gradient_checkpointing", False) or (isinstance(module, Recomputes) and module.recompute):
        return f"{name} is computed again in backward"
    hooks = chain.from_iterable(table.values() for table in _hooks(vars(module)))
    if "forward" in vars(module) or not all(_known(hook if hasattr(hook, "__name__") else type(hook)) for hook in hooks):
        return f"{name} has hooks, or a forward of its own"
    known = _known(type(module)) and _known(type(module).forward)
    return "" if known else f"what {name}, a {type(module).__name__}, does from step to step is not known"


class Surroundings:
    """What the steps of a model read of Python: where its tensors lie, what its modules and configurations hold of numbers and names (a
    dropout's p, whether they train), their hooks, and PyTorch's and our switches."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, list(model.modules())
        self.attributes = [vars(module) for module in self.modules]
        configs = {id(held): held for held in map(itemgetter("config"), (d for d in self.attributes if "config" in d))}
        self.configs = [vars(held) for held in configs.values() if isinstance(held, PretrainedConfig)]

    def now(self) -> list[Any]:
        """Equal to what it was where a graph of then still holds."""
        found: list[Any] = [switches(), *map(id, map(type, self.modules))]
        for attributes in chain(self.attributes, self.configs):
            found += [value for value in attributes.values() if type(value) in SIMPLE]
        for attributes in self.attributes:
            parameters, buffers, children = _tables(attributes)
            found += map(id, children.values())
            found += map(_place, parameters.values())
            found += map(_place, buffers.values())
            found.append((sum(map(len, _hooks(attributes))), "forward" in attributes))
        return found


def _place(t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    hooks = len(t._backward_hooks or ()) + len(t._post_accumulate_grad_hooks or ()) if t.requires_grad else 0
    return t.data_ptr(), t.dtype, t.requires_grad, hooks


def switches() -> tuple:
    """Settings of the process that decide what an operator computes."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        (torch.is_autocast_enabled("cuda"), torch.is_anomaly_enabled(), torch.is_grad_enabled()),
        (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        torch.are_deterministic_algorithms_enabled(),
        sum(map(len, module_hooks())),
        savings.state(),
    )


def read_by_update(optimizer: Optimizer, masters: list[Tensor]) -> list[Any]:
    """What an update of ``masters`` reads of Python, likewise."""
    adamw = optimizer.adamw
    states = [adamw.state.get(master, {}) for master in masters]
    found: list[Any] = [id(adamw), optimizer.config.max_grad_norm, why_not_updated(optimizer)]
    found += [_place(t) for pair in optimizer.pairs for t in pair]
    for group in adamw.param_groups:
        found += [value if type(value) in SIMPLE | {tuple} else id(value) for name, value in group.items() if name != "params"]
    return found + [t.data_ptr() for state in states for t in _tensors(state)]


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor))
