"""Batches: what is in them, that images are decoded once, that every order can be had again."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from fastpeft.data import EpochSampler, Preprocess, VQACollator, VQADataset, images, load_samples, train_tokenizer


def raises(text: str):
    return pytest.raises(ValueError, match=text)


@pytest.fixture
def samples(tmp_path, make):
    """23 questions on 6 images, of 1 to 8 questions each; those of image 2 have pools."""
    entries = []
    for n, questions in enumerate([3, 8, 1, 5, 2, 4]):
        make.image(tmp_path / "images" / f"synpic{n}.jpg", (40 * n, 0, 255 - 40 * n))
        for k in range(questions):
            pool = {"question_pool": [f"phrasing {p}" for p in range(5)]} if n == 1 else {}
            entry = {"img_name": f"synpic{n}.jpg", "question": f"Question {k}?", "answer": "yes" * (k + 1), "qid": len(entries)}
            entries.append(entry | pool)
    make.json(tmp_path / "train.json", entries)
    return load_samples(tmp_path)


@pytest.fixture
def dataset(samples):
    return VQADataset(samples, Preprocess(8), seed=5)


@pytest.fixture(scope="module")
def collate():
    return VQACollator(train_tokenizer(["question phrasing yes"]))


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often each file is decoded."""
    counts, load = Counter(), images.load_image
    monkeypatch.setattr(images, "load_image", lambda path, *limit: counts.update([path.name]) or load(path, *limit))
    return counts


# --- data set ---------------------------------------------------------------------------------------------------------


def test_items(dataset, samples):
    item = dataset[0]
    assert len(dataset) == 23 and item["sample"] is samples[0] and item["question"] == "Question 0?"
    assert torch.equal(item["pixel_values"], Preprocess(8)(samples[0].image))
    assert dataset[-1]["sample"] is samples[22]
    with pytest.raises(IndexError):
        dataset[23]
    with raises("at least one sample"):
        VQADataset([], Preprocess(8))


def test_phrasings_follow_seed_epoch_and_index(dataset, samples):
    pooled = range(3, 11)

    def asked(seed, epoch, order=pooled):
        data = VQADataset(samples, Preprocess(8), seed=seed)
        data.set_epoch(epoch)
        return {i: data[i]["question"] for i in order}

    first = asked(0, 0)
    assert asked(0, 0, reversed(pooled)) == first  # whatever the order of access
    assert set(first.values()) <= {f"phrasing {p}" for p in range(5)} and len(set(first.values())) > 1
    assert len({tuple(asked(0, e).values()) for e in range(4)}) == 4 and asked(1, 0) != first
    drawn = Counter(q for e in range(200) for q in asked(0, e).values())
    assert all(abs(drawn[f"phrasing {p}"] - 320) < 80 for p in range(5))  # 1,600 draws of 5: 5 sigma
    data = VQADataset(samples, Preprocess(8), seed=0)
    assert data[len(data) - 16]["question"] == data[-16]["question"]


def test_images_are_decoded_once(samples, decoded):
    dataset = VQADataset(samples, Preprocess(8))
    for _ in range(2):
        for i in range(len(dataset)):
            dataset[i]
    assert set(decoded.values()) == {1} and len(decoded) == 6
    assert dataset.cache.hits == 2 * 23 - 6 and dataset.cache.misses == 6 and dataset.cache.bytes == 6 * 3 * 8 * 8


def test_a_batch_decodes_once_even_without_a_cache(samples, decoded):
    dataset = VQADataset(samples, Preprocess(8), cache_bytes=0)
    items = dataset.__getitems__(range(23))
    assert set(decoded.values()) == {1} and items[3]["pixel_values"] is items[4]["pixel_values"]


def test_without_images(dataset, collate, decoded):
    dataset.load_images = False
    batch = collate(dataset.__getitems__([0, 4]))
    assert "pixel_values" not in batch and not decoded and [p.name for p in batch["images"]] == ["synpic0.jpg", "synpic1.jpg"]
    assert dataset.pixels(batch["images"][0]).shape == (3, 8, 8) and sum(decoded.values()) == 1


