"""Tiny vision-language models of transformers from their configurations, float64, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
SEEN = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
IMAGE = 90  # the image token's id


def images(count: int, *more: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *(more or (3, 16, 16)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(rows: int, image_tokens: int | list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Each row: image tokens, then seven tokens of text, with labels on the last five."""
    counts = [image_tokens] * rows if isinstance(image_tokens, int) else image_tokens
    length = max(counts) + 7
    ids = torch.randint(3, 80, (rows, length), generator=torch.Generator().manual_seed(seed + 7))
    for row, count in zip(ids, counts):
        row[:count] = IMAGE
    labels = ids.clone()
    labels[:, : length - 5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**SEEN), text_config=tf.LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=4
    )
    return tf.LlavaForConditionalGeneration(config), lambda pixels: {"pixel_values": pixels, **text(len(pixels), 4)}


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**SEEN),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=91,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )

    def batch(pixels):  # 2 or 3 tiles: the whole, and one or two of it; the last is padding in a smaller image
        sizes, tiles, tokens = [], [], []
        for image in pixels:
            wide = bool(image[0, 0, 0] > 0)
            sizes.append([16, 32] if wide else [16, 16])
            own = [image, image.flip(-1), *([image.flip(-2)] if wide else [torch.zeros_like(image)])]
            tiles.append(torch.stack(own))
            tokens.append(4 + (2 * 5 if wide else 2 * 3))
        most = 3 if [16, 32] in sizes else 2
        shared = {"pixel_values": torch.stack(tiles)[:, :most], "image_sizes": torch.tensor(sizes)}
        return shared | {"batch_num_images": torch.ones(len(pixels), dtype=torch.long)} | text(len(pixels), tokens)

    return tf.LlavaOnevisionForConditionalGeneration(config), batch


def paligemma2():
    seen = tf.SiglipVisionConfig(**SEEN, projection_dim=32)
    config = tf.PaliGemmaConfig(
        vision_config=seen, text_config=tf.Gemma2Config(**TEXT), image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )

    def batch(pixels):
        tokens = text(len(pixels), 4)
        return {"pixel_values": pixels, **tokens, "token_type_ids": (tokens["labels"] != -100).long()}

    return tf.PaliGemmaForConditionalGeneration(config), batch


def gemma3():
    reads = tf.Gemma3TextConfig(**TEXT, sliding_window=8, query_pre_attn_scalar=8)
    seen = tf.SiglipVisionConfig(**SEEN, vision_use_head=False)
    config = tf.Gemma3Config(text_config=reads, vision_config=seen, mm_tokens_per_image=4, image_token_index=IMAGE)

    def batch(pixels):
        tokens = text(len(pixels), 4)
        return {"pixel_values": pixels, **tokens, "token_type_ids": (tokens["input_ids"] == IMAGE).long()}

    return tf.Gemma3ForConditionalGeneration(config), batch


GRIDS = [[1, 4, 4], [1, 4, 8], [1, 2, 4]]


def _qwen_batch(pixels):
    """Each image a grid of its own, chosen by its content."""
    grid = torch.tensor([GRIDS[int(image.sum().abs() * 10) % 3] for image in pixels])
    patches = [image.flatten().repeat(9)[: int(g.prod()) * 96].view(-1, 96) for image, g in zip(pixels, grid)]
    tokens = text(len(pixels), [int(g.prod()) // 4 for g in grid])
    types = (tokens["input_ids"] == IMAGE).int()
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grid, **tokens, "mm_token_type_ids": types}


def qwen2_5_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    seen = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    seen |= {"window_size": 16, "fullatt_block_indexes": [1]}
    special = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = tf.Qwen2_5_VLConfig(vision_config=seen, text_config=TEXT | {"rope_parameters": rope}, **special)
    return tf.Qwen2_5_VLForConditionalGeneration(config), _qwen_batch


def qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "mrope_interleaved": True}
    seen = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    seen |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    special = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = tf.Qwen3VLConfig(vision_config=seen, text_config=TEXT | {"rope_parameters": rope}, **special)
    return tf.Qwen3VLForConditionalGeneration(config), _qwen_batch


def internvl():
    seen = SEEN | {"image_size": [16, 16], "patch_size": [4, 4]}
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**seen), text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
    )
    return tf.InternVLForConditionalGeneration(config), lambda pixels: {"pixel_values": pixels, **text(len(pixels), 4)}


def idefics3():
    seen = SEEN | {"patch_size": 4}
    config = tf.Idefics3Config(vision_config=seen, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)

    def batch(pixels):  # one or two images for a sample; the second is padding where a sample has one
        two = [bool(image[0, 0, 0] > 0) for image in pixels]
        lists = torch.stack([torch.stack([image, image.flip(-1) * both]) for image, both in zip(pixels, two)])
        lists = lists[:, : 1 + any(two)]
        mask = (lists != 0).any(2).long()
        return {"pixel_values": lists, "pixel_attention_mask": mask, **text(len(pixels), [4 + 4 * both for both in two])}

    return tf.Idefics3ForConditionalGeneration(config), batch


def blip2():
    qformer = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "encoder_hidden_size": 16}
    qformer |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30}
    reads = {"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    reads |= {"word_embed_proj_dim": 32, "dropout": 0.0}
    config = tf.Blip2Config(
        vision_config=SEEN, qformer_config=qformer, text_config=reads, num_query_tokens=4, image_token_index=IMAGE
    )
    return tf.Blip2ForConditionalGeneration(config), lambda pixels: {"pixel_values": pixels, **text(len(pixels), 4)}


def florence2():
    seen = {"embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "num_groups": [1, 1, 2, 2], "depths": [1, 1, 1, 1], "window_size": 2}
    seen |= {"projection_dim": 32, "drop_path_rate": 0.0, "max_position_embeddings": 8}
    reads = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "dropout": 0.0}
    reads |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 1}
    config = tf.Florence2Config(text_config=tf.BartConfig(**reads), vision_config=seen, image_token_id=IMAGE)

    def batch(pixels):
        pixels = pixels.repeat_interleave(4, -1).repeat_interleave(4, -2)
        return {"pixel_values": pixels, **text(len(pixels), 5)}

    return tf.Florence2ForConditionalGeneration(config), batch


MODELS: dict[str, Callable] = {
    make.__name__: make
    for make in (llava, llava_onevision, paligemma2, gemma3, qwen2_5_vl, qwen3_vl, internvl, idefics3, blip2, florence2)
}


def build(name: str):
    """(the model in float64, in training, its image side frozen; pixels [N, 3, 16, 16] -> its batch)."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model = model.double().train()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in parameter_name or "text_model" in parameter_name)
    return model, batch
