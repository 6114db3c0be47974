"""LLaMA-Adapter's adaption prompts, as PEFT's ADAPTION_PROMPT computes them: learnt tokens, attended to apart, behind a gate.

    y = W_o (attention(Q, K, V) + g attention(Q, P W_k^T, P W_v^T))          g starts at zero: training starts from the base model

The prompts P pass the layer's own projections; their keys are not rotated, Q is. The two softmaxes stay apart (a prefix shares one). Keys
and values of the prompts are formed once per layer, for no sample in particular, and read in place: the batch is folded into the queries'
length. PEFT adds W_o's bias, where there is one, to both terms; so does this.

Q is rotated and the prompts' keys are not, so positions tell. In a PEFT model, fused or not, they are transformers': padding on the left
counts. In a model of fastpeft.adapt they count from a sample's first token, and a padded sample is what it is alone.

Source: Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention" (ICLR 2024), section 3.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.adapted import new_parameter
from fastpeft.methods.base import Method, Part
from fastpeft.methods.peft_config import COMMON, READ, Refused, check_fields
from fastpeft.ops.prefix_attention import fold, unfold

PEFT_FIELDS = {
    **COMMON,
    "target_modules": Refused("only a LLaMA's 'self_attn' is", accepted=(None, "self_attn")),
    "adapter_len": READ,
    "adapter_layers": READ,
}


class Prompted(NamedTuple):
    """What one layer learns: ``prompt`` [n, C] (PEFT: [1, n, C]), ``gate`` [1]."""

    prompt: Tensor
    gate: Tensor


class AdaptionPromptBlock(nn.Module):
    """The parameters of one layer."""

    layout_aware = True

    def __init__(self, like: nn.Linear, tokens: int):
        super().__init__()
        self.prompt, self.gate = new_parameter(like, tokens, like.in_features), new_parameter(like, 1)
        with torch.no_grad():
            nn.init.normal_(self.prompt)
            nn.init.zeros_(self.gate)

    @property
    def prompted(self) -> Prompted:
        return Prompted(self.prompt, self.gate)


def attend_prompt(context: Tensor, q: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """context + gate * attention(q, keys, values) for context, q [B, H, M, d], rotated, and keys, values [1, H_kv, n, d]."""
    read = unfold(ops.attention(fold(q), keys, values), q.shape[0])
    return context + gate.to(read.dtype) * read


@dataclass(frozen=True)
class AdaptionPrompt(Method):
    """LLaMA-Adapter. adapter_len: prompts of a layer. adapter_layers: the topmost so many; None: 30, at most all but the lowest two, as
    the paper has it for 32."""

    name: ClassVar[str] = "AdaptionPrompt"
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS
    mergeable: ClassVar[bool] = False
    carried: ClassVar[bool] = True
    adapter_len: int = 10
    adapter_layers: int | None = None

    def __post_init__(self):
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if name == "adapter_layers" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"AdaptionPrompt: {name} must be a positive integer, not {value!r}")

    def attach(self, root: nn.Module, part: Part) -> None:
        found = [m for n, m in root.named_modules() if part.holds(n) and hasattr(m, "excitor_heads")]
        if not found:
            raise ValueError(f"AdaptionPrompt is not defined for part {part.name!r}: it needs the attention of a LLaMA")
        if (self.adapter_layers or 1) > len(found):
            raise ValueError(f"AdaptionPrompt: adapter_layers is {self.adapter_layers}, and part {part.name!r} has {len(found)} layers")
        for attention in found[-(self.adapter_layers or min(30, max(1, len(found) - 2))) :]:
            attention.adaption = AdaptionPromptBlock(attention.q_proj, self.adapter_len)

    @staticmethod
    def blocks(root: nn.Module, part: Part) -> list[tuple[str, AdaptionPromptBlock]]:
        """The blocks, by the names of their attention layers."""
        found = [(name, module) for name, module in root.named_modules() if isinstance(module, AdaptionPromptBlock) and part.holds(name)]
        return [(name.removesuffix(".adaption"), block) for name, block in found]

    def tensors(self, root: nn.Module, part: Part) -> dict[str, Tensor]:
        """``base_model.model.<attention>.adaption_prompt`` [1, n, C] and ``adaption_gate`` [1]: PEFT's keys."""
        out = {}
        for name, block in self.blocks(root, part):
            out[f"base_model.model.{name}.adaption_prompt"] = block.prompt.detach()[None]
            out[f"base_model.model.{name}.adaption_gate"] = block.gate.detach()
        return out

    def equivalent(self, other: Method, part: Part) -> bool:
        """Which layers None means depends on the model, so that the keys tell."""
        if type(self) is not type(other) or None in (self.adapter_layers, other.adapter_layers):
            return type(self) is type(other) and self.adapter_len == other.adapter_len
        return self == other

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        blocks = self.blocks(root, part)
        about = {"peft_type": self.peft_type, "task_type": part.peft_task, "target_modules": blocks[0][0].rpartition(".")[2]}
        return about | {"adapter_len": self.adapter_len, "adapter_layers": len(blocks)}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> AdaptionPrompt:
        """The method that a PEFT ``adapter_config.json`` describes; ValueError for other modules than a LLaMA's attention."""
        check_fields(cls.name, cls.peft_fields, config)
        if config["adapter_layers"] is None:
            raise ValueError("AdaptionPrompt adapter: adapter_layers is missing; it says how many layers have prompts")
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls)})
