"""Dialogue with a run's adapter (`fastpeft chat`)."""

from __future__ import annotations

from pathlib import Path

from fastpeft.data.prompts import ending
from fastpeft.evaluate.chat import Chat
from fastpeft.evaluate.decoding import response_settings
from fastpeft.models import family_of
from fastpeft.runs import causal
from fastpeft.runs.evaluate import load_run, text_options


def chat_run(adapter: str | Path, image: str | None = None, device: str | None = None, model: str | None = None, **generation):
    """(a :class:`Chat` over ``image`` or none, its decoding settings). ``generation``: options of transformers' ``generate``; 128 tokens a
    response by default."""
    network, tokenizer, preprocess = load_run(adapter, device, model)
    if family_of(network).kind != "causal":
        raise ValueError("chat is for causal language models, and this adapter's base is none: use eval")
    text = text_options(adapter, network)

    def prompts(samples):
        return causal.dataset(network, samples, tokenizer, preprocess, text, prompts_only=True)

    generation = {"max_new_tokens": 128, **generation}
    stop = ending(causal.template_of(network, text)).stop
    return Chat(network, prompts, image, **generation), response_settings(tokenizer, stop=stop, **generation)
