"""Encoder-decoder models after optimize, on what their callers give them: padding on either side, decoder inputs and masks of one's own,
labels left out in the middle and for a whole sample."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_models import PAD, V, tiny

import fastpeft as fp

pytestmark = pytest.mark.usefixtures("one_thread")


def bart():
    """BART's batches are T5's."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": V}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0}
    torch.manual_seed(0)
    config = T.BartConfig(**sizes, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.3)
    return T.BartForConditionalGeneration(config).double(), tiny("t5")[1]


def given(batch):
    """(what, batch) of every kind."""
    for kind in ("padded", "left"):
        plain = batch(kind)
        labels, places = plain["labels"], torch.arange(6)
        yield f"{kind}, gaps in the labels", plain | {"labels": labels.masked_fill(places % 3 == 1, -100)}
        yield f"{kind}, a sample without labels", plain | {"labels": labels.masked_fill(torch.arange(3)[:, None] == 1, -100)}
        inputs = labels.masked_fill(labels == -100, PAD).roll(1, 1)
        inputs[:, 0] = 2
        mask = (places < torch.tensor([[6], [4], [2]])).long()
        yield f"{kind}, decoder inputs", plain | {"decoder_input_ids": inputs}
        yield f"{kind}, a decoder mask", plain | {"decoder_input_ids": inputs, "decoder_attention_mask": mask}
        yield f"{kind}, padding before an answer", plain | {"decoder_input_ids": inputs.flip(1), "decoder_attention_mask": mask.flip(1)}


QUICK = [("t5", True), ("bart", True), ("whisper", None), ("florence2", None)]
EVERY = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ((n, k) for n, _ in QUICK for k in (None, True))]


@pytest.mark.parametrize("name, lean", EVERY)
def test_the_model_as_it_was(name, lean):
    plain, batch = bart() if name == "bart" else tiny(name)
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=lean)
    for what, one in given(batch):
        mine, theirs = step(model, one), step(plain, one)
        assert_same(mine, theirs, what)
        if lean is None:
            torch.testing.assert_close(mine[0].logits, theirs[0].logits, rtol=1e-9, atol=1e-10)
