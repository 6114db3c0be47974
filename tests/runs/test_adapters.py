"""Several adapters of one base from a file: the folders that runs of their own leave, what is shared, what is refused, what it costs."""

import json

import pytest
import torch

import fastpeft as fp
from fastpeft.caching.layers import LayerCache
from fastpeft.cli import main
from fastpeft.runs import adapters
from fastpeft.runs.adapters import train_adapters
from fastpeft.runs.stages import train_recipe
from fastpeft.study.adapters import adapters_of
from fastpeft.train.together import Together

pytestmark = pytest.mark.usefixtures("one_thread")
STUDY = """
title: ranks
options: {model: miss-tiny, batch_size: 16, lora_dropout: 0.1, no_eval: true}
data: {drawn: {}}
columns: [rank, loss]
rows:
  - {name: small, plan: F/LoRA/LoRA, rank: 2}
  - {name: two seeds, plan: F/F/LoRA, rank: 4, learning_rate: 5.0e-3, seeds: [0, 1]}
"""
NAMES = ["small", "two-seeds-seed-0", "two-seeds-seed-1"]


@pytest.fixture
def study(tmp_path):
    """A function: a file of this text."""

    def write(text=STUDY):
        (tmp_path / "study.yaml").write_text(text)
        return tmp_path / "study.yaml"

    return write


@pytest.fixture
def fastpeft(monkeypatch, capfd):
    """fastpeft("train", ...) in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["fastpeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capfd.readouterr()

    return call


def files(folder):
    """What does not depend on the clock."""
    kept = [*(folder / "adapter").rglob("*"), *(folder / "checkpoint").glob("*.pt"), *(folder / "checkpoint").glob("*.safetensors")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.is_file()}


def test_a_file_of_adapters(fastpeft, runs, phantoms, study, tmp_path):
    given = ["--adapters", study(), "--data", phantoms, "--steps", 2, "--out", tmp_path / "many", "--quiet", "--device", "cpu"]
    code, out, err = fastpeft("train", *given, "--json")
    assert (code, err) == (0, "") and [line.split(":")[0] for line in out.splitlines()[:3]] == NAMES
    said = json.loads(out.splitlines()[-1])
    assert list(said["adapters"]) == NAMES and said["failed"] == {}
    assert json.loads((tmp_path / "many/adapters.json").read_text())["adapters"].keys() == set(NAMES)
    assert all(name in (tmp_path / "many/comparison.html").read_text() for name in NAMES)
    options = adapters_of(study(), {"data": str(phantoms), "steps": 2, "out": str(tmp_path / "alone"), "progress": False, "device": "cpu"})
    for name in NAMES[2:]:
        summary, alone = said["adapters"][name], train_recipe(options[name])
        mine, theirs = tmp_path / "many" / name, tmp_path / "alone" / name
        assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in theirs.iterdir())
        assert runs.metrics(mine) == runs.metrics(theirs) and files(mine) == files(theirs) and len(files(mine)) > 5
        same = ("plan", "steps", "samples", "loss_first", "loss_last", "flops_per_sample", "saved_bytes_per_step", "parameters", "data")
        assert all(summary[field] == alone[field] for field in same)
        assert summary["command"] == alone["command"]
        assert any("trained on one base with" in note for note in summary["notes"])
    code, out, _ = fastpeft("train", *given, "--resume")
    assert code == 0 and "in 2 steps" in out


def test_one_that_fails_is_told_in_the_exit_status(fastpeft, phantoms, study, tmp_path):
    wild = "{name: small, plan: F/F/LoRA, rank: 2, learning_rate: 1.0e+30, max_grad_norm: 0, warmup: 0}"
    path = study(STUDY.partition("rows:")[0] + f"rows: [{wild}]")
    code, out, err = fastpeft("train", "--adapters", path, "--data", phantoms, "--steps", 3, "--out", tmp_path / "many", "--quiet")
    assert code == 1 and "small failed: FloatingPointError" in out and "small ended at step" in err, (out, err)
    assert (tmp_path / "many/small/checkpoint/progress.json").is_file() and not (tmp_path / "many/small/summary.json").exists()
    assert list(json.loads((tmp_path / "many/adapters.json").read_text())["failed"]) == ["small"]


def test_the_base_is_once_in_memory(phantoms, study, tmp_path, monkeypatch):
    """Also in the run's dtype; what a plan trains of it is its own."""
    text = STUDY + "  - {name: whole, plan: F/F/T}\n"
    seen = {}
    monkeypatch.setattr(Together, "fit", lambda self, progress: seen.update(self.trainers))
    given = {"data": str(phantoms), "steps": 1, "out": str(tmp_path / "o"), "dtype": "bf16", "device": "cpu"}
    train_adapters(adapters_of(study(text), given))
    models = [trainer.model for trainer in seen.values()]
    held = [{n: p.data_ptr() for n, p in m.named_parameters() if not p.requires_grad} for m in models]
    for other in held[1:]:
        assert all(held[0][name] == place for name, place in other.items())
    assert {p.dtype for m in models for p in m.vision_model.parameters()} == {torch.bfloat16}
    whole = {n: p.data_ptr() for n, p in models[-1].named_parameters() if p.requires_grad}
    assert whole and not set(whole.values()) & set(held[0].values())


