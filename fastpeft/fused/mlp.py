"""Feed-forward blocks on fastpeft's operators: LLaMA's gated, CLIP's, BLIP's ViT and BERT-like text."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation, SiLUActivation

from fastpeft import ops
from fastpeft.fused.norms import add_norm
from fastpeft.fused.projections import Recomputes, project, project_one
from fastpeft.methods.adapted import linear_spec
from fastpeft.methods.base import has_hooks
from fastpeft.ops._recompute import mark_recomputable
from fastpeft.registry import fuses

SILU = (nn.SiLU, SiLUActivation)


@fuses("transformers.models.llama.modeling_llama.LlamaMLP", code="5ec354412f05")
class FusedLlamaMLP(Recomputes):
    """down(silu(gate(x)) * up(x)), the activation in one pass with IA3's factor on it."""

    takes_flat_tokens = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., C]."""
        if has_hooks(self.act_fn):
            return super().forward(x)
        linears = (self.gate_proj, self.up_proj)
        gate, up = self.projected(partial(project, linears), x, linears)
        if type(self.act_fn) not in SILU:
            return self.down_proj(self.act_fn(gate) * up)
        down = linear_spec(self.down_proj)
        if down is None:
            return self.down_proj(ops.swiglu(gate, up))
        return down._replace(input_scale=None)(ops.swiglu(gate, up, down.input_scale))


@fuses("transformers.models.clip.modeling_clip.CLIPMLP", code="f36d700d254b")
class FusedCLIPMLP:
    """fc2(act(fc1(x))); what backward needs of the activation is its input alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        hidden = project_one(self.fc1, hidden_states)
        if type(self.activation_fn) is QuickGELUActivation and not has_hooks(self.activation_fn):  # h sigmoid(1.702 h)
            scaled = hidden * 1.702
            hidden = mark_recomputable(_over_1702(scaled), _over_1702, scaled)
        else:
            hidden = self.activation_fn(hidden)
        return project_one(self.fc2, hidden)


def _over_1702(scaled: Tensor) -> Tensor:
    return F.silu(scaled) * (1 / 1.702)


@fuses("transformers.models.blip.modeling_blip.BlipMLP")
class FusedBlipMLP(Recomputes):
    """fc2(gelu(fc1(x))); keeps fc1's output and neither x nor the activation."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        (hidden,) = self.projected(lambda x: (project_one(self.fc1, x),), hidden_states, (self.fc1,))
        return project_one(self.fc2, self.activation_fn(hidden))


@fuses("transformers.models.blip.modeling_blip_text.BlipTextIntermediate", code="c488880e1596")
class FusedBlipTextIntermediate(Recomputes):
    """The feed-forward's first half; keeps its linear layer's output and neither input nor activation."""

    takes_flat_tokens = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., 4 C]."""
        (hidden,) = self.projected(lambda x: (project_one(self.dense, x),), hidden_states, (self.dense,))
        return self.intermediate_act_fn(hidden)


class _AddNorm:
    """norm(dropout(dense(x)) + residual), the sum formed once, inside the norm."""

    takes_flat_tokens = True

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return add_norm(self.dropout(project_one(self.dense, hidden_states)), input_tensor, self.LayerNorm)[0]


@fuses("transformers.models.blip.modeling_blip_text.BlipTextSelfOutput")
class FusedBlipTextSelfOutput(_AddNorm):
    pass


@fuses("transformers.models.blip.modeling_blip_text.BlipTextOutput")
class FusedBlipTextOutput(_AddNorm):
    pass
