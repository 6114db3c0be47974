"""What may go wrong in a run: numbers, memory, data workers, the clock, the disk. Each is named, and nothing that was done is lost."""

import copy
import json
import math
import os
import signal
import threading
import time

import pytest
import torch

from fastpeft.train.config import TrainConfig
from fastpeft.train.faults import out_of_memory
from fastpeft.train.interrupts import StopBetweenSteps
from fastpeft.train.state import random_state, set_random_state

pytestmark = pytest.mark.usefixtures("one_thread")


def start(runs, data, out, **options):
    return runs.start(data, out, **{"feature_cache": False} | options)


def poison(trainer, qids, where="jtm"):
    """An image's questions turn what one module puts out to NaN, whenever one of them is in the batch."""
    module = trainer.model.text_encoder.encoder.layer[0].output.dense
    seen = []
    passes = trainer.step.passes
    trainer.step.passes = lambda batches, **how: (
        seen.clear(),
        seen.extend(s.qid for b in batches for s in b["samples"]),
        passes(batches, **how),
    )[2]
    module.register_forward_hook(lambda module, args, output: output * float("nan") if qids & {*seen} else None)


def qids_of_step(trainer, step: int) -> list[str]:
    size = trainer.config.gradient_accumulation
    return [trainer.dataset.samples[i].qid for at in range(step * size - size, step * size) for i in trainer.loading.indices(at)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_number_that_is_not_finite_names_batch_and_module(runs, phantoms, tmp_path, accumulation):
    trainer = start(runs, phantoms, tmp_path / "run", gradient_accumulation=accumulation, small=True)
    bad = qids_of_step(trainer, 4)[-1]  # in the step's last batch
    poison(trainer, {bad})
    with pytest.raises(FloatingPointError) as error:
        trainer.fit()
    said = str(error.value)
    assert said.startswith("the loss is nan at step 4 in the batch of ") and "\n" not in said
    named = said.partition("batch of ")[2].partition(";")[0].split(", ")
    assert named == qids_of_step(trainer, 4)[-4:]  # that batch alone
    assert "the first output that is not finite is that of text_encoder.encoder.layer.0.output.dense" in said
    assert said.endswith("lower learning_rate, or use fp32; stopped after step 3; --resume goes on from there")
    assert json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["done"]["step"] == 3


def test_gradients_that_are_not_finite_are_named(runs, phantoms, tmp_path):
    trainer = start(runs, phantoms, tmp_path / "run")
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=rf"gradient's norm is (nan|inf) at step 1 .*; not finite: gradient of {name}: lower"):
        trainer.fit()


def test_a_weight_that_is_not_finite_is_named(runs, phantoms, tmp_path):
    trainer = start(runs, phantoms, tmp_path / "run")
    with torch.no_grad():
        trainer.model.text_encoder.encoder.layer[0].output.LayerNorm.weight[3] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"that of text_encoder.encoder.layer.0.output.LayerNorm, whose weight is not finite itself"
    ):
        trainer.fit()


def test_skipped_steps_change_nothing_and_resume_to_the_bit(runs, phantoms, tmp_path):
    def skipping(out, **options):
        trainer = start(runs, phantoms, tmp_path / out, on_nan="skip", small=True, **options)
        poison(trainer, {qids_of_step(trainer, 2)[0], qids_of_step(trainer, 4)[1]})
        take, changed = trainer._step, {}

        def step(*group):
            before = held(trainer)
            row = take(*group)
            changed[row["step"]] = differing(held(trainer), before)
            return row

        trainer._step = step
        return trainer, changed

    def held(trainer):
        optimizer = copy.deepcopy(trainer.optimizer.state_dict())
        moments = {f"{n} {name}": v for n, state in optimizer["adamw"]["state"].items() for name, v in state.items()}
        return runs.weights(trainer) | moments | {f"master {n}": m for n, m in enumerate(optimizer["masters"])}

    def differing(now, before):
        return {name for name, value in now.items() if name not in before or not torch.equal(value, before[name])}

    whole, changed = skipping("whole")
    with pytest.warns(UserWarning, match="skipped: the loss is nan at step 2 in the batch of"):
        summary = whole.fit()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss"] is None] == [2, 4] == [row["step"] for row in rows if "skipped" in row]
    assert summary["skipped"] == 2 and summary["steps"] == 6 and math.isfinite(summary["loss_last"])
    assert sum("in the batch of" in note for note in summary["notes"]) == 2
    assert {step for step, names in changed.items() if not names} == {2, 4}  # neither weight, nor moment, nor count of steps

    stopped, _ = skipping("run")
    update = stopped.optimizer.step
    stopped.optimizer.step = lambda n: (update(n), os.kill(os.getpid(), signal.SIGINT) if n == 2 else None)[0]
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="skipped"):
        stopped.fit()
    torch.rand(3)
    again, changed = skipping("run", resume=True)
    with pytest.warns(UserWarning, match="skipped: the loss is nan at step 4"):
        assert again.fit()["skipped"] == 2
    assert min(changed) == 4 and held(again).keys() == held(whole).keys() and differing(held(again), held(whole)) == set()
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "whole")


