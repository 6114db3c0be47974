"""Linear layers and convolutions with LoRA and IA3.

``nn.Linear`` becomes :class:`AdaptedLinear` in place (its class changes, nothing else), so its ``weight`` and ``bias`` keep their names and
the adapter's parameters stand beside them: ``query.weight``, ``query.lora_A``, ``query.lora_B``. A quantised layer becomes a class made of
:class:`AdaptedLinear` and its own. :meth:`Adapted.remove` gives each its former class back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.base import has_hooks
from fastpeft.methods.linear_spec import LinearSpec
from fastpeft.methods.quantized import DequantizingLinear, is_quantized, plain_linear_spec, weight_of
from fastpeft.ops.lora_linear import Projection
from fastpeft.registry import (
    exchange,
    form_of_class,
    fused_class,
    give_back,
    is_fused,
    original_class,
    replaced_class,
    swap_class,
)


class Adapted:
    """LoRA (``lora_A``, ``lora_B``, ``scaling``, ``lora_dropout``) and/or IA3 (``ia3_l``, ``ia3_feedforward``), each optional."""

    takes_flat_tokens = True
    former_class: type[nn.Module]  # what the layer is without its adapters
    former_fused: bool  # whether it was fused then
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    ia3_l: nn.Parameter | None

    def adapter_fields(self) -> None:
        for name in ("lora_A", "lora_B", "ia3_l"):
            self.register_parameter(name, None)
        self.scaling, self.lora_dropout, self.ia3_feedforward = 1.0, 0.0, False

    def remove(self) -> None:
        """Remove the adapters: the layer gets its former class back."""
        for name in ("lora_A", "lora_B", "ia3_l"):
            del self._parameters[name]
        fused = self.former_fused
        for name in ("scaling", "lora_dropout", "ia3_feedforward", "former_fused"):
            delattr(self, name)
        swap_class(self, type(self).former_class)
        if fused:
            exchange(self)

    @property
    def active_dropout(self) -> float:
        return self.lora_dropout if self.training else 0.0


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with LoRA and IA3; whichever is absent drops out."""

    former_class = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in]`` -> ``[..., out]``."""
        return self.linear_spec()(x)

    def linear_spec(self) -> LinearSpec:
        input_scale, output_scale = (self.ia3_l, None) if self.ia3_feedforward else (None, self.ia3_l)
        scaling = 1.0 if self.lora_A is None else self.scaling
        projection = Projection(weight_of(self), self.bias, self.lora_A, self.lora_B, scaling)
        return LinearSpec(projection, 0.0 if self.lora_A is None else self.active_dropout, input_scale, output_scale)


def linear_spec(module: nn.Module) -> LinearSpec | None:
    """What ``module`` computes, where that is known; None for a module that must be called as it is."""
    if has_hooks(module):
        return None
    if type(module) is nn.Linear:
        return plain_linear_spec(module)
    # the class's own: a wrapper such as PEFT's for modules to save hands its module's attributes on
    return module.linear_spec() if hasattr(type(module), "linear_spec") else None


class AdaptedConv2d(Adapted, nn.Conv2d):
    """A convolution with LoRA as PEFT defines it: lora_A ``[r, in, kh, kw]`` strides like the base, lora_B is ``[out, r, 1, 1]``."""

    former_class = nn.Conv2d

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


_ADAPTED: dict[type[nn.Module], type[Adapted]] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}


def adapted(module: nn.Module) -> nn.Module:
    """``module`` itself, made able to carry adapters. TypeError where its class cannot, and for a layer that is not quantised yet."""
    if isinstance(module, Adapted):
        return module
    former_fused = original_class(module) in _ADAPTED and is_fused(module)
    if former_fused:
        give_back(module)
    cls = type(module)
    if cls not in _ADAPTED:
        form = form_of_class(cls)
        if form is None or form.fused is not DequantizingLinear:
            kinds = "only nn.Linear and nn.Conv2d, and bitsandbytes' linear layers, carry LoRA or IA3"
            raise TypeError(f"cannot attach to a {cls.__name__}; {kinds}")
        if not is_quantized(module.weight):
            raise TypeError(f"cannot attach to a {cls.__name__} whose weight is not quantised: move the model to its device first")
    swap_class(module, _ADAPTED[cls] if cls in _ADAPTED else adapted_quantized(replaced_class(cls) or cls))
    module.adapter_fields()
    module.former_fused = former_fused
    return module


def adapted_quantized(theirs: type[nn.Module]) -> type[Adapted]:
    """The class with adapters of a quantised layer of class ``theirs``, made when it is first needed: its library may be absent. Without
    its adapters the layer is fused."""
    fused = fused_class(theirs)
    if fused not in _ADAPTED:
        body = {"__module__": __name__, "__doc__": f"{theirs.__name__} with LoRA and IA3.", "__reduce_ex__": _reduce_adapted}
        body |= {"former_class": fused, "plain_class": AdaptedLinear}
        _ADAPTED[fused] = type(f"Adapted{theirs.__name__}", (AdaptedLinear, fused), body)
    return _ADAPTED[fused]


def _reduce_adapted(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How a layer of a class that is made when needed is pickled: the class is made again."""
    return _new_adapted, (replaced_class(type(self).former_class),), self.__getstate__()


def _new_adapted(theirs: type[nn.Module]) -> nn.Module:
    return object.__new__(adapted_quantized(theirs))


_without_memory = ContextVar("_without_memory", default=False)


@contextmanager
def without_memory() -> Iterator[None]:
    """What is attached inside lies on the meta device: its shapes are looked at before memory is taken."""
    token = _without_memory.set(True)
    try:
        yield
    finally:
        _without_memory.reset(token)


def device_for(weight: Tensor) -> torch.device:
    """Where the parameters of an adapter beside ``weight`` lie."""
    return torch.device("meta") if _without_memory.get() else weight.device


def new_parameter(module: nn.Module, *shape: int) -> nn.Parameter:
    """An uninitialised adapter parameter on the module's device: float32 under a half-precision base, else its dtype."""
    weight = module.weight
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) or not weight.is_floating_point() else weight.dtype
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device_for(weight)))
