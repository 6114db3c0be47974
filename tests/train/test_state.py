"""Resuming: to the bit, whatever ended the run; and what cannot be resumed says so in one clear error."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from fastpeft.files import atomic_folder, locked, recover_folder
from fastpeft.train.interrupts import Interrupted
from fastpeft.train.metrics import keep_lines
from fastpeft.train.state import differences

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "dropout, mid-epoch": {"small": True, "batch_size": 4},
    "accumulation over an epoch's end": {"small": True, "samples": 14, "batch_size": 4, "gradient_accumulation": 3},
    "questions by image": {"small": True, "batch_size": 4, "questions_per_image": 2},
    "a short last group": {"small": True, "samples": 14, "batch_size": 3, "gradient_accumulation": 4, "steps": None, "epochs": 4.6},
    "bf16, base trained": {"plan": "T/LoRA/LayerNorm", "samples": 14, "dtype": "bf16"},
}


class Dead(Exception):
    pass


def during(trainer, step: int, what) -> None:
    """Calls ``what`` in the middle of a step (1 is the first): after its backward, before its update."""
    update = trainer.optimizer.step

    def wrapped(number):
        if number + 1 == step:
            what()
        return update(number)

    trainer.optimizer.step = wrapped


def die():
    raise Dead


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_killed_twice_resumes_to_the_bit(runs, phantoms, whole, tmp_path, setting):
    """In step 4, after the checkpoint of step 2; and in step 6, after that of step 4, which the resumed run wrote."""
    weights, rows, folder, summary = whole(**SETTINGS[setting])
    for dies in (4, 6):
        killed = runs.start(phantoms, tmp_path / "killed", resume=dies > 4, **SETTINGS[setting])
        during(killed, dies, die)
        with pytest.raises(Dead):
            killed.fit()
        torch.rand(7)  # the random state of another process
    resumed = runs.start(phantoms, tmp_path / "killed", resume=True, **SETTINGS[setting])
    again = resumed.fit()
    runs.assert_same_weights(runs.weights(resumed), weights)
    assert runs.metrics(tmp_path / "killed") == rows and len(rows) == 6
    same = ("steps", "samples", "loss_first", "loss_last", "saved_bytes_per_step", "flops_per_sample", "parts")
    assert [again[name] for name in same] == [summary[name] for name in same]
    for part in ("jtm", "dec"):
        for file in (folder / "adapter" / part).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "killed" / "adapter" / part / file.name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ctrl_c_ends_the_step_and_saves(runs, phantoms, whole, tmp_path, number):
    weights, rows, *_ = whole(small=True)
    handlers = signal.getsignal(number)
    stopped = runs.start(phantoms, tmp_path / "stopped", small=True, save_every=0)
    during(stopped, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="stopped after step 4; --resume goes on from there") as ended:
        stopped.fit()
    assert isinstance(ended.value, KeyboardInterrupt) and ended.value.exit_status == 128 + number
    assert signal.getsignal(number) is handlers
    assert runs.metrics(tmp_path / "stopped") == rows[:4]
    resumed = runs.start(phantoms, tmp_path / "stopped", small=True, save_every=0, resume=True)
    resumed.fit()
    runs.assert_same_weights(runs.weights(resumed), weights)
    assert runs.metrics(tmp_path / "stopped") == rows


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing_torn(runs, phantoms, tmp_path):
    stopped = runs.start(phantoms, tmp_path / "run")
    during(stopped, 4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["done"]["step"] == 2


def test_a_finished_run_resumes_to_itself_and_further(runs, phantoms, tmp_path):
    out = tmp_path / "run"
    done = runs.start(phantoms, out, steps=4)
    summary = done.fit()
    again = runs.start(phantoms, out, steps=4, resume=True)
    repeated = again.fit()
    runs.assert_same_weights(runs.weights(again), runs.weights(done))
    clock = ("seconds", "samples_per_second", "peak_memory_bytes", "notes", "features")  # the last two: what this process encoded
    assert {k: v for k, v in repeated.items() if k not in clock} == {k: v for k, v in summary.items() if k not in clock}
    with pytest.raises(ValueError, match="it stands at step 4, past steps=3"):
        runs.start(phantoms, out, steps=3, resume=True).fit()
    assert runs.start(phantoms, out, steps=6, resume=True).fit()["steps"] == 6
    assert [row["step"] for row in runs.metrics(out)] == [1, 2, 3, 4, 5, 6]


def test_epochs_go_on_after_a_short_last_group(runs, phantoms, tmp_path):
    """10 samples in 3 batches, up to 8 to a step: an epoch is a step, two more are another; the rate is that of the longer run's step 2."""
    out, options = tmp_path / "run", {"steps": None, "samples": 10, "gradient_accumulation": 8, "learning_rate": 1e-3, "warmup": 0}
    assert runs.start(phantoms, out, **options).fit()["samples"] == 10
    assert runs.start(phantoms, out, **options, resume=True).fit()["samples"] == 10  # nothing is left of one epoch
    more = runs.start(phantoms, out, **options | {"epochs": 3.0}, resume=True)
    summary = more.fit()
    assert (summary["steps"], summary["samples"], more.total_steps) == (2, 30, 2)
    assert [row["samples"] for row in runs.metrics(out)] == [10, 20]
    assert runs.metrics(out)[1]["learning_rate"] == pytest.approx(0.5e-3)  # half-way down the cosine of two steps
    with pytest.raises(ValueError, match=r"it stands at step 2, past epochs=0\.3"):
        runs.start(phantoms, out, **options | {"epochs": 0.3}, resume=True).fit()