def test_a_trained_encoder_runs_for_itself_and_the_run_says_so(phantoms, study, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(Together, "fit", lambda self, progress: seen.update(self.trainers))
    path = study(STUDY + "  - {name: own eyes, plan: T/LoRA/LoRA}\n")
    with pytest.warns(UserWarning, match="own-eyes: its image encoder runs at every visit, for it alone: vit is trained"):
        train_adapters(adapters_of(path, {"data": str(phantoms), "steps": 1, "out": str(tmp_path / "o"), "device": "cpu"}))
    assert seen["own-eyes"].features is None and seen["small"].features is not None
    assert any("for it alone: vit is trained" in note for note in seen["own-eyes"].notes)


def test_lower_layers_are_computed_once_for_all(study, tmp_path, monkeypatch):
    """Of a language model, where steps have the same batches; losses as of a run alone."""
    data, seen = tmp_path / "text.json", []
    data.write_text(json.dumps([{"instruction": f"Count to {n}.", "input": "", "output": "one " * n} for n in range(1, 9)]))
    rows = "rows: [{name: a, plan: 'LoRA(layers_to_transform=[1])', rank: 2}, {name: b, plan: 'LoRA(layers_to_transform=[1])', rank: 4}]"
    kept = LayerCache.keep
    monkeypatch.setattr(LayerCache, "keep", lambda self, *given: (seen.append(self), kept(self, *given)))
    given = {"model": "llama-tiny", "data": str(data), "steps": 4, "batch_size": 4, "cache_layers": "1GB", "progress": False}
    given |= {"out": str(tmp_path / "many"), "device": "cpu", "no_eval": True, "metrics": []}
    options = adapters_of(study(rows), given)
    together = train_adapters(options, progress=False)
    assert len(seen) == 8 and len(set(map(id, seen))) == 1
    alone = train_recipe(options["b"] | {"out": str(tmp_path / "alone")})
    assert together.summaries["b"]["loss_last"] == alone["loss_last"] and len(seen) == 16


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        (STUDY + "  - {name: small, plan: F/F/T}\n", {}, "two adapters are called small"),
        (STUDY + "  - {name: x, plan: F/F/T, from: small}\n", {}, "row 'x' goes on from another run: that takes `fastpeft study`"),
        (STUDY + "  - {name: x, plan: F/F/T, stages: [drawn, drawn]}\n", {}, "row 'x' goes on from another run"),
        (STUDY, {"seed": 1}, "--seed: seeds of several adapters are in"),
        (STUDY, {"data": None}, "--data is missing: give a data folder"),
        (STUDY + "  - {plan: F/F/T, learning_rate: 0}\n", {}, "F-F-T: epochs and learning_rate must be above 0"),
        (STUDY + "  - {name: x, plan: F/F/T, model: llama-tiny}\n", {}, "small and x are not of one base and the same data: model is "),
        (STUDY + "  - {name: x, plan: F/F/T, dtype: bf16}\n", {}, "dtype is 'fp32' and 'bf16'; train them apart"),
        (STUDY + "  - {name: x, plan: F/F/T, languages: [zh]}\n", {}, "languages is "),
        (STUDY, {"from_scratch": True}, r"seed is 0 and 1; the base's weights are drawn by the seed here"),
    ],
)
def test_what_is_no_run_of_several_adapters(study, tmp_path, text, given, says):
    def train():
        train_adapters(adapters_of(study(text), {"data": str(tmp_path), "out": str(tmp_path / "o")} | given))

    with pytest.raises(ValueError, match=says):
        train()
    assert not (tmp_path / "o").exists()


def test_the_estimate_of_several(fastpeft, study, monkeypatch):
    apart, command = [], adapters.estimate_command
    monkeypatch.setattr(adapters, "estimate_command", lambda *given, **more: (apart.append(command(*given, **more)), apart[-1])[1])
    code, out, _ = fastpeft("estimate", "--adapters", study(), "--batch-size", 4, "--json", "--gpu-memory", "24GB")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and list(found["adapters"]) == NAMES and found["fits"] is True
    (a, _), (b, _) = apart  # another seed costs the same
    assert a.batch_size == b.batch_size == 16 and (a.plan, b.plan) == ("F/LoRA/LoRA", "F/F/LoRA")
    assert found["base_bytes"] == a.weight_bytes - a.trained_bytes == b.weight_bytes - b.trained_bytes
    own = a.trained_bytes + a.optimizer_bytes + 2 * (b.trained_bytes + b.optimizer_bytes)
    assert found["own_bytes"] == own and found["adapters"]["small"]["own_bytes"] == 12 * fp.count(_adapted("F/LoRA/LoRA", 2))["trainable"]
    assert found["flops_per_sample"] == pytest.approx(a.flops_per_sample + 2 * b.flops_per_sample)
    peaks = [e.peak_bytes - e.process_bytes for e in (a, b)]
    step = max(peak - e.weight_bytes - e.optimizer_bytes for peak, e in zip(peaks, (a, b)))
    assert found["peak_bytes"] == found["base_bytes"] + own + step < found["apart_bytes"] == peaks[0] + 2 * peaks[1]
    code, _, err = fastpeft("estimate", "--adapters", study(STUDY + "  - {name: x, plan: LoRA, model: llama-tiny}\n"))
    assert code == 2 and "not of one base: llama-tiny fp32; miss-tiny fp32" in err


def _adapted(plan, r):
    return fp.adapt(fp.build("miss-tiny", device="meta"), plan, r=r)
