"""Training on a GPU is training on the CPU: the same losses, and no wait for the device inside a step. Also on tests/cuda/lookalike.py."""

import contextlib
import json
import sys

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.device import to_device
from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.train import step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def all_digits(monkeypatch):
    """PyTorch lets cuDNN round float32 images to TF32's ten bits: more than what is compared here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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
        how = {"questions_per_image": 2, "evaluate": plan in ("F/LoRA/LoRA", "F/IA3/Prefix")}
        run = runs.trainer(phantoms, plan, device=device, steps=2, out=str(out), **how)
        assert run.fit()["steps"] == 2
        got[device] = [row["loss"] for row in runs.metrics(out)]
    assert got["cuda"] == pytest.approx(got["cpu"], rel=1e-4)


def test_a_run_on_a_device_that_is_not_the_current_one(runs, phantoms, tmp_path):
    if torch.cuda.device_count() < 2 and "lookalike" not in sys.modules:
        pytest.skip("needs a second CUDA device")
    losses = {}
    for device in ("cpu", "cuda:1"):
        runs.trainer(phantoms, "F/IA3/LoRA", device=device, steps=3, out=str(tmp_path / device[-1])).fit()
        losses[device] = [row["loss"] for row in runs.metrics(tmp_path / device[-1])]
    assert losses["cuda:1"] == pytest.approx(losses["cpu"], rel=1e-4) and torch.cuda.current_device() == 0


@pytest.mark.parametrize("plan", ["F/LoRA/LoRA", "LoRA/LoRA/LoRA", "F/IA3/Prefix", "T/T/T"])
def test_a_step_waits_for_nothing(runs, phantoms, plan):
    run = runs.trainer(phantoms, plan, device="cuda", steps=3, feature_cache=False)
    batch = next(run._batches())[0][0]
    inputs = to_device(batch, run.inputs, run.device, run.dtype, run.model)
    run.model.train()
    run.model(**inputs).loss.backward()
    with no_waiting():
        run.model(**inputs).loss.backward()


@pytest.fixture
def conversations(tmp_path):
    """LLaVA conversations: of two images, and without one."""
    rows = [{"id": "text", "conversations": [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "hello"}]}]
    for colour in ("red", "green"):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": colour, "image": f"{colour}.png", "conversations": said})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


MODELS = {"llama-tiny": "LoRA", "excitor-tiny": "F/Excitor", "lavin-tiny": "MMAdapter/T/MMAdapter", "llava-med-tiny": "F/T/LoRA/T"}


@pytest.mark.parametrize("name", MODELS)
def test_a_causal_step_waits_for_nothing(conversations, monkeypatch, name):
    """One batch of text and images, packed, as the trainer hands it to the model; the same loss as on the CPU."""
    if name == "llama-tiny":
        (conversations / "train.json").write_text(json.dumps(json.loads((conversations / "train.json").read_text())[:1]))
    steps = []
    monkeypatch.setattr(step, "to_device", lambda *args: steps.append((args[-1], to_device(*args))) or steps[-1][1])
    losses = {}
    for device in ("cpu", "cuda"):
        config = fp.TrainConfig(
            steps=2, batch_size=3, progress=False, device=device, out=str(conversations / device), feature_cache=False, cuda_graph=False
        )
        losses[device] = train_run(name, MODELS[name], DataOptions(str(conversations)), config, evaluate=False)["loss_last"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    model, inputs = steps[-1]
    assert {t.device.type for t in inputs.values()} == {"cpu", "cuda"}
    with no_waiting():
        model(**inputs).loss.backward()


@pytest.mark.parametrize("lean_logits", [None, True])
def test_a_drop_ins_waits_do_not_grow_with_its_layers(lean_logits):
    """Whose masks and labels lie on the device, padded: some for what the batch is, none for a layer."""
    lookalike = pytest.importorskip("lookalike", reason="needs tests/cuda/lookalike.py: it counts waits")
    counts = []
    for layers in (3, 6):
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2, "vocab_size": 50}
        model = LlamaForCausalLM(LlamaConfig(**shape)).cuda().train()
        model.requires_grad_(False).model.layers[0].self_attn.q_proj.requires_grad_(True)
        fp.optimize(model, lean_logits=lean_logits)
        ids, mask = torch.randint(3, 50, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
        mask[1, 5:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        batch = {name: t.cuda() for name, t in batch.items()}
        for _ in range(2):
            before = len(lookalike.waits)
            model(**batch).loss.backward()
        counts.append(len(lookalike.waits) - before)
    assert counts[0] == counts[1] <= 7
