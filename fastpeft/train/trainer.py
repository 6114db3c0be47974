"""Training loop of one process, or of one of several ranks."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastpeft.adapters import save_adapter
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
from fastpeft.ranks import ALONE, RankLost, Ranks, ranks_here
from fastpeft.savings import without
from fastpeft.train.config import TrainConfig
from fastpeft.train.gradients import trained
from fastpeft.train.interrupts import Interrupted, StopBetweenSteps
from fastpeft.train.metrics import MetricsLog
from fastpeft.train.optimizer import Optimizer
from fastpeft.train.resume import BEST, identity_of, open_runs
from fastpeft.train.sharding import check_shard, rest_gathered, shard_base, sharded_bytes
from fastpeft.train.shares import Shares
from fastpeft.train.state import random_state, save_state
from fastpeft.train.step import Step
from fastpeft.train.summary import WINDOW, summary_of
from fastpeft.train.validation import Validation, ValidationData


class Trainer:
    """Trains what the model's plan says, measures what it costs, and leaves a run's files in ``config.out``.

    ``Trainer(model, dataset, TrainConfig(steps=200)).fit()`` returns the summary (the fields of ``summary.json``). ``dataset`` is a
    :class:`fastpeft.data.VQADataset` with a tokenizer; ``eval_dataset`` is answered and scored at the end, with
    ``scoring`` (default: the data set's answers as candidates, every text metric that has what it needs). ``started_from``: the lineage
    of an adapter that the model holds already, kept in the description of the new one. ``validation``: what ``eval_every`` validates on;
    the run then ends with the best adapter.
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
    ):
        self.started_from = started_from
        self.scoring = scoring or Scoring(dataset.samples)
        self.ranks, config = ranks_here(), config or TrainConfig()
        if not self.ranks.first:  # the first one writes and speaks for all
            config = replace(config, progress=False, tensorboard=False, trace=False)
        self.model, self.dataset, self.config, self.eval_dataset = model, dataset, config, eval_dataset
        if dataset.tokenizer is None:
            raise ValueError("the data set has no tokenizer: VQADataset(samples, preprocess, tokenizer=...)")
        if getattr(model, "fastpeft_plan", None) is None:
            raise ValueError("the model has no plan: call fastpeft.adapt(model, plan) first")
        self.device = choose_device(self.ranks.device(config.device))
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
        self._to_device()
        for name, parameter in model.named_parameters():
            if not is_adapter(name) and not is_quantized(parameter) and parameter.dtype != self.dtype:
                parameter.data = parameter.data.to(self.dtype)
        if hasattr(model, "fastpeft_source") and "quantize" not in model.fastpeft_source:  # it was quantised from weights in its dtype
            model.fastpeft_source["dtype"] = str(self.dtype).removeprefix("torch.")  # the adapter's answers are those of this base
        self.inputs = model_inputs(model, dataset)
        self.sample_batches_of(config.batch_size * self.ranks.world)
        self.out = Path(config.out) if config.out and self.ranks.first else None
        self.done = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "batches": 0, "first_losses": [], "last_losses": []}
        self.done |= {"steady_samples": 0, "steady_seconds": 0.0, "peak_memory_bytes": 0, "cost": None, "sources": {}, "validation": {}}
        self.mixed = len({sample.data for sample in dataset.samples}) > 1
        self.plan_steps()
        self.optimizer = Optimizer(model, config, self.total_steps)
        self._before: dict[str, Any] | None = None  # the random state before a step that has changed nothing else yet
        self.saved_step: int | None = None
        self.sent = 0  # bytes given to the other ranks in the last step
        self.notes: list[str] = []
        self.budget = MemoryBudget(model, config.memory_budget, self.ranks if config.shard else ALONE) if config.memory_budget else None
        self.features = self._feature_cache()
        parts = {"features": self.features, "budget": self.budget, "mixed": self.mixed, "ranks": self.ranks}
        self.step = Step(model, dataset, self.optimizer, self.inputs, self.device, self.dtype, **parts)
        if config.eval_every and validation is None:
            raise ValueError("eval_every needs validation samples: Trainer(..., validation=ValidationData(...))")
        self.validation = Validation(model, validation, config, self.scoring, self.device, self._askers) if config.eval_every else None

    def _to_device(self) -> None:
        """Of a base that is taken apart only what is trained, unless it has features to compute: its layers follow in pieces."""
        if self.config.shard:
            check_shard(self.model, self.ranks)
        if self.config.shard and not self._sees_constants():
            for tensor in (*trained(self.model), *self.model.buffers()):
                tensor.data = tensor.data.to(self.device)
        else:
            self.model.to(self.device)

    @property
    def _askers(self) -> Ranks:
        """Ranks that share questions; of a base in pieces none does, as all have to run the same layers at the same time."""
        return ALONE if self.config.shard else self.ranks

    def sample_batches_of(self, samples: int) -> None:
        """Over all ranks."""
        self.sampler = EpochSampler(self.dataset, samples, self.config.seed, self.config.questions_per_image)
        self.shares = Shares(self.sampler, self.ranks, self.config.batch_size, together=bool(self.config.shard))

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

    def _sees_constants(self) -> bool:
        """Whether there are features to keep."""
        seen = self.config.feature_cache and any(sample.image is not None for sample in self.dataset.samples)
        return seen and longest_frozen_stages(self.model, self.dataset) is not None

    def _feature_cache(self) -> FeatureCache | None:
        config = self.config
        if not self._sees_constants():
            return None
        limit = None if config.feature_cache_memory is None else bytes_of(config.feature_cache_memory)
        kept = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[config.feature_dtype]
        return FeatureCache(self.model, self.dataset, limit, config.feature_cache_dir, kept, self.ranks)

    def fit(self) -> dict[str, Any]:
        """Train to the last step; returns the summary and, with ``out``, writes summary.json, metrics.jsonl, adapter/, checkpoint/.

        SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 let the step end and save a checkpoint; :class:`Interrupted`, a KeyboardInterrupt, then
        says how to go on. A run that ends by an error between two steps, or before a step's update, saves one too. Another process cannot
        run in ``out`` meanwhile. A finished run that is resumed changes no file, and returns the summary that is there.
        """
        torch.manual_seed(self.config.seed)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out), StopBetweenSteps(self.ranks) as stop:
            if (finished := open_runs(self)) is not None:
                return finished
            reset_peak(self.device)
            self.model.train()
            try:
                self._train(stop)
            except Interrupted as error:
                raise Interrupted(self._saved_at_end(stop, "stopped"), error.number) from None
            except RankLost as error:
                raise RankLost(f"{error}; {said}" if (said := self._saved_at_end(stop, "")) else str(error)) from None
            except Exception as error:
                if (said := self._saved_at_end(stop, "")) and type(error) in (RuntimeError, ValueError, OSError):
                    raise type(error)(f"{error}; {said}") from error
                raise
            try:
                return self._finish()
            except Interrupted as error:
                said = "stopped when all steps were done" + (" and saved; --resume scores them" if self.out else "")
                raise Interrupted(said, error.number) from None

    def _train(self, stop: StopBetweenSteps) -> None:
        """Steps from where the run stands to its last, and the last checkpoint."""
        config, done = self.config, self.done
        self.stop = stop
        if self.features is not None and (config.shard or self.total_batches - done["batches"] >= len(self.sampler)):
            self.features.prepare(config.progress)  # every sample is visited: all at once, in full batches
        if config.shard:
            self._shard()
        log = MetricsLog(self.out, done, self.device, self.total_steps, tensorboard=config.tensorboard, progress=config.progress)
        with without(*config.savings_off), lean_logits(self.model), log, self._tracer() as tracer, stop.together():
            began = time.perf_counter()
            for batches, whole in self._batches():
                with stop.later():
                    row, seconds = self._step(batches), time.perf_counter() - began
                    done["batches"] += whole
                    row |= self._validate()
                    log.log(row, seconds)
                    if tracer is not None:
                        tracer.step()
                    due = config.save_every and done["step"] % config.save_every == 0
                    if self.out and due and done["step"] < self.total_steps:
                        self.save()
                began = time.perf_counter()
        if self.features is not None:
            self.features.flush()
        if self.out:
            with stop.later():
                self.save()
        with stop.later():
            self.end_with_best()
            if self.out and self.done["validation"].get("best_step") is not None:
                self._save_adapter("adapter")

    def _shard(self) -> None:
        """Take the base apart. Then no rank can encode an image by itself: features have to be all there, or are left to the step."""
        if self.features is not None and any(self.ranks.gather(not self.features.complete())):
            self.notes.append("features are computed in every step: there is no room for all of them, which a base in pieces needs")
            self.features = self.step.features = None
        shard_base(self.model, self.device, self.ranks)
        self.notes.append(f"each rank holds {sharded_bytes(self.model) / 1e6:.1f} MB of the frozen weights")

    def end_with_best(self) -> None:
        """Put the adapter of the best validation back into the model, where there was one."""
        if self.done["validation"].get("best_step") is not None:
            if self.ranks.first:
                self.validation.put_best_back(self.out / BEST if self.out else None)
            self.ranks.copy_from_first(trained(self.model))

    def _saved_at_end(self, stop: StopBetweenSteps, how: str) -> str:
        """Save a checkpoint of where the run was stopped, if its weights, optimiser and random state belong together; returns what to say
        of it, '' where there is nothing to say but ``how``."""
        step = self.done["step"]
        if not (self.out and step and (self._before is not None or not stop.busy)):
            return how
        try:
            if self.saved_step != step:
                self.save(rng=self._before if stop.busy else None)
        except OSError as error:
            return f"{how or 'stopped'} after step {step}, which could not be saved: {error}"
        return f"{how or 'stopped'} after step {step}; --resume goes on from there"

    def _validate(self) -> dict[str, Any]:
        """What a validation adds to the step's row, where one is due; the best adapter is kept as it comes."""
        validation, done = self.validation, self.done
        if validation is None or not validation.due(done["step"], self.total_steps):
            return {}
        began = time.perf_counter()
        with rest_gathered(self.model):
            row = validation.row()
        if validation.better(done["step"], row, done["validation"]):
            if self.out:
                self._save_adapter(BEST)
            elif self.ranks.first:
                validation.keep()
        if validation.exhausted(done["validation"]):
            self.total_batches, self.total_steps = done["batches"], done["step"]
        return row | {"validation_seconds": time.perf_counter() - began}

    def _finish(self) -> dict[str, Any]:
        """Score and write summary, predictions and report. An error of scoring is raised after the summary is written."""
        failure, scored, everywhere = None, None, self.ranks.gather(self._measured())
        try:
            scored = self.evaluate()
        except Exception as error:
            failure = error
            self.notes.append(f"not scored ({type(error).__name__}: {' '.join(str(error).split())[-300:]}): eval scores the adapter")
        summary = self.summary(scored, everywhere)
        if self.out:
            from fastpeft.report.report import write_report  # here, so that `python -m fastpeft.report.report` finds it not yet imported

            if scored is not None:
                write_answers(self.out / "predictions.json", self.eval_dataset, self.answers)
            write_json(self.out / "summary.json", summary)
            write_report(self.out)
        if failure is not None:
            raise failure
        return self.ranks.from_first(summary)

    def _measured(self) -> dict[str, Any]:
        """What each rank has measured for itself."""
        counts = self.features.counts() if self.features is not None else None
        return {"peak_memory_bytes": self.done["peak_memory_bytes"], "features": counts}

    def _batches(self):
        """(``gradient_accumulation`` batches, their number), the last group of what is left, from where the run stands to its last step.
        Of several ranks, each has its share of every batch, in as many pieces as forwards."""
        group, whole = [], 0
        while self.done["batches"] < self.total_batches:
            epoch, start = divmod(self.done["batches"] + whole, len(self.sampler))
            self.sampler.set_epoch(epoch, start)
            self.dataset.set_epoch(epoch)
            self.dataset.load_images = self.features is None
            loader = DataLoader(
                self.dataset,
                batch_sampler=self.shares,
                collate_fn=self.dataset.collator(),
                num_workers=self.config.num_workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # its own: a resumed run must draw the dropout of an uninterrupted one
            )
            pieces = iter(loader)
            for number in range(start, len(self.sampler)):
                every, own = self.shares.forwards(number)
                group += [next(pieces) | {"counts": at < own} for at in range(every)]
                whole += 1
                if whole == min(self.config.gradient_accumulation, self.total_batches - self.done["batches"]):
                    yield group, whole
                    group, whole = [], 0
                    if self.done["batches"] == self.total_batches:
                        return

    def _step(self, batches: list[dict]) -> dict[str, float]:
        """Forward, backward and update on one group of batches, this rank's part of them; the run's first batch is also measured."""
        done, ranks, sent = self.done, self.ranks, self.ranks.sent
        self._before = random_state() if self.out else None
        if not ranks.alone:  # a draw of its own for each rank and step: no state of it is needed to go on, on as many ranks or others
            torch.manual_seed(random.Random(f"dropout {self.config.seed} {ranks.rank} {done['step']}").getrandbits(63))
        loss, by_source, cost = self.step.passes(batches, measured=done["cost"] is None)
        done["cost"] = done["cost"] or cost
        own = [batch for batch in batches if batch["counts"]]
        mine = [loss, sum(len(batch["samples"]) for batch in own), sum(map(self.dataset.tokens, own))]
        loss, samples, tokens, *heard = ranks.sum([*mine, *self.stop.heard()])
        self.sent = ranks.sent - sent
        self.stop.agree(heard)
        try:
            self.step.gradients.finish()
            self._before = None
            rate, norm = self.step.update(done["step"], loss)
        except FloatingPointError as error:
            saved = f"; the last checkpoint is in {self.out / 'checkpoint'}" if self.out and (self.out / "checkpoint").is_dir() else ""
            raise FloatingPointError(f"{error} at step {done['step'] + 1}: lower learning_rate, or use fp32{saved}") from None
        done["step"] += 1
        done["samples"] += int(samples)
        done["tokens"] += int(tokens)
        done["first_losses"] = (done["first_losses"] + [loss])[:WINDOW]
        done["last_losses"] = (done["last_losses"] + [loss])[-WINDOW:]
        row = {"step": done["step"], "loss": loss, "learning_rate": rate, "grad_norm": norm, "samples": int(samples)}
        return row | ({"loss_by_source": by_source.over(ranks).log(done["sources"])} if self.mixed else {})

    def evaluate(self) -> dict[str, Any] | None:
        """Answers to ``eval_dataset``, scored: open, closed, global; None without one. The answers stay in ``self.answers``."""
        if self.eval_dataset is None:
            return None
        how = {"progress": self.config.progress, "scoring": self.scoring, "ranks": self._askers}
        with rest_gathered(self.model):
            self.answers, scores = answer_and_score(self.model, self.eval_dataset, self.dataset.tokenizer, **how)
        return scores

    def summary(self, evaluation: dict[str, Any] | None, everywhere: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """As :func:`fastpeft.train.summary.summary_of`, for the steps so far; ``evaluation``: what :meth:`evaluate` returns;
        ``everywhere``: what each rank has measured (None: this one alone)."""
        everywhere = everywhere or [self._measured()]
        generation = None if evaluation is None else generation_settings(self.eval_dataset, self.dataset.tokenizer)
        notes = self.notes + [saving.note() for saving in (self.features, self.budget) if saving is not None]
        scored = {"eval": evaluation, "generation": generation}
        if self.features is not None:
            found = [of["features"] for of in everywhere]
            scored["features"] = {name: sum(f[name] for f in found) if isinstance(v, int) else v for name, v in found[0].items()}
        if not self.ranks.alone:
            about = {"world": self.ranks.world, "batch_size": self.sampler.batch_size, "bytes_sent_per_step": self.sent}
            scored |= {"ranks": about, "peak_memory_bytes": max(of["peak_memory_bytes"] for of in everywhere)}
        return summary_of(self.model, self.config, self.device, self.done) | scored | {"notes": notes}

    def save(self, rng: dict[str, Any] | None = None) -> None:
        """Write ``adapter/`` and ``checkpoint/`` in ``out``, each atomically. ``rng``: the random state to save (None: now)."""
        self._save_adapter("adapter")
        progress = {"done": self.done, "identity": self.identity, "config": asdict(self.config)}
        save_state(self.out / "checkpoint", self.model, self.optimizer, progress, rng=rng, keep=self.config.keep_checkpoints)
        self.saved_step = self.done["step"]

    def _save_adapter(self, name: str) -> None:
        lineage = {"started_from": self.started_from} if self.started_from else {}
        save_adapter(self.model, self.out / name, description=self.dataset.describe() | lineage, write_more=self.dataset.save)

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
