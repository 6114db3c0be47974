"""The cache of a frozen image encoder's features."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

import fastpeft as fp
from fastpeft.data import Preprocess, VQADataset, load_samples, train_tokenizer
from fastpeft.demo.phantom import make_phantoms
from fastpeft.features.cache import FeatureCache
from fastpeft.features.frozen_stages import ImageFeatures
from fastpeft.train import TrainConfig, Trainer

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
    assert reason in ImageFeatures.why_not(run.model)


def cache(samples, folder, **how):
    run = trainer(samples)
    return FeatureCache(run.model, run.dataset, folder=folder, **how), list(dict.fromkeys(sample.image for sample in samples))


def test_files_are_found_again_whole(samples, tmp_path, one_thread):
    first, paths = cache(samples, tmp_path)
    want = first(paths)
    first.flush()
    again, _ = cache(samples, tmp_path)
    assert torch.equal(again(paths), want) and (again.computed, again.loaded) == (0, 6)
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(paths[0].read_bytes())
    assert torch.equal(again([moved]), want[:1]) and again.computed == 0


def changed_weight(run, dataset):
    next(run.vision_model.parameters()).data.view(-1)[0] += 1e-3


def changed_transform(run, dataset):
    dataset.preprocess = Preprocess(64, mean=(0.4, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("change", [changed_weight, changed_transform])
def test_a_change_misses(samples, tmp_path, one_thread, change):
    first, paths = cache(samples, tmp_path)
    first(paths)
    first.flush()
    again, _ = cache(samples, tmp_path)
    change(again.model, again.dataset)
    again(paths)
    assert (again.computed, again.loaded) == (6, 0)


@pytest.mark.parametrize("damage", ["header", "cut", "byte"])
def test_a_torn_file_is_known_and_made_again(samples, tmp_path, one_thread, damage):
    first, paths = cache(samples, tmp_path)
    want = first(paths)
    first.flush()
    (file,) = tmp_path.rglob("*.safetensors")
    raw = bytearray(file.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    else:
        raw[20 if damage == "header" else -5] ^= 0xFF
    file.write_bytes(raw)
    again, _ = cache(samples, tmp_path)
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        assert torch.equal(again(paths), want)
    again.flush()
    last, _ = cache(samples, tmp_path)
    assert torch.equal(last(paths), want) and last.computed == 0


def test_a_file_cut_while_in_use_ends_no_process(samples, tmp_path, one_thread):
    """Someone shortens the file in place after it was read and checked: a mapping of it would end the process here."""
    store, paths = cache(samples, tmp_path, limit_bytes=0)
    store(paths)
    store.flush()
    want = store(paths)
    (file,) = tmp_path.rglob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        assert torch.equal(store(paths), want)
    assert store.computed > 6


def test_two_processes_share(samples, tmp_path, one_thread):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=lambda: (lambda c, p: (c(p), c.flush()))(*cache(samples, tmp_path))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    mine, paths = cache(samples, tmp_path)
    want = FeatureCache(mine.model, mine.dataset)(paths)
    torch.testing.assert_close(mine(paths), want)
    assert mine.computed == 0


def test_beyond_the_memory_bound_files_serve(samples, tmp_path, one_thread):
    spilt, paths = cache(samples, tmp_path, limit_bytes=0)
    spilt(paths)
    spilt.flush()
    spilt(paths)
    assert not spilt.kept and (spilt.computed, spilt.loaded) == (6, 6)


def test_half_the_bytes(samples, tmp_path, one_thread):
    full, paths = cache(samples, None)
    half, _ = cache(samples, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half(paths), full(paths).bfloat16().float()) and half.bytes == full.bytes // 2


def test_a_folder_that_cannot_be_written(samples, tmp_path, one_thread):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    kept, paths = cache(samples, blocked)
    kept(paths)
    with pytest.warns(UserWarning, match="cannot be written .* memory only"):
        kept.flush()
    kept(paths)
    assert kept.computed == 6


def test_a_run_fills_a_folder_and_the_next_reads_it(samples, tmp_path, one_thread):
    config = {"feature_cache_dir": str(tmp_path / "features"), "feature_cache_memory": "1GB"}
    losses = [trainer(samples, **config).fit()["loss_last"] for _ in range(2)]
    assert losses[0] == losses[1] and list((tmp_path / "features").rglob("*.safetensors"))
    run = trainer(samples, **config)
    note = next(note for note in run.fit()["notes"] if "image features" in note)
    assert "computed again at every visit" in note or "encoded 0 times" in note
