"""What transformers' own processors put out, made of small parts offline: images of other sizes, padding, masks of sound."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as T
from double import Double
from PIL import Image
from tiny_models import GROUPED, VISION, tiny
from tokenizers import Tokenizer, models, pre_tokenizers

import fastpeft as fp
from fastpeft.caching.images import image_caches

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"w{i}" for i in range(60))]


def tokenizer(side: str) -> T.PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return T.PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, additional_special_tokens=["<image>"], **names)


def drawn(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8))


def steps_are_equal(plain, batch, **options):
    """A model in float64, twice, with a cache or without: the losses and gradients of the plain one."""
    plain = plain.double().train()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=True, **options)
    for _ in range(2):
        results = []
        for each in (model, plain):
            each.zero_grad()
            with Double():
                loss = each(**batch).loss
                loss.backward()
            results.append((loss.detach(), {name: p.grad for name, p in each.named_parameters() if p.grad is not None}))
        (loss, gradients), (want, wanted) = results
        torch.testing.assert_close(loss, want, rtol=1e-11, atol=0)
        assert gradients.keys() == wanted.keys()
        scale = max(float(g.abs().max()) for g in wanted.values())
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}")
    return model


@pytest.mark.parametrize("side", [pytest.param("right", marks=pytest.mark.slow), "left"])
def test_llava(side):
    image = WORDS.index("<image>")
    seen = T.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = T.LlavaProcessor(
        seen, tokenizer(side), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>"
    )
    said = ["<image> w1 w2 w3 w4", "w5 <image> w6 w7 w8 w9 w10 w11 w12", "<image> w13"]
    batch = dict(processor(images=[drawn(20, 30), drawn(16, 16), drawn(40, 20)], text=said, padding=True, return_tensors="pt"))
    ids = batch["input_ids"]
    batch["labels"] = ids.masked_fill((batch["attention_mask"] == 0) | (ids == image), -100)
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION), text_config=T.MistralConfig(**GROUPED), image_token_index=image, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    plain = T.LlavaForConditionalGeneration(config)
    for part in (plain.model.vision_tower, plain.model.multi_modal_projector):
        part.requires_grad_(False)
    (cache,) = image_caches(steps_are_equal(plain, batch, cache_images="1GB"))
    assert (cache.computed, cache.reused) == (3, 3)


def test_whisper():
    extractor = T.WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400)
    sounds = [np.random.default_rng(n).standard_normal(n).astype(np.float32) for n in (9000, 5000)]
    batch = dict(extractor(sounds, sampling_rate=16000, return_tensors="pt", return_attention_mask=True))
    batch["labels"] = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    config = tiny("whisper")[0].config
    config.max_source_positions = 50
    torch.manual_seed(0)
    steps_are_equal(T.WhisperForConditionalGeneration(config), batch)
