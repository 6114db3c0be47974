"""Training on a GPU is training on the CPU: the same losses, and no wait for the device inside a step. Also on tests/cuda/lookalike.py."""

import contextlib

import pytest
import torch

import fastpeft as fp

pytestmark = pytest.mark.gpu


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", ["F/LoRA/LoRA", "LoRA/LoRA/LoRA", "F/IA3/Prefix", "T/T/T", "LayerNorm/Attention/FFN", "IA3/PTv2/FFN"])
def test_a_run(runs, phantoms, tmp_path, plan):
    got = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        trainer = runs.trainer(phantoms, plan, device=device, steps=3, out=str(out), questions_per_image=2, evaluate=True)
        assert trainer.fit()["steps"] == 3
        got[device] = [row["loss"] for row in runs.metrics(out)]
    assert got["cuda"] == pytest.approx(got["cpu"], rel=1e-4)


@pytest.mark.parametrize("plan", ["F/LoRA/LoRA", "LoRA/LoRA/LoRA", "F/IA3/Prefix", "T/T/T"])
def test_a_step_waits_for_nothing(runs, phantoms, plan):
    trainer = runs.trainer(phantoms, plan, device="cuda", steps=3, feature_cache=False)
    batches = next(iter(trainer._batches()))
    inputs = fp.train.trainer.to_device(batches[0], trainer.inputs, trainer.device, trainer.dtype, trainer.model)
    trainer.model.train()
    trainer.model(**inputs).loss.backward()
    with no_waiting():
        trainer.model(**inputs).loss.backward()
