"""Decoding settings of evaluation: the caller's and the ones documented here, never the base folder's generation_config.json."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
BEAM = {"length_penalty": 1.0, "early_stopping": False}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults


def decoding_settings(**given) -> dict[str, Any]:
    """Arguments of transformers' ``generate``: ``given`` over greedy search. Beam search and sampling name their own settings too, so that
    a record of them is complete."""
    beams, sampling = given.get("num_beams", 1) > 1, given.get("do_sample", False)
    return {"do_sample": False, "num_beams": 1} | (BEAM if beams else {}) | (SAMPLING if sampling else {}) | given


def answer_settings(num_beams: int = 3, max_length: int = 10) -> dict[str, Any]:
    """Of answers to questions about images: the papers' beams of 3, at most 10 tokens."""
    return decoding_settings(num_beams=num_beams, max_length=max_length)


def response_settings(tokenizer, max_new_tokens: int = 128, stop: str = "", **given) -> dict[str, Any]:
    """Of a causal model's responses: greedy search, until the tokenizer's end token or the template's ``stop`` string."""
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id} | ({"stop_strings": [stop]} if stop else {})
    return decoding_settings(max_new_tokens=max_new_tokens, **tokens | given)


@contextlib.contextmanager
def callers_settings_only(model: nn.Module) -> Iterator[None]:
    """Inside, ``generate`` of ``model`` and of what it holds follows its arguments and transformers' defaults. transformers fills every
    setting that a call leaves open from the module's ``generation_config``, so that one is set aside, but for its token ids."""
    before = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    try:
        for module, own in before:
            module.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKEN_IDS})
        yield
    finally:
        for module, own in before:
            module.generation_config = own
