"""Training loop: one process, one device."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.cost.memory_budget import MemoryBudget
from fastpeft.cost.profile import reset_peak
from fastpeft.data import EpochSampler, VQADataset
from fastpeft.device import choose_device
from fastpeft.evaluate import Scoring, answer_and_score, generation_settings, write_answers
from fastpeft.evaluate.responses import model_inputs
from fastpeft.features.cache import FeatureCache
from fastpeft.features.frozen_stages import longest_frozen_stages
from fastpeft.files import locked, write_json
from fastpeft.fused.outputs import lean_logits
from fastpeft.methods import is_adapter
from fastpeft.methods.quantized import is_quantized
from fastpeft.options import bytes_of
from fastpeft.report.report import write_report
from fastpeft.savings import without
from fastpeft.train.callbacks import TRACKERS, Callback, Followers
from fastpeft.train.config import TrainConfig
from fastpeft.train.faults import IN_A_ROW, passes_in_memory, where_not_finite
from fastpeft.train.interrupts import Interrupted, StopBetweenSteps
from fastpeft.train.loading import Loading
from fastpeft.train.metrics import MetricsLog
from fastpeft.train.optimizer import Optimizer
from fastpeft.train.resume import BEST, identity_of, open_run
from fastpeft.train.saving import Saver
from fastpeft.train.state import random_state
from fastpeft.train.step import Passed, Step
from fastpeft.train.summary import WINDOW, summary_of
from fastpeft.train.validation import Validation, ValidationData


class Trainer:
    """Trains what the model's plan says, measures what it costs, and leaves a run's files in ``config.out``.

    ``Trainer(model, dataset, TrainConfig(steps=200)).fit()`` returns the summary (the fields of ``summary.json``). ``dataset`` is a
    :class:`fastpeft.data.VQADataset` with a tokenizer; ``eval_dataset`` is answered and scored at the end, with
    ``scoring`` (default: the data set's answers as candidates, every text metric that has what it needs). ``started_from``: the lineage
    of an adapter that the model holds already, kept in the description of the new one. ``validation``: what ``eval_every`` validates on;
    the run then ends with the best adapter. ``callbacks`` follow the run (:class:`fastpeft.train.callbacks.Callback`), as do ``track``'s.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: VQADataset,
        config: TrainConfig | None = None,
        *,
        eval_dataset: VQADataset | None = None,
        scoring: Scoring | None = None,
        started_from: dict[str, Any] | None = None,
        validation: ValidationData | None = None,
        callbacks: Iterable[Callback] = (),
    ):
        self.started_from = started_from
        self.scoring = scoring or Scoring(dataset.samples)
        self.model, self.dataset, self.config, self.eval_dataset = model, dataset, config or TrainConfig(), eval_dataset
        config = self.config
        self.followers = Followers([*callbacks, *(TRACKERS[name]() for name in config.trackers)])
        if dataset.tokenizer is None:
            raise ValueError("the data set has no tokenizer: VQADataset(samples, preprocess, tokenizer=...)")
        if getattr(model, "fastpeft_plan", None) is None:
            raise ValueError("the model has no plan: call fastpeft.adapt(model, plan) first")
        self.device = choose_device(config.device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
        self.model.to(self.device)
        for name, parameter in model.named_parameters():
            if not is_adapter(name) and not is_quantized(parameter) and parameter.dtype != self.dtype:
                parameter.data = parameter.data.to(self.dtype)
        if hasattr(model, "fastpeft_source") and "quantize" not in model.fastpeft_source:  # it was quantised from weights in its dtype
            model.fastpeft_source["dtype"] = str(self.dtype).removeprefix("torch.")  # the adapter's answers are those of this base
        self.inputs = model_inputs(model, dataset)
        self.sampler = EpochSampler(dataset, config.batch_size, config.seed, config.questions_per_image)
        self.out = Path(config.out) if config.out else None
        self.done = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "batches": 0, "first_losses": [], "last_losses": []}
        self.done |= {"half_batches": 0, "skipped": 0, "skipped_in_a_row": 0}
        self.done |= {"steady_samples": 0, "steady_seconds": 0.0, "peak_memory_bytes": 0, "cost": None, "sources": {}, "validation": {}}
        self.mixed = len({sample.data for sample in dataset.samples}) > 1
        how = {"workers": config.num_workers, "timeout": config.worker_timeout, "pin_memory": self.device.type == "cuda"}
        self.loading = Loading(dataset, self.sampler, **how)
        self.plan_steps()
        self.optimizer = Optimizer(model, config, self.total_steps)
        self._before: dict[str, Any] | None = None  # the random state before a step that has changed nothing else yet
        self.saved_step: int | None = None
        self.notes: list[str] = []
        self.saver = Saver(self)
        self.about: dict[str, Any] = {}  # more fields of the summary: what made the run
        self.budget = MemoryBudget(model, config.memory_budget) if config.memory_budget else None
        self.features = self._feature_cache()
        parts = {"features": self.features, "budget": self.budget, "mixed": self.mixed}
        self.step = Step(model, dataset, self.optimizer, self.inputs, self.device, self.dtype, **parts)
        if config.eval_every and validation is None:
            raise ValueError("eval_every needs validation samples: Trainer(..., validation=ValidationData(...))")
        self.validation = Validation(model, validation, config, self.scoring, self.device) if config.eval_every else None

    @property
    def model_name(self) -> str:
        source = getattr(self.model, "fastpeft_source", {})
        return source.get("model") or type(self.model).__name__

    def plan_steps(self) -> None:
        """Sets total_batches and total_steps, from where the run stands. ``steps`` are full groups of batches. ``epochs`` end with their
        last batch: where the batches do not fill the last group, that step has fewer."""
        config, done = self.config, self.done
        if config.steps is None:
            left = math.ceil(round(config.epochs * len(self.sampler), 6)) - done["batches"]  # 0.1 epochs of 30 batches are 3
        else:
            left = (config.steps - done["step"]) * config.gradient_accumulation
        if left <= -config.gradient_accumulation:
            limit = f"epochs={config.epochs:g}" if config.steps is None else f"steps={config.steps}"
            raise ValueError(f"cannot resume {self.out}: it stands at step {done['step']}, past {limit}")
        self.total_batches = done["batches"] + max(0, left)
        self.total_steps = done["step"] + math.ceil(max(0, left) / config.gradient_accumulation)

    def _feature_cache(self) -> FeatureCache | None:
        config, seen = self.config, any(sample.image is not None for sample in self.dataset.samples)
        if not (config.feature_cache and seen) or longest_frozen_stages(self.model, self.dataset) is None:
            return None
        limit = None if config.feature_cache_memory is None else bytes_of(config.feature_cache_memory)
        kept = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[config.feature_dtype]
        return FeatureCache(self.model, self.dataset, limit, config.feature_cache_dir, kept)

    def fit(self) -> dict[str, Any]:
        """Train to the last step; returns the summary and, with ``out``, writes summary.json, metrics.jsonl, adapter/, checkpoint/.

        SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 let the step end and save a checkpoint; :class:`Interrupted`, a KeyboardInterrupt, then
        says how to go on. A run that ends by an error between two steps, or before a step's update, saves one too. Another process cannot
        run in ``out`` meanwhile. A finished run that is resumed changes no file, and returns the summary that is there.
        """
        torch.manual_seed(self.config.seed)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out), StopBetweenSteps() as stop, self.followers:
            if self.out is not None and (finished := open_run(self)) is not None:
                return finished
            reset_peak(self.device)
            self.model.train()
            try:
                self._train(stop)
            except Interrupted as error:
                raise Interrupted(self._saved_at_end(stop, "stopped"), error.number) from None
            except Exception as error:
                cause, error = error, self.loading.fault(error) or error
                said = self._saved_at_end(stop, "")
                if said and type(error) in (RuntimeError, ValueError, OSError, ChildProcessError, FloatingPointError):
                    raise type(error)(f"{error}; {said}") from cause
                raise error from cause if cause is not error else error.__cause__
            try:
                return self._finish()
            except Interrupted as error:
                said = "stopped when all steps were done" + (" and saved; --resume scores them" if self.out else "")
                raise Interrupted(said, error.number) from None

    def _train(self, stop: StopBetweenSteps) -> None:
        """Steps from where the run stands to its last, and the last checkpoint."""
        config, done = self.config, self.done
        if self.features is not None and self.total_batches - done["batches"] >= len(self.sampler):
            self.features.prepare(config.progress)  # every sample is visited: all at once, in full batches
        about = {"out": self.out, "step": done["step"], "total_steps": self.total_steps, "config": asdict(config)}
        self.followers.start(about | {"model": self.model_name, "plan": str(self.model.fastpeft_plan)})
        log = MetricsLog(self.out, done, self.device, self.total_steps, progress=config.progress)
        with without(*config.savings_off), lean_logits(self.model), log, self._tracer() as tracer:
            began = time.perf_counter()
            for batches in self._batches():
                stop.hold_workers()
                with stop.later():
                    row, seconds = self._step(batches), time.perf_counter() - began
                    row |= self._validate()
                    self._before = random_state() if self.out else None  # the step is whole: what fails now may be saved after it
                    log.log(row, seconds)
                    self.followers.step(row)
                    if tracer is not None:
                        tracer.step()
                    due = config.save_every and done["step"] % config.save_every == 0
                    if self.out and due and done["step"] < self.total_steps:
                        self.save()
                self.followers.check()
                began = time.perf_counter()
        if self.features is not None:
            self.features.flush()
        if self.out:
            with stop.later():
                self.save()
        with stop.later():
            self.saver.wait()
            self.end_with_best()
            if self.out and self.done["validation"].get("best_step") is not None:
                self.saver.save_adapter("adapter")

    def end_with_best(self) -> None:
        """Put the adapter of the best validation back into the model, where there was one."""
        if self.done["validation"].get("best_step") is not None:
            self.validation.put_best_back(self.out / BEST if self.out else None)

    def _saved_at_end(self, stop: StopBetweenSteps, how: str) -> str:
        """Save a checkpoint of where the run was stopped, if its weights, optimiser and random state belong together; returns what to say
        of it, '' where there is nothing to say but ``how``."""
        step = self.done["step"]
        if not (self.out and step and (self._before is not None or not stop.busy)):
            return how
        try:
            if self.saved_step != step:
                self.save(rng=self._before if stop.busy else None)
            self.saver.wait()
        except OSError as error:
            return f"{how or 'stopped'} after step {step}, which could not be saved: {error}"
        return f"{how or 'stopped'} after step {step}; --resume goes on from there"

    def _validate(self) -> dict[str, Any]:
        """What a validation adds to the step's row, where one is due; the best adapter is kept as it comes."""
        validation, done = self.validation, self.done
        if validation is None or not validation.due(done["step"], self.total_steps):
            return {}
        began, row = time.perf_counter(), validation.row()
        if validation.better(done["step"], row, done["validation"]):
            if self.out:
                self.saver.save_adapter(BEST)
            else:
                validation.keep()
        if validation.exhausted(done["validation"]):
            self.total_batches, self.total_steps = done["batches"], done["step"]
        return row | {"validation_seconds": time.perf_counter() - began}

    def _finish(self) -> dict[str, Any]:
        """Score and write summary, predictions and report. An error of scoring is raised after the summary is written."""
        failure, scored = None, None
        try:
            scored = self.evaluate()
        except Exception as error:
            failure = error
            self.notes.append(f"not scored ({type(error).__name__}: {' '.join(str(error).split())[-300:]}): eval scores the adapter")
        summary = self.summary(scored)
        if self.out:
            if scored is not None:
                write_answers(self.out / "predictions.json", self.eval_dataset, self.answers)
            write_json(self.out / "summary.json", summary)
            asked = self.eval_dataset.samples if self.eval_dataset is not None else ()
            write_report(self.out, data={sample.image.parent for sample in asked if sample.image is not None})
        self.followers.end(summary)
        if failure is not None:
            raise failure
        return summary

    def _batches(self):
        """Groups of ``gradient_accumulation`` batches, the last of what is left, from where the run stands to its last step."""
        group = []
        while self.done["batches"] < self.total_batches:
            self.dataset.load_images = self.features is None
            for batch in self.loading.epoch_from(self.done["batches"] + len(group)):
                group.append(batch)
                if len(group) == min(self.config.gradient_accumulation, self.total_batches - self.done["batches"]):
                    yield group
                    group = []
                    if self.done["batches"] == self.total_batches:
                        return

    def _step(self, batches: list[dict]) -> dict[str, float]:
        """Forward, backward and update on one group of batches; the run's first batch is also measured."""
        before = random_state()
        self._before = before if self.out else None
        done, samples = self.done, sum(len(batch["samples"]) for batch in batches)
        loss, by_source, cost = self._passes(batches, before)
        done["cost"] = done["cost"] or cost
        row: dict[str, Any] = {"step": done["step"] + 1, "loss": loss}
        try:
            self._before = None
            row["learning_rate"], row["grad_norm"] = self.step.update(done["step"], loss)
            done["skipped_in_a_row"] = 0
        except FloatingPointError as error:
            self._before = before if self.out else None  # nothing has changed
            row |= self._not_finite(error, batches, before)
        self._before = None
        done["step"] += 1
        done["batches"] += len(batches)
        done["samples"] += samples
        done["tokens"] += sum(map(self.dataset.tokens, batches))
        row["samples"] = samples
        if "skipped" not in row:
            done["first_losses"] = (done["first_losses"] + [loss])[:WINDOW]
            done["last_losses"] = (done["last_losses"] + [loss])[-WINDOW:]
            row |= {"loss_by_source": by_source.log(done["sources"])} if self.mixed else {}
        return row

    def _passes(self, batches: list[dict], before: dict[str, Any]) -> Passed:
        """A group's forwards and backwards; from the first that memory does not suffice for, on batches half as large: the same samples
        and gradients in each step, so that only rounding, and dropout's draws, differ."""
        done = self.done

        def halves() -> list[dict]:
            return [half for at in range(done["batches"], done["batches"] + len(batches)) for half in self.loading.halves(at)]

        measured = done["cost"] is None
        if done["half_batches"]:
            return self.step.passes(halves(), measured=measured)
        passed, halved = passes_in_memory(self.step, batches, before, halves, measured=measured)
        if halved:
            done["half_batches"] = done["step"] + 1
            note = f"out of memory at step {done['step'] + 1}: from there on batches are halved, and each step's samples stay the same"
            self.notes.append(note)
            warnings.warn(note, stacklevel=2)
        return passed

    def _not_finite(self, error: FloatingPointError, batches: list[dict], before: dict[str, Any]) -> dict[str, Any]:
        """What a step without an update adds to its row, where ``on_nan`` says so; else FloatingPointError that names batch and module."""
        done = self.done
        if done["half_batches"]:
            batches = [half for at in range(done["batches"], done["batches"] + len(batches)) for half in self.loading.halves(at)]
        what = f"{error} at step {done['step'] + 1} {where_not_finite(self.step, batches, before)}"
        done["skipped"] += 1
        done["skipped_in_a_row"] += 1
        if self.config.on_nan == "stop" or done["skipped_in_a_row"] > IN_A_ROW:
            many = f" ({IN_A_ROW} steps before it were skipped)" if self.config.on_nan == "skip" else ""
            done["skipped"] -= 1
            done["skipped_in_a_row"] -= 1
            raise FloatingPointError(f"{what}{many}: lower learning_rate, or use fp32") from None
        if done["skipped"] <= IN_A_ROW:
            self.notes.append(f"skipped: {what}")
            warnings.warn(f"skipped: {what}", stacklevel=2)
        return {"loss": None, "learning_rate": None, "grad_norm": None, "skipped": str(error)}

    def evaluate(self) -> dict[str, Any] | None:
        """Answers to ``eval_dataset``, scored: open, closed, global; None without one. The answers stay in ``self.answers``."""
        if self.eval_dataset is None:
            return None
        how = {"progress": self.config.progress, "scoring": self.scoring}
        self.answers, scores = answer_and_score(self.model, self.eval_dataset, self.dataset.tokenizer, **how)
        return scores

    def summary(self, evaluation: dict[str, Any] | None) -> dict[str, Any]:
        """As :func:`fastpeft.train.summary.summary_of`, for the steps so far; ``evaluation``: what :meth:`evaluate` returns."""
        generation = None if evaluation is None else generation_settings(self.eval_dataset, self.dataset.tokenizer)
        notes = self.notes + [saving.note() for saving in (self.features, self.budget) if saving is not None]
        scored = {"eval": evaluation, "generation": generation}
        scored |= {"features": self.features.counts()} if self.features is not None else {}
        scored |= {name: self.done[name] for name in ("skipped", "half_batches") if self.done[name]}
        return summary_of(self.model, self.config, self.device, self.done) | scored | self.about | {"notes": notes}

    def save(self, rng: dict[str, Any] | None = None) -> None:
        """Write ``adapter/`` and ``checkpoint/`` in ``out``, each atomically. ``rng``: the random state to save (None: now)."""
        self.saver.save(rng)
        self.saved_step = self.done["step"]

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, unless ``allow_change`` names it."""
        return identity_of(self)


    def _tracer(self):
        """torch.profiler over this process's steps 2 to 4, written as a Chrome trace to ``out/trace.json``."""
        if not self.config.trace:
            return contextlib.nullcontext()
        from torch.profiler import profile, schedule

        path = str(self.out / "trace.json")
        return profile(
            schedule=schedule(wait=0, warmup=int(self.total_steps - self.done["step"] > 1), active=3, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(path),
            profile_memory=True,
        )
