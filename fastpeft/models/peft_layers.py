"""PEFT's own LoRA, (IA)^3 and adaption prompts on fastpeft's operators: a PEFT model's parameters under PEFT's names, another ``forward``.

Only what PEFT does most of the time is fused: one active adapter, neither merged nor disabled, a plain linear base, no variant (such as
DoRA) and no LoRA bias. Whatever else a layer is asked for, at any call, goes PEFT's own way.
"""

from __future__ import annotations

from peft.tuners import adaption_prompt, ia3, lora
from torch import Tensor, nn

from fastpeft.methods.adapted import Terms, terms_of
from fastpeft.methods.adaption_prompt import Prompted
from fastpeft.models.llama import Attention
from fastpeft.ops.lora_linear import Projection


class _Fused:
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in] -> [..., out]."""
        terms = None if args or kwargs else terms_of(self)
        return super().forward(x, *args, **kwargs) if terms is None else terms(x)

    def _one_adapter(self, tensors: nn.Module) -> str | None:
        """The adapter in use, where PEFT would do nothing but use it."""
        active = [name for name in self.active_adapters if name in tensors]
        usual = not (self.disable_adapters or self.merged) and len(active) == 1 and not self._backward_hooks
        return active[0] if usual and type(self.base_layer) is nn.Linear else None


class LoraLinear(_Fused, lora.Linear):
    """PEFT's LoRA on a linear layer."""

    def terms(self) -> Terms | None:
        """What the layer computes now; None where that is more than LoRA as published."""
        name = self._one_adapter(self.lora_A)
        if name is None or name in self.lora_variant or self.lora_bias.get(name):
            return None
        dropout, down, up = self.lora_dropout[name], self.lora_A[name], self.lora_B[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        known = isinstance(dropout, nn.Identity | nn.Dropout) and type(down) is nn.Linear and type(up) is nn.Linear
        scaling, base = self.scaling[name], self.base_layer
        if not known or not isinstance(scaling, int | float):
            return None
        return Terms(Projection(base.weight, base.bias, down.weight, up.weight, float(scaling)), p)


class IA3Linear(_Fused, ia3.Linear):
    """PEFT's (IA)^3 on a linear layer."""

    def terms(self) -> Terms | None:
        """What the layer computes now; None where that is more than one adapter's factor."""
        name = self._one_adapter(self.ia3_l)
        if name is None:
            return None
        factor, projection = self.ia3_l[name].flatten(), Projection(self.base_layer.weight, self.base_layer.bias)
        return Terms(projection, before=factor) if self.is_feedforward else Terms(projection, after=factor)


class AdaptedAttention(adaption_prompt.AdaptedAttention):
    """PEFT's adaption prompt around a LLaMA's attention, which computes both: PEFT projects the queries twice."""

    reads_layout = True

    @staticmethod
    def unfit(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if type(module.model) is Attention else f"{type(module.model).__name__} inside it stays as it is"

    def forward(self, hidden_states: Tensor, **kwargs):
        """As :class:`fastpeft.models.llama.Attention`."""
        if type(self.model) is not Attention:  # given its own class back
            return super().forward(hidden_states=hidden_states, **kwargs)
        return self.model(hidden_states, prompted=Prompted(self.adaption_prompt, self.adaption_gate), **kwargs)


# PEFT's class -> ours; the exact type only
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: LoraLinear,
    ia3.Linear: IA3Linear,
    adaption_prompt.AdaptedAttention: AdaptedAttention,
}
