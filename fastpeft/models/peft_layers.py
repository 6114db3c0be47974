"""PEFT's own LoRA, (IA)^3 and adaption prompts on fastpeft's operators: a PEFT model's parameters under PEFT's names, another ``forward``.

Only what PEFT does most of the time is fused: one active adapter, neither merged nor disabled, a linear base (plain or quantised), no
variant (such as DoRA) and no LoRA bias. Whatever else a layer is asked for, at any call, goes PEFT's own way.
"""

from __future__ import annotations

from peft.tuners import adaption_prompt, ia3, lora
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fastpeft.methods.adapted import AdaptedLinear, Terms
from fastpeft.methods.adaption_prompt import Prompted
from fastpeft.methods.base import watched
from fastpeft.methods.quantized import is_quantized, weight_of, why_not
from fastpeft.methods.replacement import register
from fastpeft.methods.written import Written
from fastpeft.models.flatten import ROW_WISE
from fastpeft.models.llama_layers import Attention
from fastpeft.ops.lora_linear import Projection


class _Fused:
    layout_aware = True  # apart from LoRA's variants, which models/flatten.py looks at

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in] -> [..., out]."""
        terms = None if args or kwargs else self.terms()
        return super().forward(x, *args, **kwargs) if terms is None else terms(x)

    def _one_adapter(self, tensors: nn.Module) -> str | None:
        """The adapter in use, where PEFT would do nothing but use it."""
        active = [name for name in self.active_adapters if name in tensors]
        usual = not (self.disable_adapters or self.merged) and len(active) == 1 and not self._backward_hooks
        return active[0] if usual and not _unfit_base(self.base_layer) else None


def _unfit_base(base: nn.Module) -> str:
    """'' or why what an adapter stands on must be called as it is."""
    if watched(base):
        return "its base layer has hooks, or a forward of its own"
    if type(base) is nn.Linear:
        return why_not(base) if is_quantized(base.weight) else ""
    if isinstance(base, Written) and not isinstance(base, AdaptedLinear):
        return "" if is_quantized(base.weight) else "its base layer's weight is not quantised yet"
    return f"its base layer, {type(base).__name__}, has no fused form"


class _LoRA(_Fused):
    @staticmethod
    def unfit(module: lora.LoraLayer) -> str:
        """'' or why PEFT's own forward runs whatever the adapter in use."""
        reasons = [_unfit_adapter(module, name) for name in module.lora_A]
        return _unfit_base(module.base_layer) or ("" if not all(reasons) else next(iter(reasons), ""))

    def terms(self) -> Terms | None:
        """What the layer computes now; None where that is more than LoRA as published."""
        name = self._one_adapter(self.lora_A)
        if name is None or _unfit_adapter(self, name):
            return None
        dropout, base = self.lora_dropout[name], self.base_layer
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        weights = self.lora_A[name].weight, self.lora_B[name].weight
        return Terms(Projection(weight_of(base), base.bias, *weights, float(self.scaling[name])), p)


def _unfit_adapter(module: lora.LoraLayer, name: str) -> str:
    """'' or what of an adapter is more than LoRA as published."""
    if name in module.lora_variant:
        return f"PEFT computes its variant of LoRA ({type(module.lora_variant[name]).__name__})"
    if module.lora_bias.get(name):
        return "its LoRA has a bias"
    dropout, down, up = module.lora_dropout[name], module.lora_A[name], module.lora_B[name]
    if not isinstance(dropout, nn.Identity | nn.Dropout) or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"its LoRA is made of {', '.join(type(m).__name__ for m in (dropout, down, up))}"
    if any(map(watched, (dropout, down, up))):
        return "its LoRA has hooks, or a forward of its own"
    scaling = module.scaling[name]
    return "" if isinstance(scaling, int | float) else f"its scaling is a {type(scaling).__name__}, not a number"


class _IA3(_Fused):
    @staticmethod
    def unfit(module: ia3.IA3Layer) -> str:
        """'' or why PEFT's own forward runs whatever the adapter in use."""
        return _unfit_base(module.base_layer)

    def terms(self) -> Terms | None:
        """What the layer computes now; None where that is more than one adapter's factor."""
        name = self._one_adapter(self.ia3_l)
        if name is None:
            return None
        factor, projection = self.ia3_l[name].flatten(), Projection(weight_of(self.base_layer), self.base_layer.bias)
        return Terms(projection, before=factor) if self.is_feedforward else Terms(projection, after=factor)


class LoraLinear(_LoRA, lora.Linear):
    """PEFT's LoRA on a linear layer."""


class IA3Linear(_IA3, ia3.Linear):
    """PEFT's (IA)^3 on a linear layer."""


class AdaptedAttention(adaption_prompt.AdaptedAttention):
    """PEFT's adaption prompt around a LLaMA's attention, which computes both: PEFT projects the queries twice."""

    layout_aware = True

    @staticmethod
    def unfit(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if type(module.model) is Attention else f"{type(module.model).__name__} inside it stays as it is"

    def forward(self, hidden_states: Tensor, **kwargs):
        """As :class:`fastpeft.models.llama_layers.Attention`."""
        given_back = type(self.model) is not Attention  # its own class again
        if given_back or watched(self.model) or (kwargs.get("causal") is None and self.model.why_not(kwargs.get("attention_mask"), kwargs)):
            return super().forward(hidden_states=hidden_states, **kwargs)
        return self.model(hidden_states, prompted=Prompted(self.adaption_prompt, self.adaption_gate), **kwargs)


# PEFT's class -> ours; the exact type only
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: LoraLinear,
    ia3.Linear: IA3Linear,
    adaption_prompt.AdaptedAttention: AdaptedAttention,
}
ROW_WISE.update((lora.Linear, ia3.Linear, LNTuningLayer, ModulesToSaveWrapper, DoraLinearLayer, DoraLinearVariant))
for method, fused in ((lora, _LoRA), (ia3, _IA3)):  # PEFT has these where bitsandbytes is installed
    for name in ("Linear4bit", "Linear8bitLt"):
        if (theirs := getattr(method, name, None)) is not None:
            SWAPS[theirs] = type(f"{fused.__name__[1:]}{name}", (fused, theirs), {"__doc__": "PEFT's adapter on a quantised layer."})
SWAPS[TorchaoLoraLinear] = type("LoraTorchao", (_LoRA, TorchaoLoraLinear), {"__doc__": "PEFT's LoRA on a weight of torchao's."})
register(SWAPS)
