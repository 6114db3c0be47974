"""Mixtures of experts in any model of transformers, with PEFT's LoRA on their weights: of S chosen pairs of token and expert, the outputs
of the first product are kept, [S, 2 N], and no weight.

transformers runs the products of all experts by functions that know no model (``use_experts_implementation``), or by the model's own loop.
Between them it calls ``_apply_gate`` on the outputs of the first: silu(gate) * up, in most models. A gate is known by its code
(:data:`GATES`), and so is a loop (:data:`LOOPS`). Here the pairs are laid expert by expert, a pair's router weight multiplies the input of
the second product and not its output, and an adapter of PEFT's (``target_parameters``) multiplies tokens
(:mod:`fastpeft.ops.expert_linear`); PEFT adds it to the weights, keeps those sums, and forms their full gradients.

Where a call is none of these (:func:`why_not_here`), transformers' own forward runs, whose gate keeps its input alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward, grouped_mm_experts_forward

from fastpeft import ops
from fastpeft.forms import digest
from fastpeft.fused.layers.leaves import gelu_kind, keeping_input_alone
from fastpeft.fused.layers.mlp import SILU
from fastpeft.methods.base import has_hooks
from fastpeft.ops._common import FLOATS
from fastpeft.ops._private import is_fake, under_func
from fastpeft.ops._recompute import mark_recomputable, recipe_of
from fastpeft.ops.expert_linear import Experts, expert_linear, row_factors
from fastpeft.registry import fuses, original_class, signature_of_replaced
from fastpeft.static_shapes import sizes

PLAIN = "3067a4d2bfb6"  # act(gate) * up, transformers' own


class Clamped(NamedTuple):
    """How experts say what :func:`fastpeft.ops.clamped_swiglu` takes: the attributes that hold its limit and its alpha (None: 1)."""

    limit: str
    alpha: str | None = None
    one: float = 0.0
    interleaved: bool = False
    acts: bool = False  # whether the activation is act_fn's, which has to be SiLU


# Digests (fastpeft.forms.digest of _apply_gate), each with a class that has it: what a gate gives depends on its input and on numbers.
GATES = {
    PLAIN: "mixtral.modeling_mixtral.MixtralExperts",
    "35b6a0f5379b": "glm5_next.modeling_glm5_next.Glm5NextTextExperts",
    "dac05e397733": "beam.modeling_beam.BeamExperts",
    "f9c7b224fd21": "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts",
    "d2cbd8637eb8": "gpt_oss.modeling_gpt_oss.GptOssExperts",
    "fc1521659ee5": "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts",
    "cb5103a6d051": "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts",
}
CLAMPED = {
    "35b6a0f5379b": Clamped("swiglu_limit"),
    "f9c7b224fd21": Clamped("limit", acts=True),
    "d2cbd8637eb8": Clamped("limit", "alpha", 1.0, interleaved=True),
    "fc1521659ee5": Clamped("swiglu_limit", "swiglu_alpha", 1.0),
    "cb5103a6d051": Clamped("limit", "alpha", 1.0),
}


# Digests of forwards, for "eager": a loop over experts that computes what transformers' functions do.
LOOPS = {
    "d2c052bd2453": "mixtral.modeling_mixtral.MixtralExperts",
    "1fa971a82665": "mixtral.modeling_mixtral.MixtralExperts",  # to transformers 5.17
    "02814d650b5f": "gpt_oss.modeling_gpt_oss.GptOssExperts",
}
GROUPED = {"grouped_mm": grouped_mm_experts_forward, "batched_mm": batched_mm_experts_forward}
FIRST, LAST = "gate_up_proj", "down_proj"


def has_known_gate(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` are experts with one of these gates."""
    return hasattr(cls, "_apply_gate") and digest(cls, "_apply_gate") in GATES


class Branch(NamedTuple):
    """A low-rank branch on the weight [E, a, b] of all experts: ``scaling left @ right``, left [E, a, r], right [E, r, b]."""

    left: Tensor
    right: Tensor
    scaling: float


