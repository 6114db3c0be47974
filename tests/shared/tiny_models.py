"""Tiny models of the architectures people tune, made from configurations alone, with batches for each: no download, float64 by default.

``TINY[name]`` makes (model, batch): the model in evaluation mode with weights large enough that every path matters; batch(kind) gives the
arguments of one training step with a loss, for each kind in ``kinds(name)``:

- "full"     every token is real
- "padded"   padding on the right (decoders: labels -100 there)
- "left"     padding on the left
- "packed"   one row of several samples, with position_ids that start again and no mask (decoders only)

Vision models have "full" alone; encoders "full" and "padded".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from tiny_batches import (
    GLOBAL_AND_SLIDING,
    GROUPED,
    IMAGE,
    PAD,
    TEXT,
    VISION,
    V,
    _causal_batch,
    _encoder_batch,
    _image,
    _image_batch,
    _lively,
    _one_image_each,
    _pair_batch,
    _rows,
    _seq2seq_batch,
    _speech_batch,
    _with_images,
)
from torch import nn


def _qwen_pixels(vision) -> Callable[[], dict[str, Any]]:
    """Three images of 4 x 4 patches, merged two by two: four tokens each."""

    def pixels():
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        flat = torch.randn(3 * 16, width, generator=torch.Generator().manual_seed(3))
        return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 4, 4]] * 3)}

    return pixels


def _qwen25_vl():
    vision = {"depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    text = GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=97, vision_start_token_id=96)
    return T.Qwen2_5_VLForConditionalGeneration(config), _with_images(4, _qwen_pixels(config.vision_config), types="mm_token_type_ids")


def _qwen3_vl():
    vision = {"depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = GROUPED | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    config = T.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=97, vision_start_token_id=96)
    return T.Qwen3VLForConditionalGeneration(config), _with_images(4, _qwen_pixels(config.vision_config), types="mm_token_type_ids")


def _llava(language=T.LlamaConfig):
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION, projection_dim=24), text_config=language(**GROUPED), image_token_index=IMAGE
    )
    return T.LlavaForConditionalGeneration(config), _with_images(4, _one_image_each)


def _llava_onevision():
    config = T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=T.Qwen2Config(**GROUPED),
        image_token_index=IMAGE,
        video_token_index=97,
        image_grid_pinpoints=[[16, 16]],
        vision_aspect_ratio="anyres_max_9",
    )

    def pixels():  # the image as a whole and as one tile: 4 tokens, and 4 with a newline after each row of 2
        return {"pixel_values": _image(rows=6).view(3, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 3)}

    return T.LlavaOnevisionForConditionalGeneration(config), _with_images(10, pixels)


def _paligemma2():
    config = T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=T.Gemma2Config(**GROUPED, **GLOBAL_AND_SLIDING, query_pre_attn_scalar=8),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    with_images = _with_images(4, _one_image_each, first=0)

    def batch(kind, config):
        out = with_images(kind, config)
        return out | {"token_type_ids": (out["labels"] != -100).long()}  # 0: prompt and image, seen from both sides; 1: the answer

    return T.PaliGemmaForConditionalGeneration(config), batch


def _gemma3():
    config = T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**GROUPED, **GLOBAL_AND_SLIDING, query_pre_attn_scalar=8),
        vision_config=T.SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=96,
        eoi_token_index=97,
    )
    return T.Gemma3ForConditionalGeneration(config), _with_images(4, _one_image_each, types="token_type_ids")


def _internvl():
    config = T.InternVLConfig(
        vision_config=T.InternVLVisionConfig(**VISION | {"image_size": [16, 16], "patch_size": [4, 4]}),
        text_config=T.Qwen2Config(**GROUPED),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return T.InternVLForConditionalGeneration(config), _with_images(4, _one_image_each)


def _idefics3(Config=T.Idefics3Config, Model=T.Idefics3ForConditionalGeneration):
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Config(vision_config=vision, text_config=T.LlamaConfig(**GROUPED), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD)

    def pixels():
        return {"pixel_values": _image()[:, None]}

    return Model(config), _with_images(4, pixels)


def _smolvlm():
    return _idefics3(T.SmolVLMConfig, T.SmolVLMForConditionalGeneration)


def _blip2():
    config = T.Blip2Config(
        vision_config=T.Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=T.Blip2QFormerConfig(**TEXT | NO_DROPOUT, encoder_hidden_size=24, cross_attention_frequency=1).to_dict(),
        text_config=T.OPTConfig(**TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}).to_dict(),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return T.Blip2ForConditionalGeneration(config), _with_images(4, _one_image_each)


def _florence2():
    vision = {
        "embed_dim": [16, 24],
        "depths": [1, 1],
        "num_heads": [2, 3],
        "num_groups": [2, 3],
        "patch_size": [7, 3],
        "projection_dim": 32,
    }
    vision |= {"patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 2, "drop_path_rate": 0.0}
    text = {"vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0}
    text |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": PAD}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    config = T.Florence2Config(text_config=T.BartConfig(**text), vision_config=T.Florence2VisionConfig(**vision), image_token_id=IMAGE)
    with_images = _with_images(5, _one_image_each)

    def batch(kind, config):
        out, (labels, seen) = with_images(kind, config), _rows(kind, 6)
        return out | {"labels": labels.masked_fill(seen == 0, -100)}

    return T.Florence2ForConditionalGeneration(config), batch


def _causal(Model, Config, **more) -> Callable:
    def make():
        return Model(Config(**{k: v for k, v in (GROUPED | more).items() if v is not None})), _causal_batch

    return make


def _newer(name: str, **more) -> Callable:
    """The same of a model that the oldest transformers may not have."""
    return lambda: _causal(getattr(T, f"{name}ForCausalLM"), getattr(T, f"{name}Config"), **more)()


def _encoder(Model, Config, **more) -> Callable:
    return lambda: (Model(Config(**TEXT | {"num_labels": 2} | more)), _encoder_batch)


def _image_model(Model, Config, **more) -> Callable:
    return lambda: (Model(Config(**VISION | {"num_labels": 2} | more)), _image_batch)


def _clip(Model, Config) -> Callable:
    def make():
        text = TEXT | {"projection_dim": 16}
        return Model(Config(text_config=text, vision_config=VISION | {"projection_dim": 16}, projection_dim=16)), _pair_batch

    return make


def _siglip():
    vision = VISION | {"hidden_size": 32, "num_attention_heads": 4}  # one width for text and images
    return T.SiglipModel(T.SiglipConfig(text_config=TEXT | {"max_position_embeddings": 8}, vision_config=vision)), _pair_batch


def _gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": V, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    return T.GPT2LMHeadModel(T.GPT2Config(**sizes, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=PAD)), _causal_batch


def _t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": V, "dropout_rate": 0.0}
    config = T.T5Config(**sizes, decoder_start_token_id=PAD, pad_token_id=PAD, feed_forward_proj="gated-gelu")
    return T.T5ForConditionalGeneration(config), _seq2seq_batch


def _whisper():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": V, "num_mel_bins": 8, "max_source_positions": 20}
    tokens = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None}
    config = T.WhisperConfig(**sizes, **tokens, begin_suppress_tokens=None, max_target_positions=32)
    return T.WhisperForConditionalGeneration(config), _speech_batch


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NOT_OPT = ("num_key_value_heads", "intermediate_size")
DECODERS: dict[str, Callable] = {
    "llama": _causal(T.LlamaForCausalLM, T.LlamaConfig),
    "mistral": _causal(T.MistralForCausalLM, T.MistralConfig, sliding_window=4),
    "qwen2": _causal(T.Qwen2ForCausalLM, T.Qwen2Config),
    "qwen3": _causal(T.Qwen3ForCausalLM, T.Qwen3Config, head_dim=8),
    "gemma2": _causal(T.Gemma2ForCausalLM, T.Gemma2Config, **GLOBAL_AND_SLIDING, query_pre_attn_scalar=8),
    "gemma3-text": _causal(T.Gemma3ForCausalLM, T.Gemma3TextConfig, **GLOBAL_AND_SLIDING, query_pre_attn_scalar=8),
    "phi3": _causal(T.Phi3ForCausalLM, T.Phi3Config, sliding_window=None, original_max_position_embeddings=64),
    "smollm3": _causal(T.SmolLM3ForCausalLM, T.SmolLM3Config, no_rope_layers=[1, 0]),
    "olmo2": _causal(T.Olmo2ForCausalLM, T.Olmo2Config),
    "gpt-oss": _causal(T.GptOssForCausalLM, T.GptOssConfig, **GLOBAL_AND_SLIDING, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": _gpt2,
}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0}
# Mixtures of experts, and other layers than LLaMA's; apart, as the tests of every model take time enough.
OTHER_DECODERS: dict[str, Callable] = {
    "mixtral": _causal(T.MixtralForCausalLM, T.MixtralConfig, num_local_experts=3),
    "qwen2-moe": _causal(T.Qwen2MoeForCausalLM, T.Qwen2MoeConfig, num_experts=3, shared_expert_intermediate_size=20, **SPARSE),
    "qwen3-moe": _causal(T.Qwen3MoeForCausalLM, T.Qwen3MoeConfig, num_experts=3, head_dim=8, **SPARSE),
    "olmoe": _causal(T.OlmoeForCausalLM, T.OlmoeConfig, num_experts=3, num_experts_per_tok=2),
    "granite-moe": _causal(T.GraniteMoeForCausalLM, T.GraniteMoeConfig, num_local_experts=3, num_experts_per_tok=2),
    "opt": _causal(T.OPTForCausalLM, T.OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **dict.fromkeys(NOT_OPT)),
    "gpt-neox": _causal(T.GPTNeoXForCausalLM, T.GPTNeoXConfig),
    "phi": _causal(T.PhiForCausalLM, T.PhiConfig),
    "cohere": _causal(T.CohereForCausalLM, T.CohereConfig),
    "stablelm": _causal(T.StableLmForCausalLM, T.StableLmConfig),
    "nemotron": _causal(T.NemotronForCausalLM, T.NemotronConfig),
    "persimmon": _causal(T.PersimmonForCausalLM, T.PersimmonConfig),
    "ministral3": _newer("Ministral3", head_dim=8),
    "deepseek-v2": _causal(T.DeepseekV2ForCausalLM, T.DeepseekV2Config, **LATENT, n_routed_experts=4, **SPARSE),
    "deepseek-v3": _causal(T.DeepseekV3ForCausalLM, T.DeepseekV3Config, **LATENT, n_routed_experts=4, n_group=1, topk_group=1, **SPARSE),
    "minicpm3": _newer("MiniCPM3", **LATENT),
    "bart-decoder": _causal(T.BartForCausalLM, T.BartConfig, **BART),
    "ernie-moe": _causal(T.Ernie4_5_MoeForCausalLM, T.Ernie4_5_MoeConfig, moe_num_experts=3, moe_k=2, moe_intermediate_size=24),
    "afmoe": _newer("Afmoe", num_experts=3, num_dense_layers=1, head_dim=8, **SPARSE),
    "cohere2-moe": _newer("Cohere2Moe", num_experts=3, num_experts_per_tok=2, head_dim=8),
    "hy-v3": _newer("HYV3", num_experts=3, head_dim=8, first_k_dense_replace=1, **SPARSE),
    "minimax-m2": _newer("MiniMaxM2", num_local_experts=3, num_experts_per_tok=2, head_dim=8),
}
ENCODERS: dict[str, Callable] = {
    "bert": _encoder(T.BertForSequenceClassification, T.BertConfig, **NO_DROPOUT),
    "roberta": _encoder(T.RobertaForSequenceClassification, T.RobertaConfig, **NO_DROPOUT),
    "clip": _clip(T.CLIPModel, T.CLIPConfig),
    "siglip": _siglip,
    "t5": _t5,
    "whisper": _whisper,
}
VISIONS: dict[str, Callable] = {
    "vit": _image_model(T.ViTForImageClassification, T.ViTConfig),
    "dinov2": _image_model(T.Dinov2ForImageClassification, T.Dinov2Config, mlp_ratio=2),
    "beit": _image_model(T.BeitForImageClassification, T.BeitConfig, use_relative_position_bias=True),
}
VISION_LANGUAGE: dict[str, Callable] = {
    "llava": _llava,
    "llava-mistral": lambda: _llava(T.MistralConfig),
    "llava-onevision": _llava_onevision,
    "paligemma2": _paligemma2,
    "gemma3": _gemma3,
    "qwen2.5-vl": _qwen25_vl,
    "qwen3-vl": _qwen3_vl,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "blip2": _blip2,
    "florence2": _florence2,
}
NAMES = [*DECODERS, *ENCODERS, *VISIONS, *VISION_LANGUAGE]


def kinds(name: str, dtype: torch.dtype = torch.float64) -> tuple[str, ...]:
    """The batches that a model takes in ``dtype``."""
    if name == "gemma2" and dtype == torch.float64:  # its eager softmax is float32, where float64's least number, a mask's, is -inf: NaN
        return ("full", "packed")
    if name in DECODERS or name in OTHER_DECODERS:
        return ("full", "padded", "left", "packed")
    return ("full",) if name in VISIONS else ("full", "padded") if name in ENCODERS else ("full", "padded", "left")


def tiny(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[str], dict[str, Any]]]:
    """(model, batch): the same weights and values at every call; batch(kind) -> keyword arguments of the model's forward, with a loss."""
    torch.manual_seed(0)
    make = {**DECODERS, **OTHER_DECODERS, **ENCODERS, **VISIONS, **VISION_LANGUAGE}[name]
    model, batch = make()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # grouped products take no float64

    def cast(kind: str) -> dict[str, Any]:
        given = batch(kind, model.config)
        floating = [key for key, value in given.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
        return given | {key: given[key].to(dtype) for key in floating}

    return _lively(model, dtype), cast
