"""LayerNorm and RMSNorm on fastpeft's operators, and residual sums formed inside the norm.

transformers' RMSNorms differ in where they cast and in what they multiply by. With x_hat = x rstd, statistics in float32:

| form              | y                                         | dtype of y            |
|-------------------|-------------------------------------------|-----------------------|
| LLaMA, Llama 4    | w to(x_hat, dtype of x)                   | w's and x's, promoted |
| T5, IDEFICS       | w to(x_hat, dtype of w)                   | w's                   |
| OLMo 2, Helium    | to(w x_hat, dtype of x)                   | x's                   |
| Gemma             | to((1 + w) x_hat, dtype of x), in float32 | x's                   |
| Gemma 3n and 4    | as OLMo 2, or without w                   | x's                   |
| unweighted        | to(x_hat, dtype of x)                     | x's                   |

Ours rounds once, at the end, to the same dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.base import has_hooks
from fastpeft.ops._common import accumulator
from fastpeft.ops._recompute import mark_recomputable, recipe_of
from fastpeft.registry import form_of, fuses, has_form


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
        return ""


def is_layer_norm(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``ops.layer_norm`` does with its weight, bias and eps, so that the layer around it may."""
    return has_form(module, FusedLayerNorm) and not FusedLayerNorm.why_not(module) and not has_hooks(module)


@fuses("transformers.models.cohere.modeling_cohere.CohereLayerNorm", code="088598a78555")
class FusedCohereLayerNorm:
    """LayerNorm without bias, multiplied in float32."""

    takes_flat_tokens = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        return in_own_dtype(ops.layer_norm, hidden_states, widened(self.weight, hidden_states), None, self.variance_epsilon)

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return why_not_weight(module.weight)


def in_own_dtype(norm, x: Tensor, *args) -> Tensor:
    """``norm(x, *args)`` in x's dtype, under autocast too, whose rule would widen it to the weight's."""
    if not torch.is_autocast_enabled(x.device.type):
        return norm(x, *args)
    with torch.autocast(x.device.type, enabled=False):
        return norm(x, *args)