def test_too_many_skipped_steps_end_the_run(runs, phantoms, tmp_path):
    trainer = start(runs, phantoms, tmp_path / "run", on_nan="skip", steps=20, save_every=0)
    poison(trainer, {sample.qid for sample in trainer.dataset.samples})
    before = runs.weights(trainer)
    with (
        pytest.raises(FloatingPointError, match=r"at step 11 .*10 steps before it were skipped.*stopped after step 10"),
        pytest.warns(UserWarning),
    ):
        trainer.fit()
    runs.assert_same_weights(runs.weights(trainer), before)


def forgetful(trainer, step: int, room: int) -> None:
    """No batch of more than ``room`` samples fits, from this step on."""
    passes = trainer.step.passes

    def hook(module, args, kwargs):
        if trainer.done["step"] + 1 >= step and len(kwargs["input_ids"]) > room:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )

    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    assert passes


@pytest.mark.parametrize("accumulation", [1, 2])
def test_half_the_batch_where_memory_does_not_suffice(runs, phantoms, whole, tmp_path, accumulation):
    weights, rows, _, whole_summary = whole(feature_cache=False, gradient_accumulation=accumulation)
    halved = start(runs, phantoms, tmp_path / "run", gradient_accumulation=accumulation)
    forgetful(halved, 3, 2)
    with pytest.warns(UserWarning, match="out of memory at step 3: from there on batches are halved"):
        summary = halved.fit()
    assert summary["half_batches"] == 3 and summary["samples"] == whole_summary["samples"]
    for name, got in runs.weights(halved).items():
        torch.testing.assert_close(got, weights[name], rtol=1e-3, atol=2e-5)
    got = runs.metrics(tmp_path / "run")
    assert got[:2] == rows[:2] and [row["loss"] for row in got] == pytest.approx([row["loss"] for row in rows], rel=1e-4)


def test_a_halved_run_resumes_halved(runs, phantoms, tmp_path):
    def halved(out, **options):
        trainer = start(runs, phantoms, tmp_path / out, small=True, **options)
        forgetful(trainer, 2, 2)
        return trainer

    with pytest.warns(UserWarning, match="out of memory"):
        whole = halved("whole")
        whole.fit()
    with pytest.warns(UserWarning, match="out of memory"):
        stopped = halved("run")
        take = stopped.optimizer.step
        stopped.optimizer.step = lambda n: (take(n), os.kill(os.getpid(), signal.SIGINT) if n == 2 else None)[0]
        with pytest.raises(KeyboardInterrupt):
            stopped.fit()
    resumed = halved("run", resume=True)
    resumed.fit()
    runs.assert_same_weights(runs.weights(resumed), runs.weights(whole))
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "whole")


def test_memory_that_does_not_suffice_for_half_is_an_error_with_a_checkpoint(runs, phantoms, tmp_path):
    trainer = start(runs, phantoms, tmp_path / "run")
    forgetful(trainer, 3, 1)
    with pytest.raises(RuntimeError, match=r"can't allocate memory.*; stopped after step 2; --resume goes on from there"):
        trainer.fit()
    assert [out_of_memory(e) for e in (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("shape"), ValueError("out of memory"))] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("when", ["waiting", "in a step", "its signal comes late"])
def test_a_dead_data_worker_is_named_and_the_run_saved(runs, phantoms, whole, tmp_path, when):
    trainer = start(runs, phantoms, tmp_path / "run", small=True, num_workers=1, save_every=0)

    def kill():
        (worker,) = trainer.loading._iterator._workers
        if when == "its signal comes late":  # after what its end does to a batch on the way, and while the run is saved
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            trainer.loading._iterator._next_data = reset
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.05)

    def reset():
        raise ConnectionResetError(104, "Connection reset by peer")

    save = trainer.saver.save
    trainer.saver.save = lambda rng=None: (trainer.stop._child(signal.SIGCHLD, None), save(rng))[1]
    if when == "waiting":
        kept = trainer.dataset._item
        trainer.dataset._item = lambda index: os.kill(os.getpid(), signal.SIGKILL) if trainer_step() >= 4 else kept(index)
        seen = iter(range(10**6))
        trainer_step = lambda: next(seen) // 4  # noqa: E731
    else:
        update = trainer.optimizer.step
        trainer.optimizer.step = lambda n: (update(n), kill() if n == 2 else None)[0]
    with pytest.raises(
        ChildProcessError, match=r"data worker \d+ died \(killed by signal: Killed\), before the batch of .*; stopped after step \d"
    ):
        trainer.fit()
    step = json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["done"]["step"]
    assert step == 3 if when == "in a step" else step in (2, 3, 4)
    resumed = start(runs, phantoms, tmp_path / "run", small=True, resume=True)
    resumed.fit()
    runs.assert_same_weights(runs.weights(resumed), whole(feature_cache=False, small=True)[0])


