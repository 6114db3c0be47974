"""CLIP's encoder on fastpeft's operators: the same parameters under the same names, another ``forward``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.activations import QuickGELUActivation
from transformers.models.clip import modeling_clip

from fastpeft import ops
from fastpeft.methods import Part
from fastpeft.methods.base import watched
from fastpeft.models.attend import (
    dense_mask_attention,
    forms_probabilities,
    key_value_rescale,
    project_one,
    project_together,
    rescaled,
    why_not_fused,
)
from fastpeft.models.layers import is_layer_norm
from fastpeft.ops._remade import remade

# OpenAI's ViT-B/16, L/14 and L/14@336
VISION_SIZES = {
    "B/16": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
    | {"projection_dim": 512},
    "L/14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    | {"projection_dim": 768},
}
VISION_SIZES["L/14@336"] = VISION_SIZES["L/14"] | {"image_size": 336}
VISION_SIZES["tiny"] = (
    VISION_SIZES["B/16"]
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 48}
)


def vision_config(size: str, **overrides) -> CLIPVisionConfig:
    """CLIP's image encoder at a size of VISION_SIZES; ``overrides``: fields of CLIPVisionConfig."""
    return CLIPVisionConfig(**VISION_SIZES[size] | overrides)


def vision_part(name: str = "vision", path: str = "vision", **more) -> Part:
    """CLIP's image encoder as a part of a backbone. Its misspelt norm before the layers is not one of theirs: LayerNorm leaves it out."""
    defaults = {
        "lora": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "ia3": ("k_proj", "v_proj", "fc2"),
        "ia3_feedforward": ("fc2",),
        "attention": ("self_attn",),
        "ffn": ("mlp",),
        "norms_left_out": ("pre_layrnorm",),
    }
    return Part(name, path, **defaults | more)


class Attention(modeling_clip.CLIPAttention):
    """Self-attention. Returns (output, None): probabilities are not formed unless they are asked for."""

    @staticmethod
    def unfit(module: nn.Module) -> str:
        """'' or why transformers' own attention computes something else than softmax over all keys."""
        return why_not_fused(module) or ("its is_causal was set" if module.is_causal else "")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C]; attention_mask and is_causal as transformers gives them to CLIP's text encoder."""
        dense = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)
        if not dense or self.unfit(self) or forms_probabilities(self, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        q, k, v = project_together((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (rescaled(self.q_proj, q), k, v))
        options = {"prefix": None, "rescale": key_value_rescale(self.k_proj, self.v_proj, self.num_heads)}
        options["dropout_p"] = self.dropout if self.training else 0.0
        if attention_mask is not None:
            context = dense_mask_attention(q, k, v, attention_mask, scale=self.scale, **options)
        else:
            context = ops.attention(q, k, v, causal=bool(kwargs.get("is_causal")), scale=self.scale, **options)
        return self.out_proj(context.transpose(1, 2).flatten(2)), None


class MLP(modeling_clip.CLIPMLP):
    """fc2(act(fc1(x))); what backward needs of the activation is its input alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        hidden = project_one(self.fc1, hidden_states)
        if type(self.activation_fn) is QuickGELUActivation and not watched(self.activation_fn):  # h sigmoid(1.702 h)
            scaled = hidden * 1.702
            hidden = remade(_over_1702(scaled), _over_1702, scaled)
        else:
            hidden = self.activation_fn(hidden)
        return project_one(self.fc2, hidden)


def _over_1702(scaled: Tensor) -> Tensor:
    return F.silu(scaled) * (1 / 1.702)


class EncoderLayer(modeling_clip.CLIPEncoderLayer):
    """Pre-norm layer; each residual sum is formed once."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.self_attn(self.before_attention(hidden_states), attention_mask=attention_mask, **kwargs)
        norm = self.layer_norm2
        if is_layer_norm(norm):
            x, hidden_states = ops.add_layer_norm(attended, hidden_states, norm.weight, norm.bias, norm.eps)
        else:  # someone's wrapper, such as PEFT's LN tuning
            hidden_states = attended + hidden_states
            x = norm(hidden_states)
        return hidden_states + self.mlp(x)

    def before_attention(self, hidden_states: Tensor) -> Tensor:
        """What attention sees."""
        x, adapter = self.layer_norm1(hidden_states), getattr(self, "mm_adapter", None)
        return x if adapter is None else adapter.by_token(x)

    @property
    def adapter_readers(self) -> tuple[nn.Module, ...]:
        """The projections that read what an adapter puts out."""
        return self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj


# transformers' class -> ours; the exact type only, as a subclass may mean something else
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_clip.CLIPAttention: Attention,
    modeling_clip.CLIPMLP: MLP,
    modeling_clip.CLIPEncoderLayer: EncoderLayer,
}
