"""Runs of every method, family and option in CUDA graphs: losses, weights and moments are an eager run's, to the bit."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import fastpeft as fp
from fastpeft.data import CausalDataset, Preprocess, train_causal_tokenizer
from fastpeft.data.samples import Instruction
from fastpeft.train import graph
from fastpeft.train.graph import GraphedStep
from fastpeft.verify.baseline import without_dropout

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
RUN = {"epochs": 3, "batch_size": 5, "progress": False, "device": "cuda"}


def ended(trainer):
    """(losses, weights, moments) of a run to its end."""
    trainer.fit()
    moments = trainer.optimizer.state_dict()["adamw"]["state"]
    weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer.done["last_losses"], weights, {(i, n): t.detach().cpu() for i, state in moments.items() for n, t in state.items()}


def check(make, monkeypatch, closely=1e-4, replays=True):
    """``closely``: to how much of a loss a run without graphs agrees; None: dropout draws otherwise."""
    graphed = make()
    losses, weights, moments = ended(graphed)
    if not replays:
        assert graphed.step.said() and not getattr(graphed.step, "replayed", 0)
        return graphed.step.said()
    assert isinstance(graphed.step, GraphedStep) and graphed.step.replayed and not graphed.step.changes, graphed.step.said()
    with monkeypatch.context() as patch:
        patch.setattr(graph, "MOST", 0)
        eager = make()
        expected, same_weights, same_moments = ended(eager)
        assert eager.step.replayed == 0
    assert losses == expected
    assert weights.keys() == same_weights.keys() and moments.keys() == same_moments.keys()
    assert [name for name in weights if not torch.equal(weights[name], same_weights[name])] == []
    assert [name for name in moments if not torch.equal(moments[name], same_moments[name])] == []
    if closely:
        assert losses == pytest.approx(ended(make(cuda_graph=False))[0], rel=closely)
    return ""


MISS = [
    *("F/LoRA/LoRA", "LoRA/LoRA/LoRA", "IA3/IA3/IA3", "F/Prefix/Prefix", "F/PTv2/PTv2", "LayerNorm/LayerNorm/LayerNorm"),
    *("Attention/Attention/Attention", "FFN/FFN/FFN", "T/T/T", "F/IA3/Prefix", "F/F/LoRA", "F/T/PTv2", "T/F/F", "F/LoRA+IA3/Prefix+LoRA"),
]


@pytest.mark.parametrize("each", [1, 5])
@pytest.mark.parametrize("plan", MISS)
def test_miss(runs, phantoms, monkeypatch, plan, each):
    def make(**more):
        trainer = runs.trainer(phantoms, plan, small=runs.SHALLOW, samples=14, questions_per_image=each, **RUN | more)
        without_dropout(trainer.model)
        return trainer

    check(make, monkeypatch)


OPTIONS = [
    *({"dtype": "bf16"}, {"gradient_accumulation": 2}, {"max_grad_norm": 0}, {"feature_cache": False}, {"batch_size": 1, "samples": 4}),
    *({"without": "labelled"}, {"warmup": 3, "min_learning_rate": 1e-4}, {"dtype": "bf16", "gradient_accumulation": 2}),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_with_dropout(runs, phantoms, monkeypatch, options):
    how = RUN | {"samples": 14} | options
    check(
        lambda **more: runs.trainer(phantoms, "LoRA/LoRA/IA3", small=runs.SHALLOW | runs.DROPOUT, **how | more), monkeypatch, closely=None
    )


def test_features_from_files(runs, phantoms, monkeypatch, tmp_path):
    how = RUN | {"samples": 14, "feature_cache_dir": str(tmp_path / "kept")}
    check(lambda **more: runs.trainer(phantoms, small=runs.SHALLOW | runs.DROPOUT, **how | more), monkeypatch, closely=None)


def test_steps_that_say_why_not(runs, phantoms, monkeypatch):
    for options, why in (({"on_nan": "skip"}, "on_nan=skip"), ({"memory_budget": "6GB"}, "memory_budget")):
        trainer = runs.trainer(phantoms, small=runs.SHALLOW, samples=14, **RUN | options)
        assert why in trainer.step.said() and not isinstance(trainer.step, GraphedStep)


@pytest.fixture
def asked(tmp_path):
    """A function: the trainer of a causal model on questions of different lengths about two images."""
    for name in ("red", "blue"):
        Image.new("RGB", (40, 40), name).save(tmp_path / f"{name}.png")

    def make(name, plan, dropout, **more):
        sees = name != "llama-tiny"
        asked = "Which of the organs that are shown here is the largest"
        samples = []
        for i in range(14):
            turn = (f"{asked if i % 3 else 'What'} {i}?", f"organ {i}" + " or that" * (i % 4))
            image = tmp_path / f"{('red', 'blue')[i % 2]}.png" if sees and (i % 5 or name != "lavin-tiny") else None
            samples.append(Instruction((turn,), image, "vqa", str(i), i, Path()))
        tokenizer = train_causal_tokenizer([text for sample in samples for text in sample.turns[0]])
        torch.manual_seed(0)
        model = fp.adapt(fp.build(name, pretrained=False, seed=1, dtype=torch.float32), plan)
        model = model if dropout else without_dropout(model)
        how = {}
        if sees:
            places = getattr(model.config, "visual_tokens", getattr(model.config, "image_seq_length", 0))
            how = {"preprocess": Preprocess(model.config.vision_config.image_size, (0.5,) * 3, (0.5,) * 3), "image_tokens": places}
        data = CausalDataset(samples, tokenizer, "llava" if sees else "alpaca", 512, **how)
        return fp.Trainer(model, data, fp.TrainConfig(learning_rate=1e-2, **RUN | more))

    return make


CAUSAL = [
    *(
        ("llama-tiny", plan)
        for plan in ("LoRA", "Excitor", "AdaptionPrompt", "RepAdapter", "Prefix", "PTv2", "IA3", "T", "LayerNorm", "FFN")
    ),
    *(("llava-med-tiny", plan) for plan in ("F/T/LoRA/T", "LayerNorm/T/LayerNorm/F", "LoRA/T/Prefix/F", "F/T/PTv2/F", "F/T/IA3/F")),
    *(("lavin-tiny", "MMAdapter/T/MMAdapter"), ("lavin-tiny", "F/T/MMAdapter"), ("excitor-tiny", "F/Excitor")),
]


@pytest.mark.parametrize("name, plan", CAUSAL)
def test_causal(asked, monkeypatch, name, plan):
    check(lambda **more: asked(name, plan, False, **more), monkeypatch)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"gradient_accumulation": 2}, {"feature_cache": False}], ids=str)
@pytest.mark.parametrize("name, plan", [("llama-tiny", "LoRA"), ("llava-med-tiny", "F/T/LoRA/T"), ("lavin-tiny", "MMAdapter/T/MMAdapter")])
def test_causal_options_with_dropout(asked, monkeypatch, name, plan, options):
    check(lambda **more: asked(name, plan, True, **options | more), monkeypatch, closely=None)


@pytest.mark.parametrize("name, plan", [("llava-med-tiny", "F/T/LoRA/T"), ("excitor-tiny", "F/Excitor")])
def test_samples_that_share_what_they_begin_with(asked, monkeypatch, name, plan):
    """They are no graph, and say so; told not to share, they are."""

    def make(**more):
        return asked(name, plan, False, questions_per_image=4, **more)

    assert "share what they begin with" in check(make, monkeypatch, replays=False)
    check(lambda **more: make(share_prefix=False, **more), monkeypatch)