@fuses(rule=has_known_gate)
class FusedExperts:
    """Experts whose products keep no weight and whose gate keeps its input."""

    @property
    def computes_parameters(self) -> bool:
        """Whether their products are ours, as far as that is known before a call."""
        return not _why_not_such_function(self) and getattr(self, LAST).device.type == "cpu"

    @signature_of_replaced
    def forward(self, *args, **kwargs) -> Tensor:
        output = self.adapted({}, *args, **kwargs)
        return super().forward(*args, **kwargs) if output is None else output

    def adapted(self, branches: dict[str, Branch], *args, **kwargs) -> Tensor | None:
        """The experts' forward, with ``branches`` on their weights by name; None where it is not for this place."""
        if torch.compiler.is_compiling() or why_not_here(self, branches, args, kwargs):
            return None
        hidden, index, weights = args
        ends = _ends(index, self.num_experts)
        return None if ends is None else self._run(branches, hidden, index, weights, ends)

    def _run(self, branches: dict[str, Branch], hidden: Tensor, index: Tensor, weights: Tensor, ends: list[int]) -> Tensor:
        """hidden [T, C]; index, weights [T, k] -> [T, C]"""
        tokens, k = index.shape
        order = index.reshape(-1).argsort(stable=True)
        rows = _rows(hidden, order // k)
        product = self._apply_gate(expert_linear(rows, ends, self._layer(FIRST, branches.get(FIRST))))
        scaled = row_factors(product, weights.reshape(-1).index_select(0, order))
        pairs = expert_linear(scaled, ends, self._layer(LAST, branches.get(LAST))._replace(bias=None))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        output = pairs.index_select(0, back).view(tokens, k, -1).sum(1)
        if (bias := _bias_of(self, LAST)) is not None:
            shares = weights.new_zeros(tokens, self.num_experts).scatter_add(1, index.long(), weights)
            output = output + shares.to(bias.dtype) @ bias
        return output.to(hidden.dtype)

    def _layer(self, name: str, branch: Branch | None) -> Experts:
        weight, turned = getattr(self, name), self.is_transposed
        weight, bias = weight.mT if turned else weight, _bias_of(self, name)
        if branch is None:
            return Experts(weight, bias)
        left, right, scaling = branch
        up, down = (right.mT, left.mT) if turned else (left, right)
        return Experts(weight, bias, down, up, scaling)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """[S, 2 N] -> [S, N]."""
        own, act = super()._apply_gate, getattr(self, "act_fn", None)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and gate_up.requires_grad) or not _is_constant(act):
            return own(gate_up)
        order = type(self).__mro__  # PEFT gives experts whose weights it adapts a subclass while they run
        theirs = order[order.index(FusedExperts) + 1]
        form = digest(theirs, "_apply_gate")
        if form == PLAIN and (unit := _unit(act)) is not None:
            return unit(*gate_up.chunk(2, dim=-1))
        if form in CLAMPED and (options := _clamped(self, CLAMPED[form], act)) is not None and gate_up.device.type == "cpu":
            return ops.clamped_swiglu(gate_up, **options)
        return keeping_input_alone(own, gate_up)


def why_not_here(module: nn.Module, branches: dict[str, Branch], args: tuple, kwargs: dict) -> str:
    """'' or why transformers' own forward runs."""
    if kwargs or len(args) != 3 or not all(isinstance(t, Tensor) for t in args):
        return "its arguments have names"
    weights, factors = _weights_of(module), [t for branch in branches.values() for t in branch[:2]]
    if weights is None:
        return "its weights are no plain parameters"
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (*args, *weights, *factors))):
        return "nothing is kept for backward"
    return _why_not_such_tensors(*args, (*weights, *factors)) or _why_not_such_function(module)


