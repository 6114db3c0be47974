"""State dicts of MISS and BLIP VQA checkpoints <-> transformers' BlipForQuestionAnswering: names, shapes and the implied config.

Source: vit.py and med.py of https://github.com/TIMMY-CHAN/MISS and https://github.com/salesforce/BLIP. A checkpoint holds
``visual_encoder.*`` (a timm ViT), ``text_encoder.*``, ``text_decoder.*`` (BERT with cross-attention). The text names are transformers'
own; those of the vision tower differ by ``_VISION_NAMES``. Both sides tie the head to the decoder's word embedding. So a conversion
renames and never computes, but for position embeddings wanted in another size.

What a tensor cannot tell (heads, eps, dropout) is taken from that code: 64 channels a head and `miss_config`'s numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipConfig, BlipForQuestionAnswering

from fastpeft.convert.tensors import check_tensors, common_size, count_layers, heads_of, listing
from fastpeft.models.miss import miss_config

_VISION_NAMES = (  # transformers' name, checkpoint's name
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)
TIED = {  # the same tensor under two names, in both formats; transformers' files keep the second only
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
_POSITIONS = "vision_model.embeddings.position_embedding"
_PARTS = ("visual_encoder.", "text_encoder.", "text_decoder.")
_EXTRAS = (  # tensors of a checkpoint that answering a question does not need
    ("position_ids buffers", r"(^|\.)position_ids$"),
    ("momentum copies", r"^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\."),
    ("queues", r"^((image|text|idx)_queue|queue_ptr|ptr_queue)$"),
    ("pretraining heads", r"^(itm_head|vision_proj|text_proj)\.|^temp$"),
    ("poolers", r"^(text_encoder|text_decoder\.bert)\.pooler\."),
)
# PEFT's names around a base module (its prompt methods have no inner "model"), and those of its own tensors.
_WRAPPER = re.compile(r"^(visual_encoder|text_encoder|text_decoder)\.base_model\.(model\.)?")
_ADAPTER = re.compile(r"\.(lora_\w+|ia3_l|modules_to_save|prompt_encoder)(\.|$)|^text_(encoder|decoder)\.word_embeddings\.")


def blip_to_transformers(
    state: dict, image_size: int | None = 480, *, text_heads: int | None = None, vision_heads: int | None = None
) -> tuple[dict[str, Tensor], BlipConfig]:
    """A checkpoint's state dict as BlipForQuestionAnswering's (tied names included) and its config.

    Sizes come from the tensors' shapes; heads are width / 64 unless given. ``image_size`` None keeps the checkpoint's; another
    one resizes the position embeddings as BLIP's ``interpolate_pos_embed`` does. Tensors keep their dtype, uncopied.
    ValueError names every missing, unexpected, misshapen or untied tensor.
    """
    return blip_with_notes(state, image_size, text_heads, vision_heads)[:2]


def transformers_to_blip(state: dict, config: BlipConfig) -> dict[str, Tensor]:
    """BlipForQuestionAnswering's state dict under the checkpoint's names, with its tied names and position_ids."""
    state = _tie({k: v for k, v in state.items() if not k.endswith("position_ids")})
    wanted = _shapes(config)
    check_tensors(state, wanted, TIED)
    out = {_checkpoint_name(name): state[name] for name in wanted}
    for part in ("text_encoder", "text_decoder.bert"):
        out[f"{part}.embeddings.position_ids"] = torch.arange(config.text_config.max_position_embeddings)[None]
    return out


def _checkpoint_name(name: str) -> str:
    if name.startswith("vision_model."):
        for ours, theirs in _VISION_NAMES:
            name = name.replace(ours, theirs)
    return name


def _shapes(config: BlipConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes BlipForQuestionAnswering has: asked of the class itself, without memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in BlipForQuestionAnswering(config).state_dict().items()}


def blip_with_notes(
    state: dict, image_size: int | None, text_heads: int | None, vision_heads: int | None
) -> tuple[dict[str, Tensor], BlipConfig, list[str]]:
    """`blip_to_transformers`, and notes on what was left out or altered."""
    state, notes = _bare(state)
    config = _infer_config(state, text_heads, vision_heads)
    wanted, vision = _shapes(config), config.vision_config
    check_tensors(_tie(state), {_checkpoint_name(name): shape for name, shape in wanted.items()}, TIED)
    out = {name: state[_checkpoint_name(name)] for name in wanted}
    if image_size not in (None, vision.image_size):
        if image_size < 1 or image_size % vision.patch_size:
            raise ValueError(f"image_size={image_size}: use a multiple of the patch size, {vision.patch_size}")
        out[_POSITIONS] = _resize_positions(out[_POSITIONS], image_size // vision.patch_size)
        notes.append(f"position embeddings resized (bicubic) from {vision.image_size} to {image_size} pixels")
        vision.image_size = image_size
    return out, config, notes


def _bare(state: dict) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict without wrappers and known extras, and a note on each kind left out."""
    out, left = {}, Counter()
    for key, value in state.items():
        name = _WRAPPER.sub(r"\1.", str(key).removeprefix("module."))
        if _ADAPTER.search(name):
            kind = "PEFT adapter tensors (only the base weights convert)"
        elif not isinstance(value, Tensor):
            kind = "entries that are not tensors"
        else:
            kind = next((label for label, pattern in _EXTRAS if re.search(pattern, name)), None)
        if kind is None:
            out[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
        else:
            left[kind] += 1
    if not any(name.startswith(_PARTS) for name in out):
        stems = listing(sorted({str(name).split(".")[0] for name in state})) or "nothing"
        hint = "; these are transformers' names: give the folder" if "vision_model" in stems else ""
        raise ValueError(f"no MISS or BLIP VQA checkpoint: no {'*, '.join(_PARTS)}* tensors, but {stems}{hint}")
    return out, [f"left out {count} {kind}" for kind, count in left.items()]


def _infer_config(state: dict[str, Tensor], text_heads: int | None, vision_heads: int | None) -> BlipConfig:
    """Sizes by majority among tensors that share them, so that one broken tensor is reported alone."""

    size, layers = partial(common_size, state), partial(count_layers, state)
    texts = ("text_encoder", "text_decoder.bert")
    norms = [(f"{text}.embeddings.LayerNorm.weight", 0) for text in texts]
    words = [f"{text}.embeddings.word_embeddings.weight" for text in texts]
    width = size(768, *norms, *((word, 1) for word in words))
    patches = "visual_encoder.patch_embed.proj.weight"
    vision_width = size(768, ("visual_encoder.cls_token", 2), ("visual_encoder.norm.weight", 0), (patches, 0))
    if vision_width != width:
        raise ValueError(
            f"vision width {vision_width} and text width {width} differ (ViT-L): BlipForQuestionAnswering would give its decoder "
            f"keys for question states of width {vision_width}, and could not run; only equal widths (ViT-B) convert"
        )
    patch = size(16, (patches, 2), (patches, 3))
    grid = math.isqrt(max(size(901, ("visual_encoder.pos_embed", 1)) - 1, 1))
    config = miss_config(
        image_size=grid * patch,
        patch_size=patch,
        vocab_size=size(30_524, *((word, 0) for word in words), ("text_decoder.cls.predictions.bias", 0)),
        hidden_size=width,
        heads=heads_of(width, text_heads, "text_heads"),
        vision_layers=layers(r"visual_encoder\.blocks\.(\d+)\."),
        text_layers=layers(r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.(\d+)\."),
        intermediate_size=size(4 * width, *((f"{text}.encoder.layer.0.intermediate.dense.weight", 0) for text in texts)),
        max_position_embeddings=size(512, *((f"{text}.embeddings.position_embeddings.weight", 0) for text in texts)),
    )
    vision = config.vision_config
    vision.num_attention_heads = heads_of(vision_width, vision_heads, "vision_heads")
    vision.intermediate_size = size(4 * width, *((f"visual_encoder.blocks.0.mlp.fc1.{p}", 0) for p in ("weight", "bias")))
    return config


def _tie(state: dict) -> dict:
    """Fill in a tied name that a file omits, in place."""
    for pair in TIED.items():
        for absent, present in (pair, pair[::-1]):
            if absent not in state and present in state:
                state[absent] = state[present]
    return state


def _resize_positions(positions: Tensor, grid: int) -> Tensor:
    """[1, 1 + g * g, C] -> [1, 1 + grid * grid, C]; the class token's stays. Computed in fp32 at least."""
    first, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).to(torch.promote_types(positions.dtype, torch.float32))
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)


def lost(config: BlipConfig) -> list[str]:
    """Settings that a checkpoint file does not hold and that MISS's and BLIP's code would get wrong, in words."""
    text, vision = config.text_config, config.vision_config
    facts = (
        ("text heads", text.num_attention_heads, text.hidden_size // 64),
        ("vision heads", vision.num_attention_heads, vision.hidden_size // 64),
        ("text norm eps", text.layer_norm_eps, 1e-12),
        ("vision norm eps", vision.layer_norm_eps, 1e-6),
    )
    return [f"{name}: {ours}; the file cannot say so, and official code uses {theirs}" for name, ours, theirs in facts if ours != theirs]
