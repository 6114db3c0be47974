"""Adapters merged into the projections that read them: the same outputs, one modality at a time."""

import pytest
import torch

import fastpeft as fp

SHAPE = {"text_config": {"num_key_value_heads": 2}}


def build(plan, name="lavin-tiny", dtype=torch.float64, **shape):
    torch.manual_seed(1)
    model = fp.adapt(fp.build(name, dtype=dtype, **shape), plan)
    for key, p in model.named_parameters():
        if p.requires_grad:
            p.data += (0.3 if "adapter" in key else 0.05) * torch.randn_like(p)
    return model.eval()


def batch(image, dtype=torch.float64):
    torch.manual_seed(0)
    ids = torch.randint(3, 400, (3, 9))
    given = {"input_ids": ids, "labels": torch.where(torch.arange(9) > 5, ids, -100)}
    if image:
        places = (torch.arange(9) > 1) & (torch.arange(9) < 6)
        given |= {"pixel_values": torch.randn(3, 3, 32, 32, dtype=dtype), "image_mask": places.expand(3, -1)}
    return given


BLOCK = "RepAdapter(position=block)/T/MMAdapter(position=block)+LoRA"


@pytest.mark.parametrize("plan", ["MMAdapter/T/MMAdapter", "RepAdapter/T/MMAdapter", "F/F/MMAdapter+LoRA", "LoRA/T/MMAdapter+IA3", BLOCK])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_merged_for_a_modality(plan, modality, tmp_path):
    model = build(plan, **SHAPE)
    given, other = (batch(image=(modality == "image") == same) for same in (True, False))
    with torch.no_grad():
        want, wrong = model(**given), model(**other).loss
        assert fp.merge(model, modality=modality) is model
        got = model(**given)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-9)
    assert torch.isfinite(wrong)
    assert not any("mm_adapter" in name for name, _ in model.llm.named_parameters())
    with pytest.raises(ValueError, match="merged for samples with"):
        model(**other)
    routed_image = modality == "image" and plan.startswith("MMAdapter")
    assert (str(model.fastpeft_plan) == "MMAdapter/F/F") if routed_image else (model.fastpeft_plan is None)
    if not routed_image:
        model.save_pretrained(tmp_path / "merged")
        again = fp.build(tmp_path / "merged", dtype=torch.float64)
        torch.testing.assert_close(again(**given).logits, want.logits, rtol=1e-9, atol=1e-9)
        assert fp.count(model)["adapters"] == 0


@pytest.mark.parametrize("methods", ["MMAdapter+LoRA+IA3", "IA3+LoRA+MMAdapter"])
def test_methods_of_one_part_are_merged_from_the_inside_whatever_their_order(methods):
    model, given = build(f"{methods}/T/{methods}", **SHAPE), batch(image=True)
    with torch.no_grad():
        want = model(**given).logits
        torch.testing.assert_close(fp.merge(model, modality="image")(**given).logits, want, rtol=1e-9, atol=1e-9)
    assert str(model.fastpeft_plan) == "MMAdapter/F/F"  # what no weight can hold, and nothing else
    assert fp.count(model)["trainable"] == 0 and not any("lora" in name or "ia3" in name for name, _ in model.named_parameters())


def test_merging_while_training_takes_the_mixture_without_dropout():
    model = build("F/F/MMAdapter", **SHAPE)
    for layer in model.llm.model.layers:
        layer.mm_adapter.dropout = 0.5
    given = batch(False)
    want = model(**given).loss
    torch.testing.assert_close(fp.merge(model.train(), modality="text").eval()(**given).loss, want, rtol=1e-12, atol=0)


def test_merged_generation_and_rounding():
    model = build("F/F/MMAdapter", dtype=torch.float32)
    ids = batch(False)["input_ids"]
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(fp.merge(model, modality="text").generate(ids, max_new_tokens=6, do_sample=False), want)


def test_a_plain_adapter_needs_no_modality(tmp_path):
    model = build("RepAdapter", "llama-tiny")
    ids = batch(False)["input_ids"]
    want = model(ids).logits
    with pytest.raises(ValueError, match="modality= is for MMAdapter"):
        fp.merge(model, modality="text")
    fp.merge(model).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(fp.build(tmp_path / "merged", dtype=torch.float64)(ids).logits, want, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_merged():
    model = build("MMAdapter/T/MMAdapter")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for modality in (None, "sound"):
        with pytest.raises(ValueError, match="say which, modality='text' or 'image'"):
            fp.merge(model, modality=modality)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and model.config.modality is None
    with pytest.raises(ValueError, match="has no modality tokens"):
        fp.merge(build("MMAdapter", "llama-tiny"), modality="text")
