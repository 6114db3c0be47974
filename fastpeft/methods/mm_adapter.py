"""Adapters before a layer's attention: RepAdapter, and LaVIN's MM-Adapter, two of them mixed by a sample's modality.

Source: Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models" (NeurIPS 2023), equations
2-4, and its code: Z' = Z + s (w_0 f_0(Z) + w_1 f_1(Z)), where both share the projection down, the projection up is grouped, and
w = softmax(router(t_m) / t) for the modality token t_m, read after the layer's norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.adapted import new_parameter
from fastpeft.methods.base import Method, Part, has_hooks
from fastpeft.ops.lora_linear import linear


@dataclass
class Routing:
    """Which modality's mixture each token takes: ``index`` [T], [B] or [B, M], int64, into the rows of a layer's weights [modalities, 2].

    A layer's weights depend on the modality tokens alone, as these attend to nothing else. In the pass of these tokens themselves each
    layer computes its weights and leaves them in ``weights``; the batch finds them there.
    """

    index: Tensor
    weights: dict[int, Tensor] = field(default_factory=dict)


class AdapterParameters(nn.Module):
    """The parameters of one layer: w_down [h, C], b_down [h], w_up [E, C, h / groups], b_up [E, C] with E = 2 experts, or 1 and no router;
    router_weight [2, C], router_bias [2]. ``new(*shape)`` makes each."""

    takes_flat_tokens = True

    def __init__(self, width: int, method: RepAdapter, new: Callable[..., nn.Parameter]):
        super().__init__()
        C, h, experts = width, method.h, method.experts
        if h % method.groups or C % method.groups:
            raise ValueError(f"{method.name}: groups = {method.groups} must divide h = {h} and the width {C}")
        shapes = {"w_down": (h, C), "b_down": (h,), "w_up": (experts, C, h // method.groups), "b_up": (experts, C)}
        if experts > 1:
            shapes |= {"router_weight": (experts, C), "router_bias": (experts,)}
        for name, shape in shapes.items():
            self.register_parameter(name, new(*shape))
        self.scale, self.groups, self.temperature, self.dropout = method.scale, method.groups, method.temperature, method.dropout
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the adapter as one that changes nothing."""
        for parameter in self.parameters():
            parameter.zero_()
        nn.init.xavier_uniform_(self.w_down)
        if self.routed:
            bound = self.w_down.shape[1] ** -0.5
            nn.init.kaiming_uniform_(self.router_weight, a=math.sqrt(5))
            nn.init.uniform_(self.router_bias, -bound, bound)

    @property
    def routed(self) -> bool:
        return len(self.w_up) > 1

    def weights_of(self, x: Tensor) -> Tensor:
        """The mixture [..., 2] that the router gives to x [..., C], after its norm; float32 or wider."""
        scores = linear(x, self.router_weight.to(x.dtype), self.router_bias.to(x.dtype))
        return (scores.to(torch.promote_types(x.dtype, torch.float32)) / self.temperature).softmax(-1)

    def _experts(self) -> tuple[Tensor, Tensor]:
        """w_up [2, ...] and b_up [2, ...]: one expert has a silent twin."""
        if self.routed:
            return self.w_up, self.b_up
        return tuple(torch.cat([t, torch.zeros_like(t)]) for t in (self.w_up, self.b_up))

    def _options(self) -> tuple[float, int, float]:
        return self.scale, self.groups, self.dropout if self.training else 0.0

    def by_token(self, x: Tensor) -> Tensor:
        """x [B, M, C], after its norm, every token routed by itself -> [B, M, C]."""
        weights = self.weights_of(x) if self.routed else x.new_tensor([1.0, 0.0]).expand(len(x), 2)
        return ops.mm_adapter(x, self.w_down, self.b_down, *self._experts(), weights, *self._options())


class AdapterBlock(AdapterParameters):
    """An adapter in a layer, on the device of the linear layer that reads it."""

    def __init__(self, like: nn.Linear, method: RepAdapter):
        super().__init__(like.in_features, method, partial(new_parameter, like))

    def forward(self, hidden: Tensor, norm: nn.Module, routing: Routing | None, layer: int) -> Tensor:
        """adapter(norm(hidden)) for hidden [T, C] or [B, M, C] under an RMSNorm, in one pass."""
        tokens = hidden if hidden.dim() == 3 else hidden[None]
        if not self.routed:
            weights = hidden.new_tensor([1.0, 0.0]).expand(len(tokens), 2)
        elif routing is None:
            raise ValueError("MMAdapter routes by a modality token: give modality= and modality_embeds=, as LaVIN does, or use RepAdapter")
        else:
            if layer not in routing.weights:
                routing.weights[layer] = self.weights_of(norm(hidden))
            weights = routing.weights[layer].index_select(0, routing.index.flatten()).unflatten(0, routing.index.shape)
            weights = weights if hidden.dim() == 3 else weights[None]
        branch = (self.w_down, self.b_down, *self._experts(), weights, *self._options())
        if has_hooks(norm):
            out = ops.mm_adapter(norm(tokens), *branch)
        else:
            out = ops.norm_mm_adapter(tokens, norm.weight, norm.variance_epsilon, *branch)
        return out if hidden.dim() == 3 else out[0]


@dataclass(frozen=True)
class RepAdapter(Method):
    """A plain adapter before attention, in every layer.

    h: width of the bottleneck. groups: of the projection up. scale: s. dropout: on the bottleneck, in training.
    """

    name: ClassVar[str] = "RepAdapter"
    needs_fused_attention: ClassVar[bool] = True
    merge_order: ClassVar[int] = 2
    experts: ClassVar[int] = 1
    h: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1
    temperature: float = 10.0

    def __post_init__(self):
        for name in ("h", "groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.name}: {name} must be a positive integer, not {value!r}")
        for name, fits in (("scale", lambda v: True), ("temperature", lambda v: v > 0), ("dropout", lambda v: 0 <= v < 1)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and fits(value)):
                raise ValueError(f"{self.name}: {name}={value!r} cannot be; temperature is above 0, dropout from 0 to below 1")

    def attach(self, root: nn.Module, part: Part) -> None:
        found = [m for n, m in root.named_modules() if part.holds(n) and hasattr(m, "adapter_readers")]
        if not found:
            raise ValueError(f"{self.name} is not defined for part {part.name!r}: it needs the layers of a LLaMA or of CLIP")
        for layer in found:
            layer.mm_adapter = AdapterBlock(layer.adapter_readers[0], self)

    def tensors(self, root: nn.Module, part: Part) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in root.named_parameters() if "mm_adapter" in name.split(".")}

    def merge(self, root: nn.Module, part: Part, mixtures: Mapping[nn.Module, Tensor]) -> bool:
        """False where a layer is not in ``mixtures`` and routes every token by itself: no weight can hold that."""
        layers = [m for n, m in root.named_modules() if part.holds(n) and getattr(m, "mm_adapter", None) is not None]
        foldable = [layer for layer in layers if layer in mixtures or not layer.mm_adapter.routed]
        for layer in foldable:
            merge_adapter(layer, mixtures.get(layer))
        return len(foldable) == len(layers)


@dataclass(frozen=True)
class MMAdapter(RepAdapter):
    """LaVIN's mixture of two adapters that share their projection down. temperature: t of the router's softmax.

    In a LLaMA a sample is routed by its modality token; in CLIP every token by itself.
    """

    name: ClassVar[str] = "MMAdapter"
    by_modality: ClassVar[bool] = True
    experts: ClassVar[int] = 2


def merge_adapter(layer: nn.Module, weights: Tensor | None = None) -> None:
    """Fold the layer's adapter into the projections that read it, with the mixture ``weights`` [2] of its experts (one expert needs none);
    the adapter is removed.

    W (x + s U (D x + a) + s b) = (W + s W U D) x + s W (U a + b), in float32 (float64 for float64), rounded once.
    """
    block, acc = layer.mm_adapter, torch.promote_types(layer.adapter_readers[0].weight.dtype, torch.float32)
    if weights is None:
        weights = block.w_down.new_ones(1)
    down, a, ups, biases = (t.detach().to(acc) for t in (block.w_down, block.b_down, block.w_up, block.b_up))
    weights = weights.to(acc)
    bias = block.scale * torch.einsum("e,ec->c", weights, biases)
    mixed = block.scale * torch.einsum("e,ech->ch", weights, ups)
    up = torch.block_diag(*mixed.chunk(block.groups))  # [C, h]
    for reader in layer.adapter_readers:
        weight = reader.weight.detach().to(acc)
        if reader.bias is None:
            layer.give_biases()
        reader.bias.copy_(reader.bias.detach().to(acc) + weight @ (up @ a + bias))
        reader.weight.copy_(weight + (weight @ up) @ down)
    del layer.mm_adapter
