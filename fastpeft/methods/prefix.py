"""Prefix tuning (Li & Liang, 2021) and P-tuning v2 (Liu et al., 2021): learned keys and values before those of self-attention.

Per layer i the prefix is (P_k, P_v), each ``[H, n, d]``, shared by every sample. P-tuning v2 learns them directly, as one matrix
``[n, layers * 2 * C]``; Prefix passes n learned tokens through an MLP (Linear, Tanh, Linear) to that matrix. The MLP runs once per
step on n tokens, never per sample. The module that runs the layers (``Part.prefix_host``) holds the encoder and hands each
self-attention its pair. As in PEFT and in MILE's code, text positions start after the prefix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.methods.adapted import device_for
from fastpeft.methods.base import Method, Part
from fastpeft.methods.peft_config import COMMON, MODULES_TO_SAVE, NEUTRAL, READ, Refused, check_fields

PEFT_FIELDS = {
    **COMMON,
    **dict.fromkeys(("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"), READ),
    "num_transformer_submodules": Refused("an encoder-decoder's prefix needs a part for each of the two", accepted=(None, 1)),
    "modules_to_save": MODULES_TO_SAVE,
    **dict.fromkeys(("prefix_projection", "encoder_hidden_size"), NEUTRAL),  # what PEFT saves is projected
    "init_weights": NEUTRAL,
}
PROJECTION = "prefix_projection."  # prefix of our own keys beside PEFT's one, which holds the MLP's output only


class PrefixEncoder(nn.Module):
    """Parameters of PEFT's PrefixEncoder, names included; :meth:`forward` gives every layer's keys and values."""

    def __init__(self, tokens: int, layers: int, heads: int, head_dim: int, projection: int | None, **factory):
        super().__init__()
        self.tokens, self.layers, self.heads, self.head_dim = tokens, layers, heads, head_dim
        width, flat = heads * head_dim, layers * 2 * heads * head_dim
        if projection is None:
            self.embedding = nn.Embedding(tokens, flat, **factory)
            self.transform = None
        else:
            self.embedding = nn.Embedding(tokens, width, **factory)
            self.transform = nn.Sequential(nn.Linear(width, projection, **factory), nn.Tanh(), nn.Linear(projection, flat, **factory))

    def matrix(self) -> Tensor:
        """``[n, layers * 2 * C]``, laid out as PEFT's ``prompt_embeddings``."""
        return self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer (P_k, P_v), each ``[H, n, d]``."""
        flat = self.matrix().view(self.tokens, self.layers, 2, self.heads, self.head_dim)
        return [(layer[0], layer[1]) for layer in flat.permute(1, 2, 3, 0, 4)]


@dataclass(frozen=True)
class PTv2(Method):
    """P-tuning v2: n prefix keys and values per layer, learned directly. num_virtual_tokens: n; None is the part's own (10)."""

    name: ClassVar[str] = "PTv2"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS
    mergeable: ClassVar[bool] = False
    needs_fused_attention: ClassVar[bool] = True
    projection: ClassVar[bool] = False
    num_virtual_tokens: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.name}: {field.name} must be a positive integer, not {value!r}")

    def projection_width(self, width: int) -> int | None:
        return None

    def attach(self, root: nn.Module, part: Part) -> None:
        if part.prefix_host is None:
            raise ValueError(f"{self.name} is not defined for part {part.name!r}: it needs text self-attention")
        host = root.get_submodule(part.prefix_host)
        if not hasattr(host, "prefix_shape"):
            raise ValueError(f"{self.name} is not defined for a {type(host).__name__}: it needs self-attention that fastpeft runs itself")
        layers, heads, head_dim = host.prefix_shape
        reference = next(root.parameters())
        dtype = torch.float32 if reference.dtype in (torch.float16, torch.bfloat16) else reference.dtype
        factory = {"dtype": dtype, "device": device_for(reference)}
        host.prefix_encoder = PrefixEncoder(
            self.num_virtual_tokens or part.prefix_tokens, layers, heads, head_dim, self.projection_width(heads * head_dim), **factory
        )

    @staticmethod
    def encoder(root: nn.Module, part: Part) -> PrefixEncoder:
        return root.get_submodule(part.prefix_host).prefix_encoder

    def tensors(self, root: nn.Module, part: Part) -> dict[str, Tensor]:
        """PEFT's one key ``prompt_embeddings`` ``[n, layers * 2 * C]``; with a projection also its own weights, which PEFT drops."""
        encoder = self.encoder(root, part)
        saved = {"prompt_embeddings": encoder.matrix().detach()}
        if encoder.transform is not None:
            saved |= {PROJECTION + name: p.detach() for name, p in encoder.named_parameters()}
        return saved

    def load(self, root: nn.Module, part: Part, tensors: dict[str, Tensor]) -> None:
        encoder = self.encoder(root, part)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                parameter.copy_(tensors["prompt_embeddings" if encoder.transform is None else PROJECTION + name])

    def equivalent(self, other: Method, part: Part) -> bool:
        def told(method):
            return dataclasses.replace(method, num_virtual_tokens=method.num_virtual_tokens or part.prefix_tokens)

        return type(self) is type(other) and told(self) == told(other)

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        encoder = self.encoder(root, part)
        width = encoder.heads * encoder.head_dim
        return {
            "peft_type": self.peft_type,
            "task_type": part.peft_task,
            "num_virtual_tokens": encoder.tokens,
            "num_layers": encoder.layers,
            "num_attention_heads": encoder.heads,
            "num_transformer_submodules": 1,
            "token_dim": width,
            "encoder_hidden_size": self.projection_width(width) or width,
            "prefix_projection": self.projection,
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> PTv2:
        """PEFT saves the projection's output only, so either kind loads as direct keys and values."""
        check_fields(PTv2.name, cls.peft_fields, config)
        if config["num_virtual_tokens"] is None:
            raise ValueError("PTv2 adapter: num_virtual_tokens is missing; it says how many keys and values a layer has")
        return PTv2(num_virtual_tokens=config["num_virtual_tokens"])

    def check_config(self, root: nn.Module, part: Part, config: dict[str, Any]) -> None:
        """Also where the shape that it gives to the matrix of keys and values is not this model's."""
        super().check_config(root, part, config)
        mine = self.peft_config(root, part)
        for name in ("num_layers", "num_attention_heads", "token_dim"):
            if config.get(name) not in (None, mine[name]):
                raise ValueError(f"{name} is {config[name]!r}, and part {part.name!r} of this model has {mine[name]}")


@dataclass(frozen=True)
class Prefix(PTv2):
    """Prefix tuning: n learned tokens, projected to every layer's keys and values by an MLP of ``projection_dim`` (default: C)."""

    name: ClassVar[str] = "Prefix"
    projection: ClassVar[bool] = True
    projection_dim: int | None = None

    def projection_width(self, width: int) -> int | None:
        return self.projection_dim or width