def test_a_stuck_data_worker_is_named_and_ended(runs, phantoms, tmp_path):
    trainer = start(runs, phantoms, tmp_path / "run", num_workers=1, worker_timeout=1)
    last = qids_of_step(trainer, 5)
    item = trainer.dataset._item
    trainer.dataset._item = lambda index: time.sleep(60) if trainer.dataset.samples[index].qid == last[0] else item(index)
    began = time.perf_counter()
    with pytest.raises(
        ChildProcessError, match=r"a data worker is stuck: no batch came for 1 s, of (.*) \(worker_timeout\); stopped after step 4"
    ) as error:
        trainer.fit()
    assert ", ".join(last) in str(error.value) and time.perf_counter() - began < 30
    (worker,) = trainer.loading._iterator._workers
    assert not worker.is_alive()


def test_a_workers_death_waits_for_the_end_of_a_step():
    """Torch tells of it from a handler of SIGCHLD: wherever the run stands."""
    told = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: told.append(number))
    try:
        with StopBetweenSteps() as stop:
            stop.hold_workers()
            with stop.later():
                os.kill(os.getpid(), signal.SIGCHLD)
                assert told == []
            assert told == [signal.SIGCHLD]
            os.kill(os.getpid(), signal.SIGCHLD)
            assert len(told) == 2
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_saving_beside_training_writes_the_same_files(runs, phantoms, whole, tmp_path, monkeypatch):
    """What is trained changes while the thread waits: its copy does not."""
    folder = whole(feature_cache=False, small=True)[2]
    aside = start(runs, phantoms, tmp_path / "run", small=True, async_save=True)
    from fastpeft.train import saving

    write, late = saving.write_state, []

    def slow(folder, state, keep):
        late.append(threading.current_thread().name)
        time.sleep(0.3)
        write(folder, state, keep)

    monkeypatch.setattr(saving, "write_state", slow)
    aside.fit()
    assert late == ["fastpeft-save"] * 3 and not any(t.name == "fastpeft-save" for t in threading.enumerate())
    for name in ("checkpoint/trained.safetensors", "checkpoint-4/trained.safetensors", "adapter/dec/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()
    for name in ("checkpoint", "checkpoint-4"):
        a, b = (torch.load(run / name / "optimizer.pt") for run in (tmp_path / "run", folder))
        assert torch.equal(a["rng"], b["rng"])
        for number, held in b["optimizer"]["adamw"]["state"].items():
            assert all(torch.equal(a["optimizer"]["adamw"]["state"][number][key], value) for key, value in held.items())


def test_what_a_thread_could_not_save_ends_the_run(runs, phantoms, tmp_path, monkeypatch):
    trainer = start(runs, phantoms, tmp_path / "run", async_save=True)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpeft.train.saving.write_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()


@pytest.mark.parametrize("clock", [lambda: 7.0, iter(range(10**6, 0, -1)).__next__])
def test_a_clock_that_stands_or_goes_back(runs, phantoms, tmp_path, monkeypatch, clock):
    trainer = start(runs, phantoms, tmp_path / "run", steps=3)
    monkeypatch.setattr("time.perf_counter", clock)
    summary = trainer.fit()
    assert summary["steps"] == 3 and json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 12


def test_a_full_disk_under_the_metrics_saves_the_step(runs, phantoms, tmp_path, monkeypatch):
    """The row of step 3 cannot be written: the step itself is whole."""
    trainer = start(runs, phantoms, tmp_path / "run", save_every=0)
    from fastpeft.train.metrics import MetricsLog

    log = MetricsLog.log

    def full(self, row, seconds):
        if row["step"] == 3:
            raise OSError(28, "No space left on device")
        log(self, row, seconds)

    monkeypatch.setattr(MetricsLog, "log", full)
    with pytest.raises(OSError, match="No space left on device; stopped after step 3; --resume goes on"):
        trainer.fit()
    assert json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["done"]["step"] == 3


def test_a_random_state_that_is_none_changes_nothing():
    before = random_state()
    for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), torch.zeros(5056, dtype=torch.uint8), "x", None):
        with pytest.raises(ValueError, match="its random state is none"):
            set_random_state({"rng": wrong, "cuda_rng": []})
        assert torch.equal(torch.get_rng_state(), before["rng"])


def test_options_of_faults_are_checked():
    with pytest.raises(ValueError, match="on_nan must be one of stop, skip"):
        TrainConfig(on_nan="go")
    with pytest.raises(ValueError, match="worker_timeout must be a whole number of 1 or more"):
        TrainConfig(worker_timeout=0)
