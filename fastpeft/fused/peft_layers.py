"""Fused forms of PEFT's LoRA, (IA)^3 and adaption-prompt layers: parameters under PEFT's names, another ``forward``.

Only what PEFT does most of the time is fused: one active adapter, neither merged nor disabled, a linear base (plain or quantised), no
variant (such as DoRA) and no LoRA bias. Whatever else a layer is asked for, at any call, runs PEFT's own forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.forms import digest
from fastpeft.fused.attention.llama import FusedLlamaAttention
from fastpeft.fused.layers.experts import FIRST, LAST, Branch, FusedExperts
from fastpeft.fused.stack.flatten import ROW_WISE_PATHS
from fastpeft.methods.adapted import AdaptedLinear
from fastpeft.methods.adaption_prompt import Prompted
from fastpeft.methods.base import has_hooks
from fastpeft.methods.linear_spec import LinearSpec
from fastpeft.methods.quantized import DequantizingLinear, FusedConv1D, FusedLinear, is_quantized, weight_of, why_not
from fastpeft.ops.lora_linear import Projection
from fastpeft.registry import fuses, has_form, original_class, path_of

PLAIN = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")


class _Fused:
    takes_flat_tokens = True  # apart from LoRA's variants, which fused/stack/flatten.py looks at

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in] -> [..., out]."""
        spec = None if args or kwargs else self.linear_spec()
        return super().forward(x, *args, **kwargs) if spec is None else spec(x)

    def _one_adapter(self, tensors: nn.Module) -> str | None:
        """The adapter in use, where PEFT would do nothing but use it."""
        active = [name for name in self.active_adapters if name in tensors]
        usual = not (self.disable_adapters or self.merged) and len(active) == 1 and not self._backward_hooks
        return active[0] if usual and not _unfit_base(self.base_layer) else None


def _unfit_base(base: nn.Module) -> str:
    """'' or why what an adapter stands on must be called as it is."""
    if has_hooks(base):
        return "its base layer has hooks, or a forward of its own"
    if path_of(type(base)) in PLAIN or isinstance(base, FusedLinear | FusedConv1D):
        return why_not(base) if is_quantized(base.weight) else ""
    if isinstance(base, DequantizingLinear) and not isinstance(base, AdaptedLinear):
        return "" if is_quantized(base.weight) else "its base layer's weight is not quantised yet"
    return f"its base layer, {type(base).__name__}, has no fused form"


@fuses(
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
)
class FusedLoRALinear(_Fused):
    """PEFT's LoRA on a linear layer, plain or quantised."""

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why PEFT's own forward runs whatever the adapter in use."""
        reasons = [_unfit_adapter(module, name) for name in module.lora_A]
        return _unfit_base(module.base_layer) or ("" if not all(reasons) else next(iter(reasons), ""))

    def linear_spec(self) -> LinearSpec | None:
        """What the layer computes now; None where that is more than LoRA as published."""
        name = self._one_adapter(self.lora_A)
        if name is None or _unfit_adapter(self, name):
            return None
        dropout, base = self.lora_dropout[name], self.base_layer
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        weights = self.lora_A[name].weight, self.lora_B[name].weight
        return LinearSpec(Projection(weight_of(base), base.bias, *weights, float(self.scaling[name])), p)


def _unfit_adapter(module: nn.Module, name: str) -> str:
    """'' or what of an adapter is more than LoRA as published."""
    if name in module.lora_variant:
        return f"PEFT computes its variant of LoRA ({type(module.lora_variant[name]).__name__})"
    if module.lora_bias.get(name):
        return "its LoRA has a bias"
    dropout, down, up = module.lora_dropout[name], module.lora_A[name], module.lora_B[name]
    if not isinstance(dropout, nn.Identity | nn.Dropout) or {original_class(down), original_class(up)} != {nn.Linear}:
        return f"its LoRA is made of {', '.join(type(m).__name__ for m in (dropout, down, up))}"
    if any(map(has_hooks, (dropout, down, up))):
        return "its LoRA has hooks, or a forward of its own"
    scaling = module.scaling[name]
    return "" if isinstance(scaling, int | float) else f"its scaling is a {type(scaling).__name__}, not a number"


