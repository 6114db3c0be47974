"""Steps as CUDA graphs: replayed steps are eager ones, on tests/cuda/lookalike.py and on a GPU."""

import pytest
import torch

import fastpeft as fp

pytestmark = pytest.mark.gpu


def test_first(runs, phantoms, tmp_path):
    run = runs.trainer(phantoms, "F/LoRA/LoRA", device="cuda", steps=12, out=str(tmp_path / "a"), evaluate=False)
    summary = run.fit()
    print(run.step.said(), run.step.graphs.keys(), summary["notes"])
    plain = runs.trainer(phantoms, "F/LoRA/LoRA", device="cuda", steps=12, out=str(tmp_path / "b"), evaluate=False, cuda_graph=False)
    plain.fit()
    print([r["loss"] for r in runs.metrics(tmp_path / "a")])
    print([r["loss"] for r in runs.metrics(tmp_path / "b")])
    assert 0
