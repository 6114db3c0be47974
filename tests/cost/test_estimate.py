"""Estimates against what the same step measures when it runs."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import fastpeft as fp
from fastpeft.cli import app
from fastpeft.cost import estimate as module
from fastpeft.cost.batches import AskedStep, inputs_for
from fastpeft.cost.profile import measure
from fastpeft.data.buckets import measured_batch, padded
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.models import family_of
from fastpeft.static_shapes import Seeds, static_shapes

TABLES = Path(__file__).resolve().parents[3] / "shared" / "tables" / "params.json"
CASES = [
    *(("miss-tiny", plan, {}) for plan in ("F/LoRA/LoRA", "LoRA/LoRA/LoRA", "T/T/T", "IA3/IA3/IA3", "T/Prefix/PTv2", "F/LayerNorm/FFN")),
    ("miss-tiny", "T/LoRA/LoRA", {"questions_per_image": 4}),
    ("miss-tiny", "F/LoRA/LoRA", {"feature_cache": False}),
    ("miss-tiny", "F/F/LoRA", {}),
    ("miss-tiny", "F/F/T", {"seq_len": 33, "answer_len": 9}),
    *(("llama-tiny", plan, {"seq_len": 48}) for plan in ("LoRA", "T", "Excitor", "AdaptionPrompt", "IA3", "PTv2")),
    ("lavin-tiny", "MMAdapter/T/MMAdapter", {"seq_len": 40}),
    ("excitor-tiny", "F/Excitor", {"seq_len": 40}),
    ("llava-med-tiny", "F/T/LoRA/T", {"seq_len": 40}),
]


BF16 = ("LoRA/LoRA/LoRA", "T/T/T", "LoRA", "T", "Excitor", "MMAdapter/T/MMAdapter", "F/Excitor", "F/T/LoRA/T")


@pytest.mark.parametrize("name, plan, how, dtype", [(*c, kind) for c in CASES for kind in ("fp32", *(["bf16"] * (c[1] in BF16)))])
def test_within_five_percent_of_the_step(name, plan, how, dtype):
    model = fp.adapt(fp.build(name, dtype=module.DTYPES[dtype]), plan).train()
    told = {"seq_len": None, "answer_len": None, "questions_per_image": 1, "feature_cache": True, "cache_layers": False}
    step = AskedStep(batch_size=8, gradient_accumulation=1, dtype=dtype, optimized=True, quantize=None, **told | how)
    inputs = inputs_for(model, step, module.DTYPES[dtype])
    inputs = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in inputs.items()}
    with measure(model) as cost, lean_logits(model):
        model(**inputs).loss.backward()
    e = fp.estimate(name, plan, batch_size=8, dtype=dtype, **how)
    assert e.flops_per_sample * 8 == pytest.approx(cost.flops, rel=0.05)
    assert e.saved_bytes == pytest.approx(cost.saved_bytes, rel=0.05)
    assert e.weight_bytes == pytest.approx(sum(t.nbytes for t in (*model.parameters(), *model.buffers())), rel=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert e.optimizer_bytes == sum(p.numel() * (12 if p.dtype == torch.bfloat16 else 8) for p in trained)
    assert e.peak_bytes - e.process_bytes >= e.weight_bytes + e.optimizer_bytes + 0.99 * e.saved_bytes


def test_full_size_allocates_nothing():
    before = psutil.Process().memory_info().rss
    e = fp.estimate("llama-7b", "Excitor", batch_size=4, dtype=torch.bfloat16, gpu_memory="24GB")
    assert psutil.Process().memory_info().rss - before < 500e6
    assert e.weight_bytes == pytest.approx(13.5e9, rel=0.01) and e.fits and e.peak_bytes < 20.5e9


@pytest.mark.slow
def test_the_largest_batch_is_the_largest():
    e = fp.estimate("miss-tiny", "LoRA/LoRA/LoRA", batch_size=4, gpu_memory="1.2GB")
    n, room = e.largest_batch_size, 1.2e9 - module.RESERVE

    def peak(size):
        found = fp.estimate("miss-tiny", "LoRA/LoRA/LoRA", batch_size=size)
        return found.peak_bytes - found.process_bytes

    assert e.fits and n > 4 and peak(n) <= room < peak(n + 1)


@pytest.mark.slow
def test_what_does_not_fit_comes_with_advice():
    e = fp.estimate("miss-tiny", "LoRA/LoRA/LoRA", batch_size=64, gpu_memory="1.1GB")
    assert not e.fits and 0 < e.largest_batch_size < 64
    assert "questions per image" in e.advice[0] and e.advice[-1].endswith(", fits")
    assert fp.estimate("miss-tiny", "F/LoRA/LoRA", batch_size=1, gpu_memory="1.01GB").largest_batch_size == 0


def test_ours_against_transformers_execution():
    ours, theirs = (fp.estimate("miss-tiny", "LoRA/LoRA/LoRA", batch_size=2, optimized=flag) for flag in (True, False))
    assert ours.saved_bytes < 0.7 * theirs.saved_bytes


@pytest.mark.slow
def test_the_papers_memory():
    """MILE's columns: within 2 GB of transformers' execution, and in the same order."""
    if not TABLES.is_file():
        pytest.skip("the papers' tables are not here")
    rows = [row for row in json.loads(TABLES.read_text()) if row.get("paper_memory_gb") and row["plan"].startswith(("F/", "T/T/T"))]
    computed = []
    for row in sorted(rows, key=lambda row: row["paper_memory_gb"]):
        options = {"r": row["rank"]} if row["rank"] else {}
        e = fp.estimate("miss", row["plan"], batch_size=20, seq_len=35, optimized=False, feature_cache=False, **options)
        held = max(e.peak_bytes - e.process_bytes, e.weight_bytes + e.gradient_bytes + e.optimizer_bytes + e.saved_bytes) / 1e9
        assert abs(held - row["paper_memory_gb"]) < 2
        computed.append(held)
    assert computed == sorted(computed) and len(computed) > 3


class Held(TorchDispatchMode):
    """The most bytes that what is made inside holds at once, beside the tensors ``there``."""

    def __init__(self, there):
        super().__init__()
        self.sizes, self.peak = {t.untyped_storage()._cdata: 0 for t in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("name, plan", [("miss-tiny", "F/LoRA/LoRA"), ("llama-tiny", "LoRA")])
def test_bytes_of_cuda_graphs(name, plan):
    """Weights, moments, gradients and inputs that stay, the pool of the graphs, and an eager batch beside it; as a step holds them."""
    lengths = {"seq_len": 21, "answer_len": 5}
    model = fp.adapt(fp.build(name), plan).train()
    told = {"questions_per_image": 1, "feature_cache": True, "cache_layers": False, "gradient_accumulation": 1}
    step = AskedStep(batch_size=3, dtype="fp32", optimized=True, quantize=None, **lengths | told)
    batch = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in inputs_for(model, step, torch.float32).items()}
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if name == "miss-tiny":
        batch |= {"decoder_input_ids": batch["labels"], "decoder_attention_mask": torch.ones_like(batch["labels"])}
    own = measured_batch(batch, {}, 3, family_of(model).image_tokens(model.config))
    bucket = own.bucket.rounded(128)
    inputs, seeds = padded(own, bucket), Seeds(0, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    there = [*model.parameters(), *model.buffers(), *inputs.values(), *(p.grad for p in model.parameters() if p.requires_grad)]
    with lean_logits(model), static_shapes(bucket.sizes, seeds), Held(there) as held:
        model(**inputs, num_items_in_batch=torch.ones(())).loss.backward()
    e = module._estimate_step(name, plan, step, {}, on_cpu=False, batch=None, graphed=True)
    assert bucket.length == 24 and e.process_bytes == 0
    assert e.peak_bytes == module._estimate_step(name, plan, step, {}, on_cpu=False, batch=None, graphed=False).peak_bytes
    stays = e.weight_bytes + e.optimizer_bytes + e.gradient_bytes + sum(t.nbytes for t in inputs.values())
    assert e.graph_bytes == pytest.approx(stays + 2 * held.peak - e.peak_bytes, rel=0.03)
    for change in ({"cache_layers": True}, {"quantize": "4bit"}) if name == "llama-tiny" else ({"optimized": False},):
        without = module._estimate_step(name, plan, replace(step, **change), {}, on_cpu=False, batch=None, graphed=True)
        assert without.graph_bytes == 0


def test_command_line(capsys):
    app(["estimate", "--model", "miss-tiny", "--plan", "F/LoRA/LoRA", "--gpu-memory", "4GB", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    fields = {"flops_per_sample", "weight_bytes", "optimizer_bytes", "saved_bytes", "peak_bytes", "fits", "largest_batch_size"}
    assert fields <= found.keys() and found["fits"] is True
    assert found["graph_bytes"] > 0 and any("CUDA graphs take" in note for note in found["notes"])


BAD = [
    ({"batch_size": 0}, "batch_size must be a whole number of 1 or more"),
    ({"dtype": "int3"}, "dtype must be one of fp32, bf16, fp16"),
    ({"gpu_memory": "24 apples"}, "is no size in bytes"),
    ({"gpu_memory": "24"}, "'24' has no unit; write it as 24GB"),
    ({"seq_len": 129}, "seq_len=129 is more than the model's 128 positions"),
    ({"answer_len": 129}, "answer_len=129 is more than the model's 128 positions"),
    ({"model": "llava-med-tiny", "plan": "F/T/LoRA/T", "seq_len": 4}, "seq_len=4 leaves no room"),
    ({"model": "llama-tiny", "plan": "LoRA", "seq_len": 4, "answer_len": 5}, "seq_len=4 leaves no room"),
    ({"plan": "F/F/F"}, "nothing to train"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        fp.estimate(**{"model": "miss-tiny", "plan": "F/LoRA/LoRA"} | bad)
