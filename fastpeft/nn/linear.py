"""Linear layer with LoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastpeft.methods.adapted import new_parameter
from fastpeft.methods.base import has_hooks
from fastpeft.methods.linear_spec import LinearSpec
from fastpeft.methods.lora import LoRA, lora_update
from fastpeft.methods.quantized import is_quantized
from fastpeft.ops.lora_linear import Projection


def on_parameters_of(linear: nn.Linear, cls: type[nn.Linear]) -> nn.Linear:
    """A module of class ``cls`` that holds the very parameters of ``linear``, in the same mode; TypeError where that computes more."""
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward and "weight" in linear._parameters
    if not plain or has_hooks(linear) or is_quantized(linear.weight):
        raise TypeError(
            f"{cls.__name__}.from_linear takes a plain nn.Linear: not a {type(linear).__name__} that is quantised, hooked or computes more"
        )
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    new.in_features, new.out_features, new.weight, new.bias = linear.in_features, linear.out_features, linear.weight, linear.bias
    return new.train(linear.training)


class LoRALinear(nn.Linear):
    """``y = x W^T + b + scaling dropout(x) A^T B^T``, scaling = lora_alpha / r (or / sqrt(r)); W and b are frozen, A and B are trained.

    x [..., in_features] -> [..., out_features]. State: ``weight`` [out, in], ``bias`` [out], ``lora_A`` [r, in], ``lora_B`` [out, r].
    r, lora_alpha, lora_dropout and use_rslora as PEFT's LoraConfig. lora_B starts at zero, so a new layer equals its base.
    ``fastpeft.optimize`` joins it with the layers beside it. ValueError for options that cannot be.

    >>> layer = LoRALinear(16, 8, r=4)
    >>> layer(torch.zeros(2, 16)).shape
    torch.Size([2, 8])
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['lora_A', 'lora_B']
    """

    takes_flat_tokens = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        method = LoRA(r, lora_alpha, lora_dropout, None, use_rslora)  # checks them
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._attach(method)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> LoRALinear:
        """The layer with LoRA, on the parameters of ``linear`` themselves, which are frozen. TypeError for a module that computes something
        else than ``nn.Linear``, such as a quantised layer or one that has an adapter."""
        method = LoRA(r, lora_alpha, lora_dropout, None, use_rslora)
        layer = on_parameters_of(linear, cls)
        layer._attach(method)
        return layer

    def _attach(self, method: LoRA) -> None:
        self.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora = method.r, method.lora_alpha, method.use_rslora
        self.scaling, self.lora_dropout, self._merged = method.scaling, method.lora_dropout, False
        self.lora_A = new_parameter(self, self.r, self.in_features)
        self.lora_B = new_parameter(self, self.out_features, self.r)
        self.reset_lora_parameters()

    def reset_parameters(self) -> None:
        """Draw the base as ``nn.Linear`` does, and the adapter as PEFT does."""
        super().reset_parameters()
        if "lora_A" in self._parameters:  # nn.Linear's constructor calls this first
            self._merged = False
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A and set B to zero: the layer computes what its base does. RuntimeError while merged."""
        if self._merged:
            raise RuntimeError("LoRALinear: the adapter is merged into the weight; call unmerge() first")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self.linear_spec()(x)

    def linear_spec(self) -> LinearSpec:
        """What the layer computes now."""
        if self._merged:
            return LinearSpec(Projection(self.weight, self.bias))
        p = self.lora_dropout if self.training else 0.0
        return LinearSpec(Projection(self.weight, self.bias, self.lora_A, self.lora_B, self.scaling), p)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the adapter, which is then not trained."""
        return self._merged

    @torch.no_grad()
    def merge(self) -> LoRALinear:
        """Add the adapter to the weight: the speed of a plain layer. Summed in float32 (float64 for float64), rounded once. A weight that
        other modules share changes there too."""
        if not self._merged:
            self.weight.copy_(lora_update(self, self.scaling))
            self._merged = True
        return self

    @torch.no_grad()
    def unmerge(self) -> LoRALinear:
        """Take the adapter out of the weight again: the base up to rounding."""
        if self._merged:
            self.weight.copy_(lora_update(self, -self.scaling))
            self._merged = False
        return self

    def to_linear(self) -> nn.Linear:
        """A plain layer that computes the same, with a weight of its own."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype)
        with torch.no_grad():
            plain.weight = nn.Parameter(self.weight.clone() if self._merged else lora_update(self, self.scaling))
            plain.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return plain.train(self.training)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """A state always holds the base beside the adapter: loaded elsewhere, a merged weight would count it twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged:
            with torch.no_grad():
                destination[prefix + "weight"] = lora_update(self, -self.scaling)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """The layer is not merged afterwards."""
        if not self.weight.is_meta:
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        more = f", r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
        return super().extra_repr() + more + ", use_rslora=True" * self.use_rslora + ", merged" * self._merged
