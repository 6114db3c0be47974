"""Mixtures of experts in any model of transformers: what lies between an expert's two products keeps its input alone.

transformers runs the products of all experts (``use_experts_implementation``); between them it calls ``_apply_gate`` on the outputs of the
first [S, 2 N], S chosen pairs of token and expert: silu(gate) * up, in most models, of which PyTorch keeps 3 N a pair and backward needs
the 2 N that are there already. A gate is known by its code (:data:`GATES`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.autograd.graph import saved_tensors_hooks

from fastpeft import ops
from fastpeft.forms import digest
from fastpeft.fused.leaves import gelu_kind
from fastpeft.fused.mlp import SILU
from fastpeft.methods.base import has_hooks
from fastpeft.ops._autocast import first_order
from fastpeft.registry import fuses, original_class, signature_of_replaced

PLAIN = "3067a4d2bfb6"  # act(gate) * up, transformers' own
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


def has_known_gate(cls: type[nn.Module]) -> bool:
    """Whether modules of ``cls`` are experts with one of these gates."""
    return hasattr(cls, "_apply_gate") and digest(cls, "_apply_gate") in GATES


@fuses(rule=has_known_gate)
class FusedExperts:
    """transformers' own forward, whose gate keeps its input."""

    computes_parameters = False  # the products are transformers'

    @signature_of_replaced
    def forward(self, *args, **kwargs) -> Tensor:
        return super().forward(*args, **kwargs)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """[S, 2 N] -> [S, N]."""
        own, act = super()._apply_gate, getattr(self, "act_fn", None)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and gate_up.requires_grad) or not _is_constant(act):
            return own(gate_up)
        order = type(self).__mro__  # PEFT gives experts whose weights it adapts a subclass while they run
        theirs = order[order.index(FusedExperts) + 1]
        if digest(theirs, "_apply_gate") == PLAIN and (unit := _unit(act)) is not None:
            return unit(*gate_up.chunk(2, dim=-1))
        return _Recomputed.apply(own, gate_up)


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


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _Recomputed(Function):
    """``function(x)``, computed once more in backward, of x alone."""

    @staticmethod
    def forward(ctx, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # what is kept for a moment is nobody's to count or move
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(ctx.function(x), x, dy)
        return None, dx
