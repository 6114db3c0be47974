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
from fastpeft.methods.quantized import is_quantized, weight_of
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
        base = self.base_layer
        plain = type(base) is nn.Linear or (isinstance(base, Written) and not isinstance(base, AdaptedLinear) and is_quantized(base.weight))
        return active[0] if usual and plain and not watched(base) else None


class _LoRA(_Fused):
    def terms(self) -> Terms | None:
        """What the layer computes now; None where that is more than LoRA as published."""
        name = self._one_adapter(self.lora_A)
        if name is None or name in self.lora_variant or self.lora_bias.get(name):
            return None
        dropout, down, up = self.lora_dropout[name], self.lora_A[name], self.lora_B[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        known = isinstance(dropout, nn.Identity | nn.Dropout) and type(down) is nn.Linear and type(up) is nn.Linear
        known = known and not (watched(dropout) or watched(down) or watched(up))
        scaling, base = self.scaling[name], self.base_layer
        if not known or not isinstance(scaling, int | float):
            return None
        return Terms(Projection(weight_of(base), base.bias, down.weight, up.weight, float(scaling)), p)


class _IA3(_Fused):
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
        if type(self.model) is not Attention:  # given its own class back
            return super().forward(hidden_states=hidden_states, **kwargs)
        return self.model(hidden_states, prompted=Prompted(self.adaption_prompt, self.adaption_gate), **kwargs)


# PEFT's class -> ours; the exact type only
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: LoraLinear,
    ia3.Linear: IA3Linear,
    adaption_prompt.AdaptedAttention: AdaptedAttention,
}
ROW_WISE.update((LNTuningLayer, ModulesToSaveWrapper, DoraLinearLayer, DoraLinearVariant))
for method, fused in ((lora, _LoRA), (ia3, _IA3)):  # PEFT has these where bitsandbytes is installed
    for name in ("Linear4bit", "Linear8bitLt"):
        if (theirs := getattr(method, name, None)) is not None:
            SWAPS[theirs] = type(f"{fused.__name__[1:]}{name}", (fused, theirs), {"__doc__": "PEFT's adapter on a quantised layer."})
SWAPS[TorchaoLoraLinear] = type("LoraTorchao", (_LoRA, TorchaoLoraLinear), {"__doc__": "PEFT's LoRA on a weight of torchao's."})
