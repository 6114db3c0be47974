"""A step's batch of which only token ids, masks and indices have data: what decides how much is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.data.shared_prefix import image_once
from fastpeft.features.frozen_stages import ImageFeatures, QuestionStates, longest_frozen_stages
from fastpeft.labels import IGNORE_INDEX
from fastpeft.models import Family, family_of
from fastpeft.ops._private import without_dispatch_modes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class AskedStep:
    """What is estimated: arguments of :func:`estimate`, checked."""

    batch_size: int
    seq_len: int | None
    answer_len: int | None
    dtype: str
    questions_per_image: int
    feature_cache: bool
    cache_layers: bool
    gradient_accumulation: int
    optimized: bool
    quantize: str | None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        sizes = {name: getattr(self, name) for name in ("batch_size", "questions_per_image", "gradient_accumulation")}
        sizes |= {name: value for name in ("seq_len", "answer_len") if (value := getattr(self, name)) is not None}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, not {value!r}")
        if self.cache_layers and not self.optimized:
            raise ValueError("cache_layers=True has no plain counterpart, which keeps nothing: leave one out")
        if self.quantize and not self.optimized:
            raise ValueError(f"quantize={self.quantize!r} has no plain counterpart, which writes a quantised base out: leave one out")


def _check_lengths(config, family: Family, length: int, answer: int | None) -> None:
    """ValueError where the model has no room for so many tokens, or a sample none for its image and answer."""
    if family.kind == "vqa":
        room = config.text_config.max_position_embeddings
        for name, tokens in (("seq_len", length), ("answer_len", answer)):
            if tokens > room:
                raise ValueError(f"{name}={tokens} is more than the model's {room} positions")
    elif length < (least := (answer or 1) + family.image_tokens(config)):
        raise ValueError(f"seq_len={length} leaves no room: image and answer alone take {least} tokens")


def inputs_for(network: nn.Module, step: AskedStep, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch without padding: ids and indices with data, pixels and features without. An image's tokens are in a causal model's batch once
    for all its questions, as the trainer's are."""
    family, batch, per_image = family_of(network), step.batch_size, step.questions_per_image
    kept = longest_frozen_stages(network) if step.feature_cache else None
    config, is_vqa = network.config, family.kind == "vqa"
    length, answer = (step.seq_len or 20, step.answer_len or 6) if is_vqa else (step.seq_len or 512, step.answer_len)
    vision = getattr(config, "vision_config", None)
    inputs = _without_data(network, kept, -(-batch // per_image), (batch, length), dtype)
    _check_lengths(config, family, length, answer)
    real = {"input_ids": (batch, length), "labels": (batch, length)}
    if is_vqa:
        real |= {"attention_mask": (batch, length), "labels": (batch, answer)}
    with without_dispatch_modes():  # real: what they hold decides what is computed
        inputs |= {name: torch.ones(shape, dtype=torch.long) for name, shape in real.items()}
        if vision is not None:
            inputs["image_index"] = torch.arange(batch) // per_image
        if not is_vqa:
            inputs["labels"][:, : length - (answer or max(1, length // 4))] = IGNORE_INDEX
            tokens = family.image_tokens(config)
            if tokens:
                inputs["image_mask"] = (torch.arange(length) < tokens).expand(batch, length).clone()
                inputs |= image_once(inputs, tokens, per_image) if step.optimized else {}
    return {name: t for name, t in inputs.items() if kept is None or name not in kept.replaced}


def inputs_of(network: nn.Module, batch: Mapping[str, Any], feature_cache: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """A collated batch as the network takes it: ids, masks and indices are its own, pixels and features without data."""
    images = len(batch.get("images", ()))
    kept = longest_frozen_stages(network) if feature_cache and images else None
    inputs = _without_data(network, kept, images, batch["input_ids"].shape, dtype) if images else {}
    taken = inspect.signature(network.forward).parameters
    own = {n: t for n, t in batch.items() if isinstance(t, Tensor) and not t.is_floating_point() and n in taken}
    return {name: t for name, t in (inputs | own).items() if kept is None or name not in kept.replaced}


def _without_data(network: nn.Module, kept: type | None, images: int, tokens: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a step is given of its distinct images: pixels, or what is ``kept`` in their place."""
    config = network.config
    vision = getattr(config, "vision_config", None)
    if kept is QuestionStates:
        return {"question_states": torch.empty(*tokens, config.text_config.hidden_size, dtype=dtype)}
    if vision is None:
        return {}
    pixels = torch.empty(images, 3, vision.image_size, vision.image_size, dtype=dtype)
    if kept is ImageFeatures and hasattr(network, "encode_images"):
        with torch.no_grad():
            return {"image_embeds": torch.empty_like(network.encode_images(pixels))}
    return {"pixel_values": pixels}