@fuses("peft.tuners.ia3.layer.Linear", "peft.tuners.ia3.bnb.Linear4bit", "peft.tuners.ia3.bnb.Linear8bitLt")
class FusedIA3Linear(_Fused):
    """PEFT's (IA)^3 on a linear layer, plain or quantised."""

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why PEFT's own forward runs whatever the adapter in use."""
        return _unfit_base(module.base_layer)

    def linear_spec(self) -> LinearSpec | None:
        """What the layer computes now; None where that is more than one adapter's factor."""
        name = self._one_adapter(self.ia3_l)
        if name is None:
            return None
        factor, projection = self.ia3_l[name].flatten(), Projection(weight_of(self.base_layer), self.base_layer.bias)
        return LinearSpec(projection, input_scale=factor) if self.is_feedforward else LinearSpec(projection, output_scale=factor)


# Digests of ParamWrapper.get_delta_weight (fastpeft.forms.digest), which says how its A and B lie: W [E, a, b] += B A, or its transpose
DELTAS = ("b661b9cba186", "e6628bc10b0c")  # PEFT 0.18; 0.19 to 0.21


@fuses("peft.tuners.lora.layer.ParamWrapper")
class FusedParamWrapper:
    """PEFT's LoRA on a weight of experts (``target_parameters``), which multiplies tokens and is added to no weight. One on another weight
    of the same experts stands inside it: the outermost runs them all."""

    takes_flat_tokens = True

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why PEFT's own forward runs whatever the adapter in use."""
        if not has_form(module.get_base_layer(), FusedExperts):
            return f"its base layer, {type(module.get_base_layer()).__name__}, has no fused experts"
        return "" if digest(original_class(module), "get_delta_weight") in DELTAS else "its PEFT lays out the adapter in another way"

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [T, C], and what the experts take behind it."""
        output = self._on_tokens(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if output is None else output

    def _on_tokens(self, *args, **kwargs) -> Tensor | None:
        """None where PEFT's own forward runs."""
        if torch.compiler.is_compiling():
            return None
        layer, branches = self, {}
        while isinstance(layer, FusedParamWrapper):
            name = layer.one_adapter()
            known = name is not None and layer.parameter_name not in branches and (layer is self or not has_hooks(layer))
            if not known:
                return None
            branches[layer.parameter_name] = layer.branch(name)
            layer = layer.base_layer
        usual = isinstance(layer, FusedExperts) and branches.keys() <= {FIRST, LAST} and not has_hooks(layer)
        return layer.adapted(branches, *args, **kwargs) if usual else None

    def one_adapter(self) -> str | None:
        """The adapter in use, where PEFT would do nothing but add it to the weight."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or self.num_experts < 2:
            return None
        down, up = self.lora_A[active[0]], self.lora_B[active[0]]
        plain = {original_class(down), original_class(up)} == {nn.Linear} and not (has_hooks(down) or has_hooks(up))
        return active[0] if plain and isinstance(self.scaling[active[0]], int | float) else None

    def branch(self, name: str) -> Branch:
        """What an adapter adds to the weight."""
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        down = down.reshape(self.num_experts, -1, down.shape[-1])  # [E, r, in]
        up = up.reshape(up.shape[0], -1, self.num_experts).permute(2, 0, 1)  # [E, out, r]
        left, right = (up, down) if getattr(self, "_did_swap_in_out_features", False) else (down.mT, up.mT)
        dtype = self.get_param().dtype
        return Branch(left.to(dtype), right.to(dtype), float(self.scaling[name]))


@fuses("peft.tuners.adaption_prompt.layer.AdaptedAttention")
class FusedAdaptedAttention:
    """PEFT's adaption prompt around a LLaMA's attention, which computes both: PEFT projects the queries twice."""

    takes_flat_tokens = True

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if isinstance(module.model, FusedLlamaAttention) else f"{type(module.model).__name__} inside it stays as it is"

    def forward(self, hidden_states: Tensor, **kwargs):
        """As :class:`fastpeft.fused.attention.llama.FusedLlamaAttention`."""
        given_back = not isinstance(self.model, FusedLlamaAttention)  # restored to its own class
        own_way = kwargs.get("causal") is None and self.model.why_not_now(kwargs.get("attention_mask"), kwargs)
        if given_back or has_hooks(self.model) or own_way:
            return super().forward(hidden_states=hidden_states, **kwargs)
        return self.model(hidden_states, prompted=Prompted(self.adaption_prompt, self.adaption_gate), **kwargs)


ROW_WISE_PATHS.update(
    (
        "peft.tuners.lora.layer.Linear",
        "peft.tuners.lora.layer.ParamWrapper",  # adds to the weights of the module in it, experts say
        "peft.tuners.ia3.layer.Linear",
        "peft.tuners.ln_tuning.layer.LNTuningLayer",
        "peft.utils.other.ModulesToSaveWrapper",
        "peft.tuners.lora.dora.DoraLinearLayer",
        "peft.tuners.lora.variants.DoraLinearVariant",
    )
)