def test_a_damaged_image_is_named(samples):
    samples[0].image.write_bytes(b"")
    with raises("synpic0.jpg"):
        VQADataset(samples, Preprocess(8))[0]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collation(dataset, samples, collate):
    indices = [5, 0, 22, 6, 1]
    batch = collate(dataset.__getitems__(indices))
    assert batch["samples"] == [samples[i] for i in indices]
    assert batch["image_index"].tolist() == [0, 1, 2, 0, 1] and batch["image_index"].dtype == torch.int64
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    each = torch.stack([Preprocess(8)(samples[i].image) for i in indices])
    assert torch.equal(batch["pixel_values"][batch["image_index"]], each)
    assert batch["images"] == [samples[i].image for i in (5, 0, 22)]
    tokenizer = collate.tokenizer
    assert (batch["input_ids"][:, 0] == tokenizer.convert_tokens_to_ids("[ENC]")).all()
    assert (batch["decoder_input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(batch["labels"] == -100, batch["decoder_attention_mask"] == 0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).startswith("phrasing")


def test_question_length(dataset, samples):
    collate = VQACollator(train_tokenizer(["a"]), max_question=4, max_answer=3)
    batch = collate(dataset.__getitems__(range(6)))
    assert batch["input_ids"].shape == (6, 4) and batch["labels"].shape == (6, 3)


def test_through_a_loader_with_workers(dataset, collate):
    """Workers give the same batches as none, and hear of a new epoch while they live."""
    sampler = EpochSampler(dataset, 6, seed=1, questions_per_image=3)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        batches = list(loader)
        expected = [collate(dataset.__getitems__(indices)) for indices in sampler]
        assert len(batches) == len(sampler) == len(expected)
        for ours, theirs in zip(batches, expected, strict=True):
            assert ours["samples"] == theirs["samples"]
            assert all(torch.equal(ours[k], v) for k, v in theirs.items() if isinstance(v, torch.Tensor))


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 23, 100])
def test_every_sample_once(dataset, q, batch_size):
    sampler = EpochSampler(dataset, batch_size, seed=2, questions_per_image=q)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(i for b in batches for i in b) == list(range(23))
        assert len(batches) == len(sampler) == -(-23 // batch_size)
        assert all(len(b) == batch_size for b in batches[:-1])


def test_drop_last(dataset):
    sampler = EpochSampler(dataset, 5, questions_per_image=2, drop_last=True)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4 and all(len(b) == 5 for b in batches)
    with raises("23 samples make no batch of 24"):
        EpochSampler(dataset, 24, drop_last=True)


def test_order_follows_seed_and_epoch(dataset):
    def order(seed, epoch, q):
        sampler = EpochSampler(dataset, 4, seed=seed, questions_per_image=q)
        sampler.set_epoch(epoch)
        return list(sampler)

    for q in (1, 3):
        assert order(0, 0, q) == order(0, 0, q)
        assert len({str(order(s, e, q)) for s in range(2) for e in range(3)}) == 6
    assert str(order(0, 1, 1)) != str(order(1, 0, 1))


def test_known_order():
    """Pinned: a change here changes every run that resumes."""
    assert list(EpochSampler(8, 3, seed=0)) == [[3, 0, 6], [1, 7, 5], [4, 2]]


def test_groups(tmp_path, make):
    """Batches of 12 with 4 questions an image, on images of 4, 8 or 12 questions: three images each, groups mixed anew each epoch."""
    entries = []
    for n in range(12):
        make.image(tmp_path / "images" / f"synpic{n}.jpg")
        entries += [make.rad_entry(n, qid=f"{n}-{k}") for k in range(4 * (1 + n % 3))]
    make.json(tmp_path / "trainset.json", entries)
    samples = load_samples(tmp_path)
    sampler = EpochSampler(samples, 12, questions_per_image=4)
    together = Counter()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        for batch in sampler:
            groups = [[samples[i] for i in batch[j : j + 4]] for j in (0, 4, 8)]
            assert all(len({s.image for s in group}) == 1 for group in groups)
            together.update(frozenset(s.qid for s in group) for group in groups)
    big = [group for group in together if next(iter(group)).startswith("2-")]  # an image of 12 questions
    assert len(big) > 100


def test_grouping_saves_images(samples):
    def distinct(q):
        return sum(len({samples[i].image for i in b}) for b in EpochSampler(samples, 8, questions_per_image=q))

    assert distinct(8) <= 6 + 2 < distinct(1)  # each of the 6 images once, and at most one cut at each of the 2 borders


def test_no_group_is_broken_where_a_whole_one_fits(tmp_path, make):
    """Images of 4 and of 2 questions fill batches of 4 exactly, in any order: a 2 waits for the next 2, never for half a 4."""
    for n in range(12):
        make.image(tmp_path / "images" / f"synpic{n}.jpg")
    make.json(tmp_path / "trainset.json", [make.rad_entry(n) for n in range(12) for _ in range(4 if n < 6 else 2)])
    samples = load_samples(tmp_path)
    for seed in range(5):
        batches = list(EpochSampler(samples, 4, seed=seed, questions_per_image=4))
        assert sorted(len({samples[i].image for i in b}) for b in batches) == [1] * 6 + [2] * 3


def test_resuming_within_an_epoch(dataset):
    whole = EpochSampler(dataset, 4, seed=3, questions_per_image=2)
    whole.set_epoch(7)
    batches = list(whole)
    again = EpochSampler(dataset, 4, seed=3, questions_per_image=2)
    again.set_epoch(7, start_batch=2)
    assert list(again) == batches[2:] and len(again) == len(batches)
    again.set_epoch(8)  # from its first batch
    assert sorted(i for b in again for i in b) == list(range(23))


def test_identity_tells_orders_apart(dataset):
    same = {"batch_size": 4, "seed": 3, "questions_per_image": 2}
    identity = EpochSampler(dataset, **same).identity()
    assert json.loads(json.dumps(identity)) == identity == EpochSampler(dataset.samples, **same).identity()
    changes = ({"batch_size": 5}, {"seed": 4}, {"questions_per_image": 3}, {"drop_last": True})
    assert all(EpochSampler(dataset, **(same | change)).identity() != identity for change in changes)
    reordered = [*dataset.samples[1:], dataset.samples[0]]
    assert {k for k, v in EpochSampler(reordered, **same).identity().items() if v != identity[k]} == {"samples"}


def test_bad_samplers(dataset):
    for options in ({"batch_size": 0}, {"batch_size": 2.0}, {"batch_size": 2, "questions_per_image": 0}):
        with raises("use a whole number of 1 or more"):
            EpochSampler(dataset, **options)
    with raises("needs the samples, not their number"):
        EpochSampler(10, 2, questions_per_image=2)
    with raises("0 samples"):
        EpochSampler(0, 2)
    with raises("start_batch=7"):
        EpochSampler(dataset, 4).set_epoch(0, start_batch=7)


def test_real_vqa_rad(real_rad):
    samples = load_samples(real_rad)
    images = {}
    for q in (1, 5, 10):
        batches = list(EpochSampler(samples, 20, questions_per_image=q))
        assert sorted(i for b in batches for i in b) == list(range(3064))
        images[q] = sum(len({samples[i].image for i in b}) for b in batches) / len(batches)
    assert images[1] > 18 and images[5] < 5.5 and images[10] < 3.5


def test_samples_without_an_image_are_not_grouped():
    @dataclasses.dataclass
    class Text:
        image: None = None
        image_name: str = ""
        question: str = ""
        answer: str = ""

    orders = [list(EpochSampler([Text()] * 8, 4, seed=seed, questions_per_image=4)) for seed in range(20)]
    assert len({str(sorted(batch)) for order in orders for batch in order}) > 10  # one group of eight would be cut into two fixed halves
