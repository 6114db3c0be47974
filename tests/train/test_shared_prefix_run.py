"""Runs whose samples share what they begin with: the steps of those that do not, fewer tokens computed, and what they say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft.data import CausalDataset, train_causal_tokenizer
from fastpeft.data.images import Preprocess
from fastpeft.data.samples import Instruction
from fastpeft.runs.estimate import run_of
from fastpeft.train.validation import Validation, ValidationData
from fastpeft.verify.baseline import without_dropout

ASKED = "Which of the organs that are shown here is the largest of all that one can see, number"


@pytest.fixture
def trained(tmp_path):
    """A function: the trainer of three steps on eight questions about two images, dropout off, with more options."""
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (40, 40), {"a": "red", "b": "blue"}[name]).save(tmp_path / f"{name}.png")
    samples = [
        Instruction(((f"{ASKED} {i}?", f"organ {i}"),), tmp_path / f"{'ab'[i % 2]}.png", "vqa", str(i), i, Path(), data="xy"[i % 2])
        for i in range(8)
    ]
    tokenizer = train_causal_tokenizer([text for sample in samples for text in sample.turns[0]])

    def run(name="llava-med-tiny", plan="F/F/LoRA/F", **config):
        torch.manual_seed(0)
        model = without_dropout(fp.adapt(fp.build(name, pretrained=False, seed=1, dtype=torch.float64), plan))
        size, places = model.config.vision_config.image_size, getattr(model.config, "image_seq_length", 0)
        places = getattr(model.config, "visual_tokens", places)
        data = CausalDataset(samples, tokenizer, "llava", 512, preprocess=Preprocess(size, (0.5,) * 3, (0.5,) * 3), image_tokens=places)
        how = {"steps": 3, "batch_size": 8, "questions_per_image": 4, "progress": False, "device": "cpu", "learning_rate": 1e-2}
        trainer = fp.Trainer(model, data, fp.TrainConfig(**how | config))
        return trainer, trainer.fit()

    return run


@pytest.mark.parametrize("name, plan", [("llava-med-tiny", "F/F/LoRA/F"), ("lavin-tiny", "F/T/MMAdapter"), ("excitor-tiny", "F/Excitor")])
def test_the_steps_of_separate_samples(trained, name, plan):
    """Losses, by data set too, and samples and tokens counted; fewer FLOPs and bytes; the summary says so."""
    options = {"memory_budget": "8GB"} if name == "llava-med-tiny" else {}
    (one, shared), (other, alone) = (trained(name, plan, share_prefix=share, **options) for share in (True, False))
    assert one.done["last_losses"] == pytest.approx(other.done["last_losses"], rel=2e-5)
    assert one.done["tokens"] == other.done["tokens"] and one.done["sources"].keys() == other.done["sources"].keys() == {"x", "y"}
    for source, entry in one.done["sources"].items():
        assert entry["losses"] == pytest.approx(other.done["sources"][source]["losses"], rel=2e-5)
    assert shared["flops_per_sample"] < 0.8 * alone["flops_per_sample"]
    assert shared["saved_bytes_per_step"] < 0.8 * alone["saved_bytes_per_step"]
    said = [note for note in shared["notes"] if "share what they begin with" in note]
    assert len(said) == 1 and "fewer tokens" in said[0] and not any("share" in note for note in alone["notes"])


def test_validation_shares_too(trained):
    """The loss of separate samples; an image's questions, however they lie in the data, are computed together."""
    found = []
    for share in (True, False):
        trainer, _ = trained(share_prefix=share)
        config = replace(trainer.config, eval_every=1, batch_size=5, eval_scores=False)
        validation = Validation(trainer.model, ValidationData(trainer.dataset), config, trainer.scoring, trainer.device)
        with FlopCounterMode(display=False) as counted:
            found.append((validation.loss(), counted))
    (one, few), (other, many) = found
    assert one == pytest.approx(other, rel=1e-6) and few.get_total_flops() < 0.8 * many.get_total_flops()


def test_an_estimate_of_the_run_knows(trained):
    trainer, _ = trained()
    run, alone = (run_of(trainer.dataset, 8, 0, 4, share) for share in (True, False))
    assert "prefix_lengths" in run.batch and "prefix_lengths" not in alone.batch
    assert (run.seq_len, run.answer_len) == (alone.seq_len, alone.answer_len)
    found = [fp.estimate("llava-med-tiny", "F/F/LoRA/F", batch_size=8, seq_len=60, questions_per_image=q).saved_bytes for q in (1, 4)]
    assert found[1] < 0.9 * found[0]