def _weights_of(module: nn.Module) -> list[nn.Parameter] | None:
    """The weights and biases of all experts; None where one is missing, sharded, or stands for something else."""
    found = [module._parameters.get(name) for name in (FIRST, LAST)]
    biases = [module._parameters.get(f"{name}_bias") for name in (FIRST, LAST)] if module.has_bias else []
    plain = all(type(p) is nn.Parameter and p.dim() == n for n, ps in ((3, found), (2, biases)) for p in ps)
    return [*found, *biases] if plain else None


def _why_not_such_tensors(hidden: Tensor, index: Tensor, weights: Tensor, others: tuple[Tensor, ...]) -> str:
    if {t.dtype for t in (hidden, *others)} != {hidden.dtype} or hidden.dtype not in FLOATS:
        return "its dtypes differ"
    if hidden.dim() != 2 or index.dim() != 2 or weights.shape != index.shape or len(index) != len(hidden) or not len(hidden):
        return "its shapes are others"
    if hidden.device.type != "cpu" or is_fake(hidden) or sizes() is not None or under_func() or torch.is_autocast_enabled("cpu"):
        return "the host does not read here how many tokens an expert has"
    return ""


def _why_not_such_function(module: nn.Module) -> str:
    if not module.has_gate or getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return "its experts have no gate, a norm behind them, or are spread over devices"
    name = module.config._experts_implementation
    if name in GROUPED:
        return "" if ALL_EXPERTS_FUNCTIONS.get(name) is GROUPED[name] else f"{name!r} was registered by someone else"
    order = type(module).__mro__
    theirs = order[order.index(FusedExperts) + 1]
    return "" if name == "eager" and digest(theirs) in LOOPS else f"its experts run by {name!r}"


def _bias_of(module: nn.Module, name: str) -> Tensor | None:
    return getattr(module, f"{name}_bias") if module.has_bias else None


def _ends(index: Tensor, experts: int) -> list[int] | None:
    """Where each expert's pairs end, laid expert by expert; None where one is of no expert here."""
    counts = torch.bincount(index.reshape(-1), minlength=experts)
    return counts.cumsum(0).tolist() if len(counts) == experts else None


def _rows(hidden: Tensor, at: Tensor) -> Tensor:
    """Rows of ``hidden``, which is kept in their place, or what it can be formed from."""
    base = hidden._base
    if recipe_of(hidden) is None and base is not None and recipe_of(base) is not None and base.numel() == hidden.numel():
        mark_recomputable(hidden, partial(_shaped, hidden.shape), base)
    return mark_recomputable(hidden.index_select(0, at), _select, hidden, at, smaller=True)


def _shaped(shape: torch.Size, base: Tensor) -> Tensor:
    return base.reshape(shape)


def _select(x: Tensor, at: Tensor) -> Tensor:
    return x.index_select(0, at)


def _is_constant(act: Callable | None) -> bool:
    """Whether what an activation gives depends on its input alone, now and in backward, and nobody watches it."""
    return not isinstance(act, nn.Module) or not (has_hooks(act) or any(True for _ in act.parameters()))


def _unit(act: Callable) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The operator that computes act(gate) * up; None where there is none."""
    if not isinstance(act, nn.Module):
        return None
    if original_class(act) in SILU:
        return ops.swiglu
    kind = gelu_kind(act)
    return None if kind is None else partial(ops.geglu, approximate=kind)


def _clamped(module: nn.Module, form: Clamped, act: Callable | None) -> dict[str, float] | None:
    """What :func:`fastpeft.ops.clamped_swiglu` takes; None where it does not compute this gate."""
    limit, alpha = getattr(module, form.limit), 1.0 if form.alpha is None else getattr(module, form.alpha)
    fits = all(isinstance(number, int | float) for number in (limit, alpha)) and limit >= 0
    if not fits or (form.acts and original_class(act) not in SILU):
        return None
    return {"limit": limit, "alpha": alpha, "one": form.one, "interleaved": form.interleaved}
