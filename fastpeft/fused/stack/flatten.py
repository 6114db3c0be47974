"""The check whether a stack may run on flattened tokens: [T, C] in place of [B, L, C], without padding, its last layer at labelled
positions only.

Every module in the stack then sees other shapes than in transformers, and fewer tokens. That is sound where each is row-wise (what it
returns for a token depends on that token alone) or one of ours that is told the layout. A hook, a probe, a method of PEFT's that mixes
samples or routes them (Lily, aLoRA, Poly, X-LoRA, ``adapter_names``) is neither: where there is one, the stack runs on [B, L, C].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn
from transformers import activations

from fastpeft.fused.stack.mixers import mixer_in
from fastpeft.fused.stack.row_wise import is_row_wise_code
from fastpeft.methods.base import has_hooks, sees_no_values, watched_globally
from fastpeft.registry import path_of, replaced_class

__all__ = ["ROW_WISE", "ROW_WISE_PATHS", "sees_no_values", "why_not_flat"]

TORCH_ROW_WISE = (
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.AlphaDropout, nn.Identity, nn.ModuleList, nn.ModuleDict,
    nn.Sequential, nn.ParameterList, nn.ParameterDict, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip
# Exact classes that are row-wise, and dotted paths of others, which need not be imported. A class of ours says
# ``takes_flat_tokens = True``.
ROW_WISE: set[type[nn.Module]] = set(TORCH_ROW_WISE) | {
    cls
    for cls in vars(activations).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == activations.__name__
}
ROW_WISE_PATHS: set[str] = {"transformers.pytorch_utils.Conv1D"}
_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_children_of = itemgetter("_modules")
_forward_of = attrgetter("forward")


def is_row_wise(cls: type[nn.Module]) -> bool:
    """Whether what a module of exactly this class returns for a token depends on that token alone."""
    return cls in ROW_WISE or path_of(cls) in ROW_WISE_PATHS


def why_not_flat(stack: nn.Module, *roots: nn.Module, by_code: bool = False) -> str:
    """'' or why the modules of ``roots`` (those parts of ``stack`` that would see flattened tokens) need [B, L, C] at this call.
    ``by_code``: modules of which nothing is known but their code may take part, as they see three dimensions, [1, T, C].

    Hooks and the modules' own ``forward`` are looked at in every call; what depends on classes alone is kept on ``stack``: 0.1 ms for a
    LLaMA of 32 layers, 0.7 ms with LoRA on all its linear layers.
    """
    if watched_globally():
        return "a hook on every module is registered (torch.nn.modules.module.register_module_forward_hook and its like)"
    survey = stack.__dict__.get("_fastpeft_survey")
    if survey is None or survey.stale(roots):
        survey = stack.__dict__["_fastpeft_survey"] = _Survey(roots, by_code)
    found = survey.why_not or survey.changed()
    return f"{_name_of(stack, found[0])} {found[1]}" if found else ""


def _is_known(module: nn.Module, layer: bool, by_code: bool) -> bool:
    known = is_row_wise(type(module)) or getattr(type(module), "takes_flat_tokens", False)
    return known or (by_code and is_row_wise_code(module, layer))


class _Survey:
    """The modules below ``roots`` in one list, which C compares in every call."""

    def __init__(self, roots: tuple[nn.Module, ...], by_code: bool):
        self.roots = roots
        self.modules = list(dict.fromkeys(chain.from_iterable(root.modules() for root in roots)))
        self.attributes = [module.__dict__ for module in self.modules]
        self.classes, self.children = list(map(type, self.modules)), list(self._children())
        self.kinds = list({replaced_class(cls) or cls for cls in self.classes})
        self.forwards = list(map(_forward_of, self.kinds))
        self.variants = [v for m in self.modules if isinstance(v := getattr(m, "lora_variant", None), dict)]
        layers = set(chain.from_iterable(root.children() for root in roots))
        mixers = (getattr(layer, name) for layer in layers if by_code and (name := mixer_in(layer)) is not None)
        padded = {module for mixer in mixers for module in mixer.modules()}  # see [B, L, C]
        unknown = (m for m in self.modules if m not in padded and not _is_known(m, m in layers, by_code))
        self.why_not = next(((m, f"({type(m).__name__}) is not known to treat every token by itself") for m in unknown), None)

    def _children(self) -> Iterator[nn.Module | None]:
        return chain.from_iterable(map(dict.values, map(_children_of, self.attributes)))

    def stale(self, roots: tuple[nn.Module, ...]) -> bool:
        if self.roots != roots or self.classes != list(map(type, self.modules)) or self.children != list(self._children()):
            return True
        return self.forwards != list(map(_forward_of, self.kinds))  # somebody has wrapped one

    def changed(self) -> tuple[nn.Module, str] | None:
        """(module, reason) of the first that is more than its class now."""
        if any(map(dict.__contains__, self.attributes, repeat("forward"))):
            return next((m, "has a forward of its own") for m in self.modules if "forward" in m.__dict__)
        if any(map(any, map(_hooks_of, self.attributes))):
            for module in self.modules:
                if has_hooks(module):
                    return module, "has hooks"
        if any(self.variants):
            for module in self.modules:
                variants = getattr(module, "lora_variant", None)
                odd = [cls for cls in map(type, variants.values()) if not is_row_wise(cls)] if isinstance(variants, dict) else []
                if odd:
                    return module, f"has a LoRA of its own kind ({odd.pop().__name__})"
        return None

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model surveys itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _name_of(stack: nn.Module, module: nn.Module) -> str:
    return next((name for name, child in stack.named_modules() if child is module), type(module).__name__)
