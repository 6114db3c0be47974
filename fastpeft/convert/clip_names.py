"""OpenAI's CLIP image encoder -> transformers' CLIPVisionModelWithProjection: names, shapes and the implied config.

Source: model.py of https://github.com/openai/CLIP. A file's state dict holds ``visual.*`` (a ViT) beside the text encoder's tensors, its
convolution, linear layers and projections in float16. One matrix holds the rows of query, key and value; ``proj`` is [C, D], a linear
layer's weight transposed. Heads are 64 wide, layers 4 wide inside, norms have eps 1e-5, and the activation is x sigmoid(1.702 x).
"""

from __future__ import annotations

import math
import re
from functools import partial

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from fastpeft.convert.tensors import check_tensors, common_size, count_layers, heads_of, listing

_LAYER = {  # OpenAI's name: transformers' name
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT = re.compile(
    r"(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|logit_scale|logit_bias"
    r"|input_resolution|context_length|vocab_size"
)


def is_clip(names) -> bool:
    """Whether a file with tensors of these names is OpenAI's CLIP."""
    return any(str(name).startswith("visual.") for name in names)


def clip_to_transformers(state: dict, vision_heads: int | None = None) -> tuple[CLIPVisionConfig, dict[str, Tensor], list[str]]:
    """OpenAI's state dict as CLIPVisionModelWithProjection's config and state, and notes on what was left out. Sizes come from the
    tensors' shapes; dtypes stay. ValueError names every missing, unexpected and misshapen tensor."""
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if any(name.startswith("visual.layer1.") for name in state):
        raise ValueError("a CLIP whose image encoder is a ResNet: only a ViT converts, such as ViT-L-14.pt")
    text = [name for name in state if _TEXT.fullmatch(name)]
    state = {name: tensor for name, tensor in state.items() if name not in set(text)}
    config = _config(state, vision_heads)
    check_tensors(state, _shapes(config))
    out = {f"vision_model.{new}": state[f"visual.{name}"] for name, new in _OUTSIDE.items()}
    out["visual_projection.weight"] = state["visual.proj"].T
    for i in range(config.num_hidden_layers):
        theirs, ours = f"visual.transformer.resblocks.{i}.", f"vision_model.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            out |= {f"{ours}{new}.{kind}": state[f"{theirs}{name}.{kind}"] for name, new in _LAYER.items()}
            parts = state[f"{theirs}attn.in_proj_{kind}"].chunk(3)
            out |= {f"{ours}self_attn.{letter}_proj.{kind}": part for letter, part in zip("qkv", parts)}
    return config, out, [f"left out {len(text)} tensors of the text encoder"] if text else []


def _config(state: dict[str, Tensor], vision_heads: int | None) -> CLIPVisionConfig:
    size = partial(common_size, state)
    layers = count_layers(state, r"visual\.transformer\.resblocks\.(\d+)\.", 0)
    if not layers or not is_clip(state):
        stems = listing(sorted({name.split(".")[0] for name in state})) or "nothing"
        raise ValueError(f"no CLIP of OpenAI's: no visual.transformer.resblocks.* tensors, but {stems}")
    width = size(768, ("visual.class_embedding", 0), ("visual.ln_pre.weight", 0), ("visual.ln_post.weight", 0), ("visual.conv1.weight", 0))
    patch = size(16, ("visual.conv1.weight", 2), ("visual.conv1.weight", 3))
    grid = math.isqrt(max(size(197, ("visual.positional_embedding", 0)) - 1, 1))
    inner = [(f"visual.transformer.resblocks.{i}.mlp.c_fc.{kind}", 0) for i in range(layers) for kind in ("weight", "bias")]
    dtypes = {tensor.dtype for tensor in state.values()}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=size(4 * width, *inner),
        projection_dim=size(width, ("visual.proj", 1)),
        num_hidden_layers=layers,
        num_attention_heads=heads_of(width, vision_heads, "vision_heads"),
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        architectures=["CLIPVisionModelWithProjection"],
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,  # norms are float32 where the rest is float16: no dtype loses less
    )


def _shapes(config: CLIPVisionConfig) -> dict[str, tuple[int, ...]]:
    """OpenAI's names and shapes."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((config.image_size // patch) ** 2 + 1, width),
        "visual.proj": (width, config.projection_dim),
        "visual.conv1.weight": (width, 3, patch, patch),
    }
    norms, linears = ["visual.ln_pre", "visual.ln_post"], {}
    for i in range(config.num_hidden_layers):
        block = f"visual.transformer.resblocks.{i}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        linears |= {f"{block}.attn.out_proj": (width, width), f"{block}.mlp.c_fc": (inner, width), f"{block}.mlp.c_proj": (width, inner)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes
