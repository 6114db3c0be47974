"""What cannot be resumed: one clear error, and nothing lost."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError

from fastpeft.runs.options import DataOptions
from fastpeft.runs.train import train_run
from fastpeft.train import TrainConfig
from fastpeft.train.state import differences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(runs, phantoms, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    runs.start(phantoms, out, steps=2).fit()
    return out


def test_a_run_is_not_overwritten(runs, phantoms, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already: resume it"):
        runs.start(phantoms, finished, steps=2).fit()
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_what_ends_a_run_at_its_start_is_told_before_its_model_is_looked_for(finished, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "wandb", None)
    for change, said in (
        ({"out": finished}, "holds a run already"),
        ({"out": tmp_path / "file"}, "file is a file: give a folder as out"),
        ({"track": "wandb"}, "wandb is not installed"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here .use "),
    ):
        config = TrainConfig(**{"steps": 1, "out": tmp_path / "run"} | change)
        with pytest.raises(ValueError, match=said):
            train_run("no-such-model", None, DataOptions(data=str(tmp_path)), config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"plan": "F/LoRA/F"}, "plan dec was 'LoRA', now 'F'"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"samples": 20}, "n was 50, now 20"),
        ({"batch_size": 5}, "batch_size was 4, now 5"),
        ({"gradient_accumulation": 2}, "gradient_accumulation was 1, now 2"),
        ({"questions_per_image": 2}, "questions_per_image was 1, now 2"),
        ({"dtype": "bf16"}, "dtype was 'fp32', now 'bf16'"),
        ({"small": True, "wider": True}, "base was '[0-9a-f]{8}', now '[0-9a-f]{8}'"),
    ],
)
def test_another_run_is_not_resumed(runs, phantoms, finished, change, message):
    change = dict(change)
    trainer = runs.start(phantoms, finished, steps=4, resume=True, **{k: v for k, v in change.items() if k != "wider"})
    if change.pop("wider", False):
        with torch.no_grad():
            trainer.model.vision_model.post_layernorm.weight.mul_(2)
    with pytest.raises(ValueError, match=f"cannot resume .*{message}"):
        trainer.fit()


def test_other_data_of_the_same_size_is_not_resumed(runs, phantoms, finished):
    trainer = runs.start(phantoms, finished, steps=4, resume=True)
    trainer.sampler._samples = list(reversed(trainer.sampler._samples))
    with pytest.raises(ValueError, match=r"cannot resume .*samples was '[0-9a-f]+', now '[0-9a-f]+'"):
        trainer.fit()


@pytest.mark.parametrize("file", ["progress.json", "trained.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("how", ["cut", "emptied", "overwritten", "removed"])
def test_a_torn_checkpoint_is_one_clear_error(runs, phantoms, finished, tmp_path, file, how):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "checkpoint" / file
    content = path.read_bytes()
    torn = {"cut": content[: len(content) // 2], "emptied": b"", "overwritten": b"torn"}
    path.unlink() if how == "removed" else path.write_bytes(torn[how])
    trainer = runs.start(phantoms, out, steps=4, resume=True)
    before = runs.weights(trainer)
    with pytest.raises(ValueError, match=r"checkpoint in .* is damaged .*remove the folder to start afresh") as error:
        trainer.fit()
    assert "\n" not in str(error.value)
    runs.assert_same_weights(runs.weights(trainer), before)


@pytest.mark.parametrize(
    "name, value", [("step", "x"), ("step", -1), ("step", 1.5), ("batches", True), ("first_losses", None), ("cost", 3), ("seconds", "1")]
)
def test_progress_of_the_wrong_kind_is_one_clear_error(runs, phantoms, finished, tmp_path, name, value):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "checkpoint" / "progress.json"
    progress = json.loads(path.read_text())
    progress["done"][name] = value
    path.write_text(json.dumps(progress))
    with pytest.raises(ValueError, match=f"checkpoint in .* is damaged .*says {name} is"):
        runs.start(phantoms, out, steps=4, resume=True).fit()


@pytest.mark.parametrize("count", [10**400, -1, float("nan"), "1", torch.tensor(float("inf")), torch.zeros(2)], ids=range(6))
def test_a_count_of_steps_that_is_none_is_one_clear_error(runs, phantoms, finished, tmp_path, count):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoint" / "manifest.json").unlink()
    held = torch.load(out / "checkpoint" / "optimizer.pt")
    held["optimizer"]["adamw"]["state"][0]["step"] = count
    torch.save(held, out / "checkpoint" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint in .* does not fit .*: its step of parameter 0 is .*, and a count is needed"):
        runs.start(phantoms, out, steps=4, resume=True).fit()


def test_a_checkpoint_without_a_manifest_resumes(runs, phantoms, finished, tmp_path):
    """As versions before the manifest wrote them; what they did not record is not compared."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoint" / "manifest.json").unlink()
    path = out / "checkpoint" / "progress.json"
    progress = json.loads(path.read_text())
    kept = ("n", "batch_size", "seed", "questions_per_image", "drop_last", "samples", "plan", "gradient_accumulation", "dtype", "base")
    progress["identity"] = {name: progress["identity"][name] for name in kept}
    path.write_text(json.dumps(progress))
    assert runs.start(phantoms, out, steps=4, resume=True).fit()["steps"] == 4


@pytest.mark.parametrize(
    "change, name",
    [({"learning_rate": 2e-3}, "learning_rate"), ({"warmup": 0.2}, "warmup"), ({"max_grad_norm": 0.5}, "max_grad_norm")],
)
def test_an_option_that_bears_on_the_result_changes_by_name_only(runs, phantoms, finished, tmp_path, change, name):
    out = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match=f"cannot resume .*: {name} was .*, now .*; --allow-change {name} goes on all the same"):
        runs.start(phantoms, out, steps=3, resume=True, **change).fit()
    summary = runs.start(phantoms, out, steps=3, resume=True, allow_change=(name,), **change).fit()
    assert any(note.startswith(f"changed when it was resumed: {name} was") for note in summary["notes"])
    with pytest.raises(ValueError, match="allow_change: learning_rte is nothing that a resumed run compares"):
        runs.start(phantoms, out, steps=4, resume=True, allow_change=("learning_rte",)).fit()


def test_an_image_that_changed_is_another_run(runs, phantoms, finished, tmp_path):
    data = shutil.copytree(phantoms, tmp_path / "data")
    image = next((data / "imgs").rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"cannot resume .*images was '[0-9a-f]+', now '[0-9a-f]+'"):
        runs.start(data, finished, steps=4, resume=True).fit()


def test_what_a_resumed_run_misses_is_said(runs, phantoms, finished, tmp_path):
    with pytest.warns(UserWarning, match="checkpoint is not there, so nothing is resumed: the run starts at step 0"):
        notes = runs.start(phantoms, tmp_path / "new", steps=1, resume=True).fit()["notes"]
    assert any("starts at step 0" in note for note in notes)
    out = shutil.copytree(finished, tmp_path / "run")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text(lines[1] + "\n")
    with pytest.warns(UserWarning, match="has no line for 1 of the 2 steps done"):
        runs.start(phantoms, out, steps=3, resume=True).fit()
    shutil.rmtree(out / "checkpoint")
    (out / "checkpoint").write_text("")
    with pytest.raises(ValueError, match="is no folder of a checkpoint: move it away"):
        runs.start(phantoms, out, steps=3, resume=True).fit()


def test_differences_go_as_deep_as_the_fields_agree():
    was = {"vit": [{"F": {}}], "jtm": [{"LoRA": {"r": 4, "lora_alpha": 32}}], "dec": [{"LoRA": {"r": 4}}]}
    now = {"vit": [{"T": {}}], "jtm": [{"LoRA": {"r": 8, "lora_alpha": 32}}], "dec": [{"LoRA": {"r": 4}}]}
    assert differences("plan", was, now) == ["plan vit was 'F', now 'T'", "plan jtm LoRA r was 4, now 8"]
    assert differences("plan", was, was) == [] and differences("seed", 0, None) == ["seed was 0, now None"]


def full_disk(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_zip(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("where, writer", [("fastpeft.files.save_file", full_disk), ("torch.save", full_zip)])
def test_a_full_disk_keeps_the_last_checkpoint(runs, phantoms, finished, tmp_path, monkeypatch, where, writer):
    out = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in (out / "checkpoint").iterdir()}
    monkeypatch.setattr(where, writer)
    with pytest.raises(OSError, match=r"run/(adapter|checkpoint).* cannot be written: .*(No space left|unexpected pos)") as told:
        runs.start(phantoms, out, steps=4, resume=True).fit()
    assert str(told.value).endswith("stopped after step 4, which could not be saved") and ".adapter" not in str(told.value)  # told once
    assert before == {path: path.read_bytes() for path in (out / "checkpoint").iterdir()}
    assert not list(out.glob(".*"))


def test_optimiser_state_of_other_groups_is_refused(runs, phantoms, tmp_path):
    runs.start(phantoms, tmp_path / "run", steps=2, plan="LayerNorm/LoRA/LoRA").fit()
    with pytest.raises(ValueError, match="does not fit this run's optimiser: it groups its parameters"):
        changed = {"base_learning_rate": 1e-3, "weight_decay": 0.0}  # now one group, before two
        options = changed | {"resume": True, "allow_change": tuple(changed)}
        runs.start(phantoms, tmp_path / "run", steps=3, plan="LayerNorm/LoRA/LoRA", **options).fit()
