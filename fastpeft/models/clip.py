"""CLIP's image encoder: its configurations by size, and where methods attach in it."""

from __future__ import annotations

from transformers import CLIPVisionConfig

from fastpeft.methods import Part

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