def test_nothing_to_resume_starts_afresh(runs, phantoms, whole, tmp_path):
    weights, rows, *_ = whole(steps=3)
    killed = runs.start(phantoms, tmp_path / "run", steps=3)
    during(killed, 2, die)  # before its first checkpoint
    with pytest.raises(Dead):
        killed.fit()
    with pytest.raises(ValueError, match="holds a run already"):
        runs.start(phantoms, tmp_path / "run", steps=3).fit()
    fresh = runs.start(phantoms, tmp_path / "run", steps=3, resume=True)
    fresh.fit()
    runs.assert_same_weights(runs.weights(fresh), weights)
    assert runs.metrics(tmp_path / "run") == rows


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


def files_of(folder):
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_resumed_changes_no_file(runs, phantoms, tmp_path):
    summary = runs.start(phantoms, tmp_path / "run", steps=2).fit()
    before = files_of(tmp_path / "run")
    assert runs.start(phantoms, tmp_path / "run", steps=2, resume=True).fit() == json.loads(json.dumps(summary))
    assert files_of(tmp_path / "run") == before


@pytest.fixture(scope="module")
def killed(runs, phantoms, tmp_path_factory):
    """A run that died in step 5."""
    out = tmp_path_factory.mktemp("killed") / "run"
    trainer = runs.start(phantoms, out, small=True)
    during(trainer, 5, die)
    with pytest.raises(Dead):
        trainer.fit()
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint", "checkpoint-2"]
    return out


@pytest.mark.parametrize("file", ["progress.json", "trained.safetensors", "optimizer.pt"])
def test_one_flipped_bit_and_the_checkpoint_before_resumes(runs, phantoms, whole, killed, tmp_path, file):
    """That of step 4 is damaged: named, kept aside, and step 2 goes on to the weights of a run that was left alone."""
    weights, rows, *_ = whole(small=True)
    out = shutil.copytree(killed, tmp_path / "run")
    path = out / "checkpoint" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = runs.start(phantoms, out, small=True, resume=True)
    with pytest.warns(UserWarning, match=r"run/checkpoint is damaged \(.*; going on from step 2, the newest intact one"):
        summary = resumed.fit()
    assert any("going on from step 2" in note for note in summary["notes"])
    runs.assert_same_weights(runs.weights(resumed), weights)
    assert runs.metrics(out) == rows
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint", "checkpoint-4", "damaged-checkpoint"]


def test_as_many_checkpoints_stay_as_asked(runs, phantoms, tmp_path):
    for keep, names in ((1, ["checkpoint"]), (3, ["checkpoint", "checkpoint-2", "checkpoint-3"])):
        runs.start(phantoms, tmp_path / str(keep), steps=4, save_every=1, keep_checkpoints=keep).fit()
        assert sorted(path.name for path in (tmp_path / str(keep)).glob("checkpoint*")) == names


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


def test_an_error_while_loading_data_saves_the_steps_done(runs, phantoms, whole, tmp_path):
    ended = runs.start(phantoms, tmp_path / "run", small=True, save_every=0, feature_cache=False)
    get = type(ended.dataset).__getitems__
    taken = []

    def torn(self, indices):
        taken.append(indices)
        if len(taken) > 3:
            raise ValueError("image 7 is torn")
        return get(self, indices)

    ended.dataset.__class__ = type("Torn", (type(ended.dataset),), {"__getitems__": torn})
    with pytest.raises(ValueError, match=r"^image 7 is torn; stopped after step 3; --resume goes on from there$"):
        ended.fit()
    resumed = runs.start(phantoms, tmp_path / "run", small=True, save_every=0, resume=True)
    resumed.fit()
    runs.assert_same_weights(runs.weights(resumed), whole(small=True)[0])


