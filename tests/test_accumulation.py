"""HF Trainer with gradient accumulation: 8 samples as 4 batches of 2 train as 1 batch of 8 does, in every model."""

import copy

import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering, LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel
from transformers.trainer_callback import TrainerCallback

import fastpeft as fp
from fastpeft.models.llava import llava_med_config
from fastpeft.models.miss import miss_config

LENGTHS = (5, 3, 4, 5, 2, 5, 3, 4)  # of the labelled part: no two batches of 2 have equally many labels


def blip_samples(miss, padding):
    batch = miss.batch(8)
    for i, n in enumerate(LENGTHS):
        batch["labels"][i, n:] = padding
    return batch


def causal_samples(config, first_id=5):
    torch.manual_seed(6)
    ids = torch.randint(first_id, 300, (8, 24))
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for i, n in enumerate(LENGTHS):
        labels[i, 19 - n : 19] = ids[i, 19 - n : 19]
        mask[i, 19:] = 0 if i % 2 else 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_images(samples, size=32):
    return samples | {"pixel_values": torch.randn(8, 3, size, size, dtype=torch.float64)}


def build(kind, miss):
    """(model, its 8 samples as one batch)."""
    torch.manual_seed(4)
    if kind in ("BlipForQuestionAnswering", "BlipForConditionalGeneration", "BlipTextLMHeadModel"):
        config = miss_config(tiny=True, **miss.SMALL)
        samples = blip_samples(miss, -100)
        ids = samples["labels"].masked_fill(samples["labels"] == -100, 0)
        if kind == "BlipForQuestionAnswering":
            model, samples = BlipForQuestionAnswering(config), samples | {"decoder_input_ids": ids}
        elif kind == "BlipForConditionalGeneration":
            model = BlipForConditionalGeneration(config)
            samples = {"pixel_values": samples["pixel_values"], "input_ids": ids, "labels": samples["labels"]}
        else:
            model, samples = BlipTextLMHeadModel(config.text_config), {"input_ids": ids, "labels": samples["labels"]}
        model = model.double()
        fp.optimize(model)
        return model, samples
    if kind == "miss":
        return miss.build("LoRA/T/T"), blip_samples(miss, -100)
    if kind == "LlavaForConditionalGeneration":
        model = LlavaForConditionalGeneration(llava_med_config("llava-med-tiny")).double()
        fp.optimize(model)
    else:
        model = fp.build(kind, dtype=torch.float64)
    samples = with_images(causal_samples(model.config)) if kind != "llama-tiny" else causal_samples(model.config)
    if "llava" in kind.lower():
        samples["input_ids"][:, :16] = model.config.image_token_index
    if kind == "lavin-tiny":
        samples["image_mask"] = torch.zeros_like(samples["input_ids"])
        samples["image_mask"][:, 2 : 2 + model.config.visual_tokens] = 1
        return fp.adapt(model, "F/T/MMAdapter", dropout=0.0), samples
    if kind == "excitor-tiny":
        return fp.adapt(model, "F/Excitor", gate_std=0.5), samples
    return model, samples


def train(model, samples, batch_size, folder):
    """(logged loss, gradients that the optimizer would have seen) of one step."""
    gradients = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    data = [{name: t[i] for name, t in samples.items()} for i in range(8)]
    collate = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # noqa: E731
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size, "max_steps": 1}
    options |= {"use_cpu": True, "report_to": [], "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(folder, **options, remove_unused_columns=False)
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=data, data_collator=collate, callbacks=[Take()])
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients


KINDS = ("miss", "llama-tiny", "llava-med-tiny", "lavin-tiny", "excitor-tiny", "LlavaForConditionalGeneration")
KINDS += ("BlipForQuestionAnswering", "BlipForConditionalGeneration", "BlipTextLMHeadModel")


@pytest.mark.parametrize("kind", KINDS)
def test_four_batches_of_two_are_one_of_eight(kind, miss, tmp_path):
    model, samples = build(kind, miss)
    miss.without_dropout(model)
    want, wanted = miss.step(copy.deepcopy(model), samples)
    for batch_size in (8, 2):
        loss, gradients = train(model, samples, batch_size, tmp_path)
        assert loss == pytest.approx(want, rel=1e-5)  # logged in float32
        miss.assert_same(gradients, wanted, 1e-9)


def test_items_divide_the_sum(miss):
    """Given by hand, at any reduction: a sum that was asked for stays one."""
    decoder, samples = build("BlipTextLMHeadModel", miss)
    with torch.no_grad():
        total = decoder(**samples, reduction="sum").loss
        torch.testing.assert_close(decoder(**samples, num_items_in_batch=torch.tensor(100)).loss, total / 100)
        for reduction in ("sum", "none"):
            want = decoder(**samples, reduction=reduction).loss
            assert torch.equal(decoder(**samples, reduction=reduction, num_items_in_batch=100).loss, want)
    model, samples = build("miss", miss)
    for network in (model.eval(), miss.plain(model)):  # of MISS the items are samples
        with torch.no_grad():
            torch.testing.assert_close(network(**samples, num_items_in_batch=32).loss, network(**samples).loss / 4)