def widened(weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` in a dtype that the operators take beside x: its own, or the accumulator's."""
    acc = accumulator(x.dtype)
    return weight if weight.dtype in (x.dtype, acc) else weight.to(acc)


def why_not_weight(weight: Tensor | None) -> str:
    """'' or why a norm's weight is none of the operators'."""
    return "" if weight is None or weight.dim() == 1 else f"its weight has {weight.dim()} dimensions; the fused form takes one"


class _RMSNorm:
    """RMSNorm with one rounding, at the end; saves its input and one number a row."""

    takes_flat_tokens = True
    eps_name = "eps"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        weight = self.factor(self, hidden_states)
        return in_own_dtype(ops.rms_norm, hidden_states, weight, getattr(self, self.eps_name))

    @staticmethod
    def factor(norm: nn.Module, x: Tensor) -> Tensor | None:
        """What x_hat is multiplied by, in x's dtype or the accumulator's; None for 1."""
        return widened(norm.weight, x)

    @staticmethod
    def keeps_dtype(norm: nn.Module, x: Tensor) -> bool:
        """Whether y has x's dtype, so that the sum before the norm may be formed in it."""
        return not torch.is_autocast_enabled(x.device.type)

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        if not isinstance(getattr(module, cls.eps_name, None), float | int):
            return f"its {cls.eps_name} is no number"
        return why_not_weight(getattr(module, "weight", None))


@fuses("transformers.models.llama.modeling_llama.LlamaRMSNorm", code="3a80c0bc46ca")
class FusedRMSNorm(_RMSNorm):
    """LLaMA's: the result has the dtype that the weight's and the input's promote to."""

    eps_name = "variance_epsilon"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        weight = self.weight
        if weight.dtype != hidden_states.dtype:
            dtype = torch.promote_types(weight.dtype, hidden_states.dtype)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        return ops.rms_norm(hidden_states, weight, getattr(self, self.eps_name))

    @staticmethod
    def keeps_dtype(norm: nn.Module, x: Tensor) -> bool:
        return norm.weight.dtype == x.dtype


@fuses("transformers.models.llama4.modeling_llama4.Llama4TextRMSNorm", code="01995af796b7")
class FusedLlama4RMSNorm(FusedRMSNorm):
    eps_name = "eps"


@fuses("transformers.models.t5.modeling_t5.T5LayerNorm", code="baa4bea5bc93")
class FusedT5RMSNorm(FusedRMSNorm):
    """T5's: the result has the weight's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        if torch.promote_types(self.weight.dtype, hidden_states.dtype) != self.weight.dtype:
            return super(_RMSNorm, self).forward(hidden_states)
        return super().forward(hidden_states)


@fuses("transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm", code="15ffe31a3211")
@fuses("transformers.models.helium.modeling_helium.HeliumRMSNorm", code="23f9715672ae")
class FusedOlmo2RMSNorm(_RMSNorm):
    """OLMo 2's: multiplied before the cast to the input's dtype."""

    eps_name = "variance_epsilon"


@fuses("transformers.models.moshi.modeling_moshi.MoshiRMSNorm", code="c0018f6ee859")
class FusedMoshiRMSNorm(_RMSNorm):
    """The same under other names."""


@fuses("transformers.models.gemma.modeling_gemma.GemmaRMSNorm", code="2a7284978981")
class FusedGemmaRMSNorm(_RMSNorm):
    """Gemma's: multiplied by 1 + weight, formed in float32."""

    @staticmethod
    def factor(norm: nn.Module, x: Tensor) -> Tensor:
        return 1.0 + norm.weight.to(accumulator(x.dtype))


@fuses("transformers.models.gemma3n.modeling_gemma3n.Gemma3nRMSNorm", code="464661835167")
class FusedGemma3nRMSNorm(_RMSNorm):
    """Gemma 3n's and 4's: with or without a weight."""

    @staticmethod
    def factor(norm: nn.Module, x: Tensor) -> Tensor | None:
        return widened(norm.weight, x) if norm.with_scale else None


@fuses("transformers.models.nanochat.modeling_nanochat.NanoChatRMSNorm", code="5f0238f06af6")
@fuses("transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4UnweightedRMSNorm", code="1ca938ff417a")
class FusedUnweightedRMSNorm(_RMSNorm):
    """Without a weight: one that is there, as in Falcon Mamba, is not read."""

    @staticmethod
    def factor(norm: nn.Module, x: Tensor) -> None:
        return None


@fuses("torch.nn.modules.normalization.RMSNorm")
class FusedTorchRMSNorm(_RMSNorm):
    """PyTorch's own, with a weight of its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        if self.weight is not None and self.weight.dtype != x.dtype:
            return super(_RMSNorm, self).forward(x)
        return ops.rms_norm(x, self.weight, self.eps)

    @staticmethod
    def keeps_dtype(norm: nn.Module, x: Tensor) -> bool:
        return norm.weight is None or norm.weight.dtype == x.dtype

    @classmethod
    def why_not(cls, module: nn.RMSNorm) -> str:
        """'' or why this one stays as it is."""
        if len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} dimensions; the fused form takes the last one"
        return super().why_not(module)

    @staticmethod
    def factor(norm: nn.Module, x: Tensor) -> Tensor | None:
        return norm.weight


def rms_norm_form(module: nn.Module) -> type[_RMSNorm] | None:
    """Which of the forms above ``module`` has; None for others, and where it must be called as it is."""
    form = form_of(module)
    is_rms = form is not None and issubclass(form.fused, _RMSNorm)
    return form.fused if is_rms and not form.fused.why_not(module) and not has_hooks(module) else None


def add_norm(branch: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual), the sum formed once, inside the norm."""
    rms = rms_norm_form(norm)
    if rms is not None and branch.dtype == residual.dtype and rms.keeps_dtype(norm, branch):
        return ops.add_rms_norm(branch, residual, rms.factor(norm, branch), getattr(norm, rms.eps_name))
    if rms is None and is_layer_norm(norm):
        return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps)
    total = branch + residual  # the norm has hooks, or is someone's wrapper, such as PEFT's LN tuning
    return norm(total), total


def norm_add(branch: Tensor, residual: Tensor, norm: nn.Module) -> Tensor:
    """residual + norm(branch). The norm keeps its branch, and what reads the residual keeps that: backward forms the sum of the two again.
    Where the residual itself would have to be formed again, the sum is kept, or each layer would form all those before it."""
    normed = norm(branch)
    total = residual + normed
    if recipe_of(normed) is None or recipe_of(residual) is not None:
        return total
    return mark_recomputable(total, torch.add, residual, normed)