def test_an_error_before_the_update_saves_the_step_before(runs, phantoms, whole, tmp_path):
    """The forward of step 4 drew dropout already: the random state of before it is saved."""
    ended = runs.start(phantoms, tmp_path / "run", small=True, save_every=0)
    calls = []

    def failing(module, args, output):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("device lost")

    ended.model.register_forward_hook(failing)
    with pytest.raises(RuntimeError, match="device lost; stopped after step 3; --resume goes on from there"):
        ended.fit()
    resumed = runs.start(phantoms, tmp_path / "run", small=True, save_every=0, resume=True)
    resumed.fit()
    runs.assert_same_weights(runs.weights(resumed), whole(small=True)[0])


def test_two_runs_in_one_folder_at_once_are_refused(runs, phantoms, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(ValueError, match=rf"another process( \(pid {os.getpid()}\))? is running in .*run: wait"):
        runs.start(phantoms, tmp_path / "run", steps=2).fit()
    assert not list((tmp_path / "run").iterdir())
    assert runs.start(phantoms, tmp_path / "run", steps=2).fit()["steps"] == 2


def test_the_lock_of_a_dead_process_is_not_in_the_way(runs, phantoms, tmp_path):
    """Killed, although a child that it forked lives on."""
    (tmp_path / "run").mkdir()
    code = f"""
import os, time
from pathlib import Path
from fastpeft.files import locked
with locked(Path({str(tmp_path / "run")!r})):
    if os.fork():
        print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process"), locked(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path / "run"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


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
    with pytest.raises(OSError, match=r"cannot be written: .*(No space left|unexpected pos)"):
        runs.start(phantoms, out, steps=4, resume=True).fit()
    assert before == {path: path.read_bytes() for path in (out / "checkpoint").iterdir()}
    assert not list(out.glob(".*"))


def test_optimiser_state_of_other_groups_is_refused(runs, phantoms, tmp_path):
    runs.start(phantoms, tmp_path / "run", steps=2, plan="LayerNorm/LoRA/LoRA").fit()
    with pytest.raises(ValueError, match="does not fit this run's optimiser: it groups its parameters"):
        changed = {"base_learning_rate": 1e-3, "weight_decay": 0.0}  # now one group, before two
        options = changed | {"resume": True, "allow_change": tuple(changed)}
        runs.start(phantoms, tmp_path / "run", steps=3, plan="LayerNorm/LoRA/LoRA", **options).fit()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "checkpoint"
    for text in ("one", "two"):
        with atomic_folder(folder) as draft:
            (draft / "a").write_text(text)
    with pytest.raises(Dead), atomic_folder(folder) as draft:
        (draft / "a").write_text("three")
        raise Dead
    assert (folder / "a").read_text() == "two" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_survives_a_failing_rename(tmp_path, monkeypatch):
    folder, replace = tmp_path / "checkpoint", os.replace
    monkeypatch.setattr("fastpeft.files._exchange", lambda draft, folder: False)
    with atomic_folder(folder) as draft:
        (draft / "a").write_text("one")
    monkeypatch.setattr("os.replace", lambda a, b: die() if "-new-" in str(a) else replace(a, b))
    with pytest.raises(Dead), atomic_folder(folder) as draft:
        (draft / "a").write_text("two")
    assert (folder / "a").read_text() == "one" and list(tmp_path.iterdir()) == [folder]


def test_what_a_killed_process_left_is_cleared_up(tmp_path):
    """Killed between the two renames: the folder stands under another name, beside the finished draft."""
    folder = tmp_path / "checkpoint"
    for left, text in ((".checkpoint-old-x/old", "one"), (".checkpoint-new-y", "two"), (".checkpoint-new-z", "three")):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "a").write_text(text)
    recover_folder(folder)
    assert (folder / "a").read_text() == "one" and list(tmp_path.iterdir()) == [folder]


def test_metrics_past_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\xff\n{}\n3\n{"step": 3}\n{"step": 4, "lo')
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for line in ('{"step": true}', '{"step": 1.5}', '{"step": -1}', '{"step": 1}'):  # no step of a run, or one that is there
        path.write_text(f'{{"step": 1}}\n{line}\n')
        assert keep_lines(path, 2) == 1 and path.read_text() == '{"step": 1}\n'
    keep_lines(tmp_path / "absent", 2)
