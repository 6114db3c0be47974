"""Batches for tiny models, their sizes, and weights large enough that every path matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

V, PAD, IMAGE = 99, 0, 98  # vocabulary, padding, the image token
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
TEXT |= {"max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | {"num_key_value_heads": 2}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 8}
GLOBAL_AND_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 8}


def randomise(model: nn.Module) -> None:
    """Random weights everywhere, also in norms, biases and gates that start at 0 or 1, so that no gradient is zero by chance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() < 2:
                p.add_(0.1 * noise)
            else:
                p.copy_(noise * (0.7 / p[0].numel() ** 0.5 if "embed" not in name else 0.5))


def _lively(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    randomise(model)
    return model.to(dtype).eval()


def _rows(kind: str, length: int = 12, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, length] and a mask of real tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, IMAGE, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if kind in ("padded", "left"):
        for row, gone in enumerate((0, 3, 5)[:rows]):
            where = slice(length - gone, length) if kind == "padded" else slice(0, gone)
            mask[row, where] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def _causal_batch(kind: str, config=None) -> dict[str, Any]:
    if kind == "packed":
        ids, _ = _rows("full", 18, 1)
        positions = torch.cat([torch.arange(n) for n in (7, 4, 7)])[None]
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    ids, mask = _rows(kind)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels} | ({} if kind == "full" else {"attention_mask": mask})


def _encoder_batch(kind: str, config) -> dict[str, Any]:
    ids, mask = _rows(kind)
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 0])} | ({} if kind == "full" else {"attention_mask": mask})


def _image(channels: int = 3, size: int = 16, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(3))


def _image_batch(kind: str, config) -> dict[str, Any]:
    return {"pixel_values": _image(), "labels": torch.tensor([0, 1, 0])}


def _pair_batch(kind: str, config) -> dict[str, Any]:
    ids, mask = _rows(kind, 8)
    return {"input_ids": ids, "pixel_values": _image(), "return_loss": True} | ({} if kind == "full" else {"attention_mask": mask})


def _seq2seq_batch(kind: str, config) -> dict[str, Any]:
    ids, mask = _rows(kind)
    labels, seen = _rows(kind, 6)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(seen == 0, -100)}


def _speech_batch(kind: str, config) -> dict[str, Any]:
    sound = torch.randn(3, config.num_mel_bins, 40, generator=torch.Generator().manual_seed(3))
    labels, seen = _rows(kind, 6)
    return {"input_features": sound, "labels": labels.masked_fill(seen == 0, -100)}


def _with_images(count: int, pixels: Callable[[], dict[str, Any]], first: int = 1, types: str | None = None):
    """Batches of a causal model with ``count`` image tokens at positions ``first`` on, after left padding if there is any."""

    def batch(kind: str, config) -> dict[str, Any]:
        text = _causal_batch(kind)
        ids, mask = text["input_ids"], text.get("attention_mask", torch.ones_like(text["input_ids"]))
        out = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in range(len(ids)):
            start = first + (int((mask[row] == 0).sum()) if kind == "left" else 0)
            parts = {"input_ids": IMAGE, "labels": -100, "attention_mask": 1}
            sources = {"input_ids": ids, "labels": text["labels"], "attention_mask": mask}
            for name, filler in parts.items():
                source = sources[name][row]
                out[name].append(torch.cat([source[:start], torch.full((count,), filler), source[start:]]))
        out = {name: torch.stack(value) for name, value in out.items()}
        if types:
            out[types] = (out["input_ids"] == IMAGE).long()
        return out | pixels()

    return batch


def _one_image_each() -> dict[str, Any]:
    return {"pixel_values": _image()}
