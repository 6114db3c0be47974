"""Lower layers of stacks that are no decoder alone. One that reads an encoder's states: kept by these states too, and left alone where they
need a gradient. An image encoder's."""

import copy

import pytest
import torch
import transformers as tf
from double import assert_same, step
from tiny_batches import PAD, V, _lively
from tiny_models import tiny

import fastpeft as fp
from fastpeft.caching.layers import layer_caches

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": V,
    "d_model": 32,
}
SIZES |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}
SIZES |= {"activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "pad_token_id": PAD, "decoder_start_token_id": 2}
BOTH = [(tf.BartForConditionalGeneration, tf.BartConfig), (tf.M2M100ForConditionalGeneration, tf.M2M100Config)]


def pair(classes, trained: str):
    """(without a cache, with one), training what ``trained`` is in the names of."""
    model, config = classes
    torch.manual_seed(0)
    without = _lively(model(config(**SIZES)), torch.float64).eval()  # to transformers 5.17 training draws a number for each layer's drop
    for name, p in without.named_parameters():
        p.requires_grad_(trained in name and "fc1" in name)
    kept = copy.deepcopy(without)
    fp.optimize(without)
    fp.optimize(kept, cache_layers="10MB")
    return without, kept, layer_caches(kept)[-1]


def batch(seed: int, length: int = 7, padded: int = 0) -> dict:
    """Three questions, and one answer to all of them."""
    ids = torch.randint(3, V, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, length - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([[5, 9, 7, 2]] * 3), "use_cache": False}


@pytest.mark.parametrize("classes", BOTH, ids=["bart", "m2m100"])
@pytest.mark.parametrize("length", [7, 4])  # as many tokens as the answers have, too
def test_one_answer_to_different_questions(classes, length):
    without, kept, cache = pair(classes, "decoder.layers.2")
    for seed, padded in ((1, 0), (2, 0), (1, 0), (1, 2), (2, 0), (1, 2)):
        assert_same(step(kept, batch(seed, length, padded)), step(without, batch(seed, length, padded)), f"{seed}, {padded}")
    assert cache.reused >= 6 and not cache.passed, cache.note()


@pytest.mark.parametrize("classes", BOTH, ids=["bart", "m2m100"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_an_encoder_that_trains_gets_its_gradients_through_frozen_layers(classes, reentrant):
    without, kept, cache = pair(classes, "encoder")
    for one in (without, kept) if reentrant is not None else ():
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
    for _ in range(2):
        assert_same(step(kept, batch(1)), step(without, batch(1)))
    assert set(cache.passed) == {"what enters them needs a gradient"} and not cache.reused


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip", "bert"])
@pytest.mark.parametrize("both", [True, False])
def test_encoders_of_images_and_text(name, both):
    without, given = tiny(name)
    without.train()
    highest = [n for n, _ in without.named_parameters()][-4:]
    for n, p in without.named_parameters():
        p.requires_grad_(n in highest)
    kept = copy.deepcopy(without)
    fp.optimize(without)
    fp.optimize(kept, cache_layers="10MB", cache_images="10MB" if both else None)
    for _ in range(3):
        assert_same(step(kept, given("full")), step(without, given("full")), name)
