"""The base's own linear layers and convolutions, able to run with what a method attached to them.

``nn.Linear`` becomes :class:`AdaptedLinear` in place (its class changes, nothing else), so its ``weight`` and ``bias`` keep
their names and the adapter's parameters stand beside them: ``query.weight``, ``query.lora_A``, ``query.lora_B``.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.base import swap_class, watched
from fastpeft.methods.quantized import is_quantized, weight_of
from fastpeft.ops.lora_linear import Projection, linear


class Adapted:
    """LoRA (``lora_A``, ``lora_B``, ``scaling``, ``lora_dropout``) and/or IA3 (``ia3_l``, ``ia3_feedforward``), each optional."""

    layout_aware = True
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    ia3_l: nn.Parameter | None

    def adapter_fields(self) -> None:
        for name in ("lora_A", "lora_B", "ia3_l"):
            self.register_parameter(name, None)
        self.scaling, self.lora_dropout, self.ia3_feedforward = 1.0, 0.0, False

    def remove(self) -> None:
        """Back to the plain PyTorch layer."""
        for name in ("lora_A", "lora_B", "ia3_l"):
            del self._parameters[name]
        for name in ("scaling", "lora_dropout", "ia3_feedforward"):
            delattr(self, name)
        swap_class(self, next(cls for cls, ours in hosts().items() if ours is type(self)))

    @property
    def active_dropout(self) -> float:
        return self.lora_dropout if self.training else 0.0


class Terms(NamedTuple):
    """What a linear layer computes, whoever adapted it: y = after * (W(before * x) + b + scaling * B A dropout(before * x))."""

    projection: Projection
    dropout_p: float = 0.0
    before: Tensor | None = None
    after: Tensor | None = None

    def without_after(self, x: Tensor) -> Tensor:
        """The output without IA3's factor on it: attention applies that factor to the query side instead (no extra tensor)."""
        x = x if self.before is None else ops.rescale(x, self.before)
        if self.projection.lora_A is None:
            return linear(x, self.projection.weight, self.projection.bias)
        return ops.lora_linear(x, *self.projection, self.dropout_p)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.without_after(x)
        return y if self.after is None else ops.rescale(y, self.after)


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with LoRA and IA3; whichever is absent drops out."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``."""
        return self.terms()(x)

    def terms(self) -> Terms:
        before, after = (self.ia3_l, None) if self.ia3_feedforward else (None, self.ia3_l)
        scaling = 1.0 if self.lora_A is None else self.scaling
        projection = Projection(weight_of(self), self.bias, self.lora_A, self.lora_B, scaling)
        return Terms(projection, 0.0 if self.lora_A is None else self.active_dropout, before, after)


def terms_of(module: nn.Module) -> Terms | None:
    """What ``module`` computes, where that is known; None for a module that must be called as it is."""
    if watched(module):
        return None
    if type(module) is nn.Linear:
        return terms_with(module)
    return module.terms() if hasattr(module, "terms") else None


def terms_with(linear: nn.Linear) -> Terms:
    """The terms of a layer without adapters."""
    return Terms(Projection(weight_of(linear), linear.bias))


class AdaptedConv2d(Adapted, nn.Conv2d):
    """A convolution with LoRA as PEFT defines it: lora_A ``[r, in, kh, kw]`` strides like the base, lora_B is ``[out, r, 1, 1]``."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, in, H, W]`` -> ``[B, out, H', W']``."""
        if self.lora_A is None:
            return super().forward(x)
        if self._is_patch_projection(x):
            return self._patches(x)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        low = F.conv2d(dropped, self.lora_A.to(x.dtype), None, self.stride, self.padding, self.dilation)
        return super().forward(x) + self.scaling * F.conv2d(low, self.lora_B.to(x.dtype))

    def _is_patch_projection(self, x: Tensor) -> bool:
        whole = all(size % k == 0 for size, k in zip(x.shape[-2:], self.kernel_size))
        plain = self.padding == (0, 0) and self.dilation == (1, 1) and self.groups == 1
        return whole and plain and tuple(self.stride) == tuple(self.kernel_size)

    def _patches(self, x: Tensor) -> Tensor:
        """Patches do not overlap, so the convolution is one linear layer over ``in * kh * kw`` pixels, and so is its LoRA."""
        (kh, kw), (height, width) = self.kernel_size, x.shape[-2:]
        rows = x.unflatten(-2, (height // kh, kh)).unflatten(-1, (width // kw, kw))  # [B, in, H', kh, W', kw]
        rows = rows.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, H', W', in * kh * kw]
        y = ops.lora_linear(
            rows,
            self.weight.flatten(1),
            self.bias,
            self.lora_A.flatten(1),
            self.lora_B.flatten(1),
            self.scaling,
            self.active_dropout,
        )
        return y.permute(0, 3, 1, 2)


HOSTS = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}


def hosts() -> dict[type[nn.Module], type[nn.Module]]:
    """A plain layer's class -> that which carries adapters; with bitsandbytes' where it is in use."""
    from fastpeft.methods import written  # they build on this module's

    if "bitsandbytes" not in sys.modules:
        return HOSTS | written.HOSTS
    from fastpeft.methods import bnb_layers

    return HOSTS | written.HOSTS | bnb_layers.HOSTS


def adapted(module: nn.Module) -> nn.Module:
    """``module`` itself, made able to carry adapters; TypeError where its type cannot."""
    if isinstance(module, Adapted):
        return module
    cls = hosts().get(type(module))
    if cls is None:
        kinds = "only nn.Linear and nn.Conv2d, and bitsandbytes' linear layers, carry LoRA or IA3"
        raise TypeError(f"cannot attach to a {type(module).__name__}; {kinds}")
    if issubclass(type(module), nn.Linear) and type(module) is not nn.Linear and not is_quantized(module.weight):
        raise TypeError(f"cannot attach to a {type(module).__name__} whose weight is not quantised: move the model to its device first")
    swap_class(module, cls)
    module.adapter_fields()
    return module


def new_parameter(module: nn.Module, *shape: int) -> nn.Parameter:
    """An uninitialised adapter parameter on the module's device: float32 under a half-precision base, else its dtype."""
    weight = module.weight
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) or not weight.is_floating_point() else weight.dtype
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))
