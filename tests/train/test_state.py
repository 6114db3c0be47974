"""Resuming: to the bit, whatever ended the run; and what cannot be resumed says so in one clear error."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fastpeft.files import locked
from fastpeft.train.interrupts import Interrupted
from fastpeft.train.metrics import keep_lines

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


def test_metrics_past_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\xff\n{}\n3\n{"step": 3}\n{"step": 4, "lo')
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for line in ('{"step": true}', '{"step": 1.5}', '{"step": -1}', '{"step": 1}'):  # no step of a run, or one that is there
        path.write_text(f'{{"step": 1}}\n{line}\n')
        assert keep_lines(path, 2) == 1 and path.read_text() == '{"step": 1}\n'
    keep_lines(tmp_path / "absent", 2)
