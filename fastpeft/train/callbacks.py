"""Followers of a run: a few methods that are told of its start, its steps and its end; TensorBoard, Weights & Biases and MLflow as such.

class Print(Callback):
    def on_step(self, row):
        print(row["step"], row["loss"])

Trainer(model, dataset, config, callbacks=[Print()])
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

NUMBERS = ("loss", "learning_rate", "grad_norm", "samples_per_second", "memory_bytes", "validation_loss")  # of a row, for trackers


class Callback:
    """Told of a run; each method does nothing unless a subclass says otherwise. What it raises ends the run, with a checkpoint."""

    def on_start(self, run: Mapping[str, Any]) -> None:
        """Before the first step. run: ``out`` (Path or None), ``step`` (0, or of the checkpoint it resumes), ``total_steps``, ``config``
        (the options, JSON-able), ``model``, ``plan``."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """After a step, with its line of metrics.jsonl: step, loss, learning_rate, grad_norm, samples, seconds, samples_per_second,
        memory_bytes; after a validation validation_loss and eval (accuracies) too."""

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        """After the run, with the fields of summary.json; None for a run that was stopped or failed."""


class Followers(contextlib.AbstractContextManager):
    """A run's callbacks, in order; to be entered around it. Whoever was told of its start is told of its end, also where it fails."""

    def __init__(self, callbacks: Iterable[Callback]):
        self.callbacks, self.following, self.failure = list(callbacks), [], None
        if wrong := [one for one in self.callbacks if not isinstance(one, Callback)]:
            raise TypeError(f"callbacks must be fastpeft.train.Callback, not {type(wrong[0]).__name__}: make a subclass of it")

    def start(self, run: Mapping[str, Any]) -> None:
        for one in self.callbacks:
            one.on_start(run)
            self.following.append(one)

    def step(self, row: Mapping[str, Any]) -> None:
        """Tell of a step. What a follower raises is kept for :meth:`check`: a step is told, saved and counted whole."""
        try:
            for one in self.following:
                one.on_step(row)
        except Exception as error:
            self.failure = error

    def check(self) -> None:
        """Raise what a follower raised."""
        if self.failure is not None:
            raise self.failure

    def end(self, summary: Mapping[str, Any] | None) -> None:
        while self.following:
            self.following.pop(0).on_end(summary)

    def __exit__(self, *_) -> None:
        self.end(None)


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What of a row a tracker draws: name and value."""
    scores = row.get("eval") or {}
    for name, value in {**{name: row.get(name) for name in NUMBERS}, **scores}.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


class TensorBoard(Callback):
    """Event files in ``out/tensorboard``."""

    def on_start(self, run: Mapping[str, Any]) -> None:
        self.board = imported("tensorboard").SummaryWriter(str(_out(run, "tensorboard") / "tensorboard"), purge_step=run["step"] + 1)

    def on_step(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row):
            self.board.add_scalar(name, value, row["step"])

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self.board.close()


class WandB(Callback):
    """A run of Weights & Biases in project ``fastpeft``, by the environment's settings: ``WANDB_MODE=offline`` writes to ``out/wandb``
    and sends nothing. Resumed, it goes on in the same run."""

    def on_start(self, run: Mapping[str, Any]) -> None:
        wandb = imported("wandb")
        out = _out(run, "wandb")
        names = {"project": os.environ.get("WANDB_PROJECT", "fastpeft"), "name": out.name, "dir": str(out)}
        names |= {"id": _kept(out / "wandb_run", wandb.util.generate_id), "resume": "allow"}
        self.run = wandb.init(**names, config={**run["config"], "model": run["model"], "plan": run["plan"]})

    def on_step(self, row: Mapping[str, Any]) -> None:
        self.run.log(dict(numbers(row)), step=row["step"])

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.run.summary.update(_scores(summary))
        self.run.finish(exit_code=0 if summary is not None else 1)


class MLflow(Callback):
    """A run of MLflow, by the environment's settings (``MLFLOW_TRACKING_URI``; without one, files in ``out/mlruns``). Resumed, it goes on
    in the same run."""

    def on_start(self, run: Mapping[str, Any]) -> None:
        mlflow = imported("mlflow")
        out = _out(run, "mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((out / "mlruns").resolve().as_uri())
        self.client = mlflow.MlflowClient()
        self.id = _kept(out / "mlflow_run", lambda: self._new(mlflow, out.name))
        known = self.client.get_run(self.id).data.params
        for name, value in {**run["config"], "model": run["model"], "plan": run["plan"]}.items():
            if name not in known:
                self.client.log_param(self.id, name, value)

    def _new(self, mlflow, name: str) -> str:
        experiment = mlflow.set_experiment("fastpeft")
        return self.client.create_run(experiment.experiment_id, run_name=name).info.run_id

    def on_step(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row):
            self.client.log_metric(self.id, name, value, step=row["step"])

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        for name, value in _scores(summary or {}).items():
            self.client.log_metric(self.id, name, value)
        self.client.set_terminated(self.id, "FINISHED" if summary is not None else "FAILED")


TRACKERS: dict[str, type[Callback]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def _scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """Of a summary: what it cost and how it scored."""
    names = ("flops_per_sample", "saved_bytes_per_step", "peak_memory_bytes", "steady_samples_per_second", "loss_last")
    scores = summary.get("eval") or {}
    found = {name: summary.get(name) for name in names} | {name: scores.get(name) for name in ("open", "closed", "global")}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _out(run: Mapping[str, Any], tracker: str) -> Path:
    if run["out"] is None:
        raise ValueError(f"{tracker} needs a folder: give out")
    return run["out"]


def imported(tracker: str) -> ModuleType:
    """What a tracker writes with. ValueError where its package is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if tracker == "tensorboard" else tracker)
    except ImportError:
        raise ValueError(f"{tracker} is not installed: pip install 'fastpeft[{tracker}]'") from None


def _kept(file: Path, make) -> str:
    """A run's name at its tracker, drawn once and kept beside the run."""
    if not file.is_file():
        file.write_text(make() + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
