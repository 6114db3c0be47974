"""The cache of a frozen image encoder's features."""

from __future__ import annotations

import pytest
import torch

import fastpeft as fp
from fastpeft.data import Preprocess, VQADataset, load_samples, train_tokenizer
from fastpeft.data.phantom import make_phantoms
from fastpeft.train import TrainConfig, Trainer
from fastpeft.train.features import FeatureCache, why_not

PREPROCESS = Preprocess(64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "phantoms"
    return load_samples(make_phantoms(folder, "a", {"train": 6, "test": 1}, questions_per_image=4, progress=False))


def trainer(samples, plan="F/LoRA/LoRA", **config) -> Trainer:
    tokenizer = train_tokenizer([text for s in samples for text in (s.question, s.answer)], vocab_size=512)
    ids = {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.sep_token_id}
    model = fp.build(
        "miss-tiny", pretrained=False, vocab_size=len(tokenizer), hidden_size=32, heads=2, vision_layers=2, text_layers=1, **ids
    )
    torch.manual_seed(0)
    fp.adapt(model, plan)
    return Trainer(
        model, VQADataset(samples, PREPROCESS, tokenizer=tokenizer), TrainConfig(steps=7, batch_size=8, progress=False, **config)
    )


def test_training_is_the_same_with_and_without(samples, one_thread):
    runs = [trainer(samples, feature_cache=kept) for kept in (True, False)]
    losses = [run.fit()["loss_last"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, p), (_, q) in zip(*(run.model.named_parameters() for run in runs)):
        if p.requires_grad:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


def test_each_image_is_encoded_once_and_not_in_the_step(samples, one_thread):
    kept, plain = trainer(samples), trainer(samples, feature_cache=False)
    summary, other = kept.fit(), plain.fit()
    assert kept.features.computed == 6 == len(kept.features.kept)
    assert kept.features.reused > 6
    assert summary["flops_per_sample"] < other["flops_per_sample"]
    assert summary["parts"].get("vit", {"flops_per_sample": 0})["flops_per_sample"] == 0
    assert any("encoded 6 times" in note for note in summary["notes"])


def test_limit_bounds_memory_and_changes_nothing(samples, one_thread):
    run = trainer(samples)
    path = samples[0].image
    cache = FeatureCache(run.model, run.dataset, limit_bytes=0)
    first, again = cache([path]), cache([path])
    assert cache.bytes == 0 and not cache.kept and cache.computed == 2
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(first, run.model.encode_images(run.dataset.pixels(path)[None]))


@pytest.mark.parametrize(
    ("plan", "reason"), [({"vit": fp.Frozen(dropout=True), "jtm": "LoRA"}, "random"), ({"vit": "LoRA"}, "trained"), ({"jtm": "LoRA"}, "")]
)
def test_only_constants_are_kept(samples, plan, reason):
    run = trainer(samples, plan)
    assert (run.features is None) == bool(reason)
    assert reason in why_not(run.model)
