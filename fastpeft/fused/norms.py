"""LayerNorm and RMSNorm on fastpeft's operators, and residual sums formed inside the norm."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.base import has_hooks
from fastpeft.registry import fuses, has_form


@fuses("torch.nn.modules.normalization.LayerNorm")
class FusedLayerNorm:
    """LayerNorm that saves what its backward will need and nothing else; float32 statistics in every dtype."""

    takes_flat_tokens = True

    def forward(self, input: Tensor) -> Tensor:
        """input [..., C]."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps)

    @staticmethod
    def why_not(module: nn.LayerNorm) -> str:
        """'' or why this one stays as it is."""
        if len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} dimensions; the fused form takes the last one"
        return "" if module.weight is not None and module.bias is not None else "has no affine parameters"


def is_layer_norm(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``ops.layer_norm`` does with its weight, bias and eps, so that the layer around it may."""
    return has_form(module, FusedLayerNorm) and not FusedLayerNorm.why_not(module) and not has_hooks(module)


@fuses("transformers.models.llama.modeling_llama.LlamaRMSNorm", code="3a80c0bc46ca")
class FusedLlamaRMSNorm:
    """RMSNorm with one rounding, at the end; saves its input and one number a row."""

    takes_flat_tokens = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def add_norm(branch: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual), the sum formed once, inside the norm."""
    if has_form(norm, FusedLlamaRMSNorm) and not has_hooks(norm):
        return ops.add_rms_norm(branch, residual, norm.weight, norm.variance_epsilon)
    if is_layer_norm(norm):
        return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps)
    total = branch + residual  # the norm has hooks, or is someone's wrapper, such as PEFT's LN tuning
    return norm(total), total
