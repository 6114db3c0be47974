"""With image and question encoder frozen, a question's states are a constant: computed once, kept, in place of both encoders."""

import pytest
import torch

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.features.cache import FeatureCache
from fastpeft.features.frozen_stages import ImageFeatures, QuestionStates, longest_frozen_stages
from tests.features.test_cache import samples, trainer  # noqa: F401


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (4, 7))
    mask = (torch.arange(7) < torch.tensor([7, 4, 5, 6])[:, None]).long()
    labels = torch.randint(5, 90, (4, 4)).index_fill(1, torch.tensor(0), 1)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(2, 3, 64, 64).double()} | {
        "image_index": torch.tensor([0, 1, 1, 0])
    }


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def given(model, batch):
    with torch.no_grad():
        images = model.encode_images(batch["pixel_values"])
        states = model.encode_questions(batch["input_ids"], batch["attention_mask"], images, batch["image_index"])
    return {"question_states": states, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}


def small(plan, **more):
    model = fp.build("miss-tiny", pretrained=False, hidden_size=32, heads=2, vision_layers=2, text_layers=2, image_size=64, vocab_size=96)
    return fp.adapt(model.double(), plan, **more).train()


@pytest.mark.parametrize("plan", ["F/F/T", "F/F/IA3", "F/F/PTv2", "F/F/LayerNorm"])
def test_loss_and_gradients_are_the_plain_steps(batch, plan):
    model = small(plan)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    want, got = gradients(model, batch), gradients(model, given(model, batch))
    assert got.keys() == want.keys() and len(got) > 1
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12, msg=name)


def test_no_encoder_runs(batch):
    model, cost = small("F/F/LoRA"), {}
    for name, inputs in (("states", given(model, batch)), ("plain", batch)):
        with measure(model) as found:
            model(**inputs).loss.backward()
        cost[name] = found.flops_by_part
    assert cost["plain"]["vit"] > 0 < cost["plain"]["jtm"]
    assert cost["states"].get("vit", 0) == 0 == cost["states"].get("jtm", 0)
    assert cost["states"]["dec"] == cost["plain"]["dec"]


def test_what_cannot_be_given(batch):
    model = small("F/F/LoRA")
    states = given(model, batch)
    with pytest.raises(ValueError, match="question_states stand in for input_ids, pixel_values, image_index"):
        model(**batch, question_states=states["question_states"])
    with pytest.raises(ValueError, match="one question for each answer"):
        model(**states | {"question_states": states["question_states"][:3]})
    with pytest.raises(ValueError, match=r"attention_mask is \[4, 6\]"):
        model(**states | {"attention_mask": states["attention_mask"][:, :6]})
    with pytest.raises(ValueError, match="question_states alone"):
        model(labels=batch["labels"])


def test_training_is_the_same_with_and_without(samples, one_thread):  # noqa: F811
    runs = [trainer(samples, "F/F/LoRA", feature_cache=kept) for kept in (True, False)]
    summaries = [run.fit() for run in runs]
    assert summaries[0]["loss_last"] == pytest.approx(summaries[1]["loss_last"], rel=1e-5)
    assert summaries[0]["parts"].get("jtm", {"flops_per_sample": 0})["flops_per_sample"] == 0
    assert any("question states kept" in note for note in summaries[0]["notes"])
    for (name, p), (_, q) in zip(*(run.model.named_parameters() for run in runs)):
        if p.requires_grad:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("plan, kept", [("F/F/LoRA", QuestionStates), ("F/LoRA/LoRA", ImageFeatures), ("LoRA/F/LoRA", None)])
def test_the_longest_frozen_stages(samples, plan, kept):  # noqa: F811
    run = trainer(samples, plan)
    assert longest_frozen_stages(run.model, run.dataset) is kept


def test_dropout_that_was_asked_for_is_kept_out(samples):  # noqa: F811
    run = trainer(samples, "F/F/LoRA")
    run.model.fastpeft_plan.treatments["jtm"] = (fp.methods.Frozen(True),)
    assert longest_frozen_stages(run.model, run.dataset) is ImageFeatures
    assert (
        "question states are not kept: the frozen part jtm was asked to keep its dropout" in FeatureCache(run.model, run.dataset).notes[0]
    )


@pytest.mark.parametrize("part", ["vision_model", "text_encoder"])
def test_files_serve_again_until_a_weight_changes(samples, tmp_path, part):  # noqa: F811
    run = trainer(samples, "F/F/LoRA")
    first = FeatureCache(run.model, run.dataset, folder=tmp_path)
    items = first.stages.items()
    want = first(items)
    first.flush()
    again = FeatureCache(run.model, run.dataset, folder=tmp_path)
    assert torch.equal(again(items), want) and again.computed == 0
    next(p for name, p in run.model.named_parameters() if name.startswith(part) and p.dim() == 2).data.mul_(1.5)
    changed = FeatureCache(run.model, run.dataset, folder=tmp_path)
    assert not torch.allclose(changed(items), want) and changed.computed == len(set(items))
