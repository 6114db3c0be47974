"""Followers of a run: each start has its end; TensorBoard, W&B and MLflow get the run's numbers (the last two are stand-ins here)."""

import sys
import types

import pytest

import fastpeft as fp
from fastpeft.train import Callback
from fastpeft.train.callbacks import TRACKERS
from fastpeft.train.config import TRACKERS as NAMES

pytestmark = pytest.mark.usefixtures("one_thread")


class Follower(Callback):
    def __init__(self, fail_at=None):
        self.told, self.fail_at = [], fail_at

    def on_start(self, run):
        self.told.append(("start", run["step"], run["total_steps"], run["plan"], run["config"]["batch_size"]))

    def on_step(self, row):
        if row["step"] == self.fail_at:
            raise RuntimeError("the follower fell")
        self.told.append(("step", row["step"], row["loss"]))

    def on_end(self, summary):
        self.told.append(("end", summary and summary["steps"]))


def with_followers(runs, phantoms, *followers, **config):
    trainer = runs.trainer(phantoms, samples=8, **config)
    return fp.Trainer(trainer.model, trainer.dataset, trainer.config, callbacks=followers)


def test_start_steps_end(runs, phantoms):
    follower = Follower()
    summary = with_followers(runs, phantoms, follower, steps=3).fit()
    assert [one[:2] for one in follower.told] == [("start", 0), ("step", 1), ("step", 2), ("step", 3), ("end", 3)]
    assert follower.told[0] == ("start", 0, 3, "F/LoRA/LoRA", 4) and follower.told[-2][2] == pytest.approx(summary["loss_last"])


def test_one_that_fails_ends_the_run_with_a_checkpoint_and_all_are_told(runs, phantoms, tmp_path):
    other = Follower()
    with pytest.raises(RuntimeError, match="the follower fell; stopped after step 2; --resume goes on"):
        with_followers(runs, phantoms, other, Follower(fail_at=2), steps=3, out=tmp_path / "run").fit()
    assert other.told[-1] == ("end", None)
    again = Follower()
    with_followers(runs, phantoms, again, steps=3, out=tmp_path / "run", resume=True).fit()
    assert [one[:2] for one in again.told] == [("start", 2), ("step", 3), ("end", 3)]


def test_what_is_no_callback(runs, phantoms):
    with pytest.raises(TypeError, match=r"callbacks must be fastpeft\.train\.Callback, not function"):
        with_followers(runs, phantoms, (lambda row: None), steps=1)


def test_every_name_has_a_tracker():
    assert tuple(TRACKERS) == NAMES
    with pytest.raises(ValueError, match="no tracker is called comet; there are tensorboard, wandb, mlflow"):
        fp.TrainConfig(track=("comet",), out="x")
    assert fp.TrainConfig(report_to=("wandb",), tensorboard=True, out="x").trackers == ("wandb", "tensorboard")


class Recorder:
    """Stands in for a package: every call of any depth is noted, and returns itself."""

    def __init__(self, calls, name=""):
        self.__dict__.update(calls=calls, name=name)

    def __getattr__(self, name):
        return Recorder(self.calls, f"{self.name}.{name}".lstrip("."))

    def __call__(self, *args, **options):
        self.calls.append((self.name, args, options))
        return "abc123" if self.name == "util.generate_id" else Recorder(self.calls, self.name)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_trackers_of_others(package, runs, phantoms, tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType(package)
    module.__getattr__ = Recorder(calls).__getattr__
    monkeypatch.setitem(sys.modules, package, module)
    if package == "mlflow":
        monkeypatch.setattr("fastpeft.train.callbacks.MLflow._new", lambda self, mlflow, name: "abc123")
        monkeypatch.setattr(Recorder, "__contains__", lambda self, name: False, raising=False)
    for steps, resume in ((2, False), (3, True)):
        with_followers(runs, phantoms, steps=steps, out=tmp_path / "run", track=(package,), resume=resume).fit()
    names = [name for name, *_ in calls]
    if package == "wandb":
        started = [options for name, _, options in calls if name == "init"]
        assert [one["id"] for one in started] == ["abc123", "abc123"] and names.count("init.log") == 3 and names.count("init.finish") == 2
        assert [options["step"] for name, _, options in calls if name == "init.log"] == [1, 2, 3]
    else:
        logged = [(args, options["step"]) for name, args, options in calls if name == "MlflowClient.log_metric" and options]
        assert {args[0] for args, _ in logged} == {"abc123"} and {step for _, step in logged} == {1, 2, 3}
        assert names.count("MlflowClient.set_terminated") == 2


def test_a_missing_package_says_how_to_get_it(runs, phantoms, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'fastpeft\[wandb\]'"):
        with_followers(runs, phantoms, steps=1, out=tmp_path / "run", track=("wandb",)).fit()
