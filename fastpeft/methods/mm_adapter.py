"""Adapters before a layer's attention, or before both its halves: RepAdapter, and LaVIN's MM-Adapter, two of them mixed by a sample's
modality.

Source: Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models" (NeurIPS 2023), equations
2-4, and its code: Z' = Z + s (w_0 f_0(Z) + w_1 f_1(Z)), where both share the projection down, the projection up is grouped, and
w = softmax(router(t_m) / t) for the modality token t_m, read after the norm before the adapter.

The paper's adapters stand before attention. Its code has a second place (``adapter_type`` block, ``visual_adapter_type`` router_block):
one more adapter, with a router of its own, before the feed-forward block, after that block's norm. There t_m is read as it leaves the
layer's attention, as the official code trains; its generation reads t_m as it enters the layer, which is another number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.adapted import new_parameter
from fastpeft.methods.base import Method, Part, has_hooks
from fastpeft.ops.lora_linear import linear

ATTENTION, FEED_FORWARD = BEFORE = ("mm_adapter", "mm_adapter_mlp")  # attributes of a layer: adapters before its halves
POSITIONS = {"attn": (ATTENTION,), "block": BEFORE}


class Place(NamedTuple):
    """Where an adapter stands: the number of its layer, and one of BEFORE."""

    layer: int
    before: str


@dataclass
class Routing:
    """Which modality's mixture each token takes: ``index`` [T], [B] or [B, M], int64, into the rows of an adapter's weights
    [modalities, 2].

    An adapter's weights depend on the modality tokens alone, as these attend to nothing else. In the pass of these tokens themselves each
    adapter computes its weights and leaves them in ``weights``; the batch finds them there.
    """

    index: Tensor
    weights: dict[Place, Tensor] = field(default_factory=dict)

    def at(self, tokens: Tensor) -> Routing:
        """Of some tokens alone, their numbers int64 [T']."""
        return Routing(self.index.index_select(0, tokens), self.weights)


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
        weights = self.weights_of(x) if self.routed else _first_alone(x)
        return ops.mm_adapter(x, self.w_down, self.b_down, *self._experts(), weights, *self._options())


def _first_alone(x: Tensor) -> Tensor:
    """[B, 2], each row 1 and 0; made on the device, which is then not waited for."""
    return (1 - torch.arange(2, dtype=x.dtype, device=x.device)).expand(len(x), 2)


class AdapterBlock(AdapterParameters):
    """An adapter in a layer, on the device of the linear layer that reads it."""

    def __init__(self, like: nn.Linear, method: RepAdapter):
        super().__init__(like.in_features, method, partial(new_parameter, like))

    def forward(self, hidden: Tensor, norm: nn.Module, routing: Routing | None, place: Place) -> Tensor:
        """adapter(norm(hidden)) for hidden [T, C] or [B, M, C] under an RMSNorm, in one pass."""
        tokens = hidden if hidden.dim() == 3 else hidden[None]
        if not self.routed:
            weights = _first_alone(tokens)
        elif routing is None:
            raise ValueError("MMAdapter routes by a modality token: give modality= and modality_embeds=, as LaVIN does, or use RepAdapter")
        else:
            if place not in routing.weights:
                routing.weights[place] = self.weights_of(norm(hidden))
            weights = routing.weights[place].index_select(0, routing.index.flatten()).unflatten(0, routing.index.shape)
            weights = weights if hidden.dim() == 3 else weights[None]
        branch = (self.w_down, self.b_down, *self._experts(), weights, *self._options())
        if has_hooks(norm):
            out = ops.mm_adapter(norm(tokens), *branch)
        else:
            out = ops.norm_mm_adapter(tokens, norm.weight, norm.variance_epsilon, *branch)
        return out if hidden.dim() == 3 else out[0]


@dataclass(frozen=True)
class RepAdapter(Method):
    """A plain adapter in every layer.

    h: width of the bottleneck. groups: of the projection up. scale: s. dropout: on the bottleneck, in training. position: "attn", before
    attention, or "block", one before attention and one before the feed-forward block.
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
    position: str = "attn"

    def __post_init__(self):
        if self.position not in POSITIONS:
            raise ValueError(f"{self.name}: position must be one of {', '.join(POSITIONS)}, not {self.position!r}")
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
            for before in POSITIONS[self.position]:
                setattr(layer, before, AdapterBlock(layer.adapter_readers(before)[0], self))

    def tensors(self, root: nn.Module, part: Part) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in root.named_parameters() if not set(BEFORE).isdisjoint(name.split("."))}

    def merge(self, root: nn.Module, part: Part, mixtures: Mapping[nn.Module, Tensor]) -> bool:
        """False where an adapter is not in ``mixtures`` and routes every token by itself: no weight can hold that."""
        layers = [m for n, m in root.named_modules() if part.holds(n)]
        found = [(m, before, block) for m in layers for before in BEFORE if (block := getattr(m, before, None)) is not None]
        foldable = [one for one in found if one[2] in mixtures or not one[2].routed]
        for layer, before, block in foldable:
            merge_adapter(layer, before, mixtures.get(block))
        return len(foldable) == len(found)


@dataclass(frozen=True)
class MMAdapter(RepAdapter):
    """LaVIN's mixture of two adapters that share their projection down. temperature: t of the router's softmax.

    In a LLaMA a sample is routed by its modality token; in CLIP every token by itself.
    """

    name: ClassVar[str] = "MMAdapter"
    by_modality: ClassVar[bool] = True
    experts: ClassVar[int] = 2


def merge_adapter(layer: nn.Module, before: str, weights: Tensor | None = None) -> None:
    """Fold the adapter ``before`` (one of BEFORE) into the projections that read it, with the mixture ``weights`` [2] of its experts (one
    expert needs none); the adapter is removed.

    W (x + s U (D x + a) + s b) = (W + s W U D) x + s W (U a + b), in float32 (float64 for float64), rounded once.
    """
    block, readers = getattr(layer, before), layer.adapter_readers(before)
    acc = torch.promote_types(readers[0].weight.dtype, torch.float32)
    if weights is None:
        weights = block.w_down.new_ones(1)
    down, a, ups, biases = (t.detach().to(acc) for t in (block.w_down, block.b_down, block.w_up, block.b_up))
    weights = weights.to(acc)
    bias = block.scale * torch.einsum("e,ec->c", weights, biases)
    mixed = block.scale * torch.einsum("e,ech->ch", weights, ups)
    up = torch.block_diag(*mixed.chunk(block.groups))  # [C, h]
    for reader in readers:
        weight = reader.weight.detach().to(acc)
        if reader.bias is None:
            layer.give_biases(before)
        reader.bias.copy_(reader.bias.detach().to(acc) + weight @ (up @ a + bias))
        reader.weight.copy_(weight + (weight @ up) @ down)
    delattr(layer, before)
