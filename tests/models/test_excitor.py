"""Excitor's multimodal model: counts, images in batches, generation, files, runs."""

import pytest
import torch

import fastpeft as fp


@pytest.fixture
def model():
    model = fp.adapt(fp.build("excitor-tiny", dtype=torch.float64), "F/Excitor", gate_std=0.5)
    for name, p in model.named_parameters():
        if name.endswith("_up"):
            torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(3, 400, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    labels = torch.where((torch.arange(9) > 2) & mask.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels, "image_index": torch.tensor([1, 0, -1])}


@pytest.mark.parametrize(
    "name, trained", [("excitor-7b", 12_288_000 + 960), ("excitor-13b", 30 * (5120 * 62 + 40 + 2 * 16 * (768 + 5120)))]
)
def test_counts(name, trained):
    model = fp.adapt(fp.build(name, device="meta"), "F/Excitor")
    assert fp.count(model)["trainable"] == trained
    assert fp.count(model)["parts"]["vision"]["trainable"] == 0


def test_a_batch_equals_its_samples(model, batch):
    together = model.train()(**batch).loss
    terms = (batch["labels"][:, 1:] != -100).sum(1)
    total = 0.0
    for b, image in enumerate(batch["image_index"].tolist()):
        n = int(batch["attention_mask"][b].sum())
        one = {"input_ids": batch["input_ids"][b : b + 1, :n], "labels": batch["labels"][b : b + 1, :n]}
        if image >= 0:
            one["pixel_values"] = batch["pixel_values"][image : image + 1]
        total = total + model(**one).loss * terms[b]
    torch.testing.assert_close(together, total / terms.sum())
    assert abs(together - model(**batch | {"image_index": torch.tensor([0, 1, -1])}).loss) > 1e-8


def test_features_in_place_of_pixels_and_packing(model, batch):
    want = model.train()(**batch).loss
    pixels = batch.pop("pixel_values")
    features = model.encode_images(pixels)
    tower = model.vision
    assert features.shape == (2, 17, 48)
    torch.testing.assert_close(features[:, 0], tower(pixels).image_embeds)
    torch.testing.assert_close(model(**batch, image_embeds=features).loss, want)
    real, labels = batch["attention_mask"].bool(), batch["labels"].clone()
    labels[:, 0] = -100
    packed = {"input_ids": batch["input_ids"][real][None], "labels": labels[real][None], "image_index": batch["image_index"]}
    packed["position_ids"] = torch.cat([torch.arange(int(n)) for n in real.sum(1)])[None]
    torch.testing.assert_close(model(**packed, image_embeds=features).loss, want)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_generation(model, batch, how):
    model.eval()
    how |= {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].flip(1)
    ids[1] = ids[1].roll(4)
    seen = {"pixel_values": batch["pixel_values"], "image_index": batch["image_index"]}
    together = model.generate(ids, attention_mask=mask, **seen, **how)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, use_cache=False, **seen, **how))
    one = model.generate(ids[1:2, 4:], pixel_values=batch["pixel_values"][:1], **how)
    assert torch.equal(one[0, 5:], together[1, 9:])


def test_files(model, batch, tmp_path):
    plain = fp.build("excitor-tiny", dtype=torch.float64)
    plain.save_pretrained(tmp_path / "base")
    fp.save_adapter(model, tmp_path / "adapter")
    other = fp.load_adapter(fp.build(tmp_path / "base", dtype=torch.float64), tmp_path / "adapter")
    assert torch.equal(other.eval()(**batch).loss, model.eval()(**batch).loss)


def test_wrong_images(model, batch):
    with pytest.raises(ValueError, match=r"must give each of 3 samples one of 2 images"):
        model(**batch | {"image_index": torch.tensor([0, 2, 1])})
    with pytest.raises(ValueError, match="2 images for 3 samples"):
        model(**{name: t for name, t in batch.items() if name != "image_index"})
