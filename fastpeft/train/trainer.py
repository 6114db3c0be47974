"""Training loop of one process, or of one of several ranks."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.cost.memory_budget import MemoryBudget
from fastpeft.cost.profile import reset_peak
from fastpeft.data import EpochSampler, VQADataset
from fastpeft.data.causal_batches import sharing_note
from fastpeft.device import choose_device
from fastpeft.evaluate import Scoring, answer_and_score, generation_settings, write_answers
from fastpeft.evaluate.responses import model_inputs, takes_shared_prefixes
from fastpeft.features.cache import sees_constants
from fastpeft.files import locked, write_json
from fastpeft.fused.head.outputs import lean_logits
from fastpeft.ranks import ALONE, RankLost, Ranks, ranks_here
from fastpeft.report.report import write_report
from fastpeft.savings import without
from fastpeft.train.caches import Caches
from fastpeft.train.callbacks import TRACKERS, Callback, Followers
from fastpeft.train.capturable import why_not_for
from fastpeft.train.config import TrainConfig
from fastpeft.train.faults import Faults
from fastpeft.train.gradients import trained
from fastpeft.train.graph import step_for
from fastpeft.train.interrupts import Interrupted, StopBetweenSteps, halt, to_the_end
from fastpeft.train.loading import Loading
from fastpeft.train.metrics import MetricsLog, step_tracer
from fastpeft.train.optimizer import Optimizer, base_in
from fastpeft.train.resume import BEST, identity_of, open_runs
from fastpeft.train.rows import Rows
from fastpeft.train.saving import Saver
from fastpeft.train.sharding import rest_gathered, take_apart, to_device_whole_or_not
from fastpeft.train.shares import Shares
from fastpeft.train.state import random_state
from fastpeft.train.summary import over_ranks, summary_of
from fastpeft.train.validation import Validation, ValidationData


class Trainer:
    """Trains what the model's plan says, measures what it costs, and leaves a run's files in ``config.out``.

    ``Trainer(model, dataset, TrainConfig(steps=200)).fit()`` returns the summary (the fields of ``summary.json``). ``dataset`` is a
    :class:`fastpeft.data.VQADataset` with a tokenizer; ``eval_dataset`` is answered and scored at the end, with
    ``scoring`` (default: the data set's answers as candidates, every text metric that has what it needs). ``started_from``: the lineage
    of an adapter that the model holds already, kept in the description of the new one. ``validation``: what ``eval_every`` validates on;
    the run then ends with the best adapter. ``callbacks`` follow the run (:class:`fastpeft.train.callbacks.Callback`), as do ``track``'s.
    ``caches``: those of several runs on one base (:class:`fastpeft.train.together.Together`).
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
        caches: Caches | None = None,
    ):
        self.started_from = started_from
        self.scoring = scoring or Scoring(dataset.samples)
        self.ranks, config = ranks_here(), config or TrainConfig()
        if not self.ranks.first:  # the first one writes and speaks for all
            config, callbacks = replace(config, progress=False, tensorboard=False, track=None, trace=False), ()
        self.model, self.dataset, self.config, self.eval_dataset = model, dataset, config, eval_dataset
        self.followers = Followers([*callbacks, *(TRACKERS[name]() for name in config.trackers)])
        if dataset.tokenizer is None:
            raise ValueError("the data set has no tokenizer: VQADataset(samples, preprocess, tokenizer=...)")
        if getattr(model, "fastpeft_plan", None) is None:
            raise ValueError("the model has no plan: call fastpeft.adapt(model, plan) first")
        self.device = choose_device(self.ranks.device(config.device))
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
        to_device_whole_or_not(model, self.device, self.ranks, sharded=bool(config.shard), whole=sees_constants(model, dataset, config))
        base_in(model, self.dtype)
        self.inputs = model_inputs(model, dataset)
        self.notes: list[str] = []
        self.mixed = len({sample.data for sample in dataset.samples}) > 1
        self.ungraphed = why_not_for(config, model, self.device, self.mixed, self.ranks)  # '' or why no step is a CUDA graph
        self.sample_batches_of(config.batch_size * self.ranks.world)
        self.out = Path(config.out) if config.out and self.ranks.first else None
        self.done = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0, "batches": 0, "first_losses": [], "last_losses": []}
        self.done |= {"half_batches": 0, "skipped": 0, "skipped_in_a_row": 0}
        self.done |= {"steady_samples": 0, "steady_seconds": 0.0, "peak_memory_bytes": 0, "cost": None, "sources": {}, "validation": {}}
        self.plan_steps()
        self.optimizer = Optimizer(model, config, self.total_steps)
        self._before: dict[str, Any] | None = None  # the random state before a step that has changed nothing else yet
        self.saved_step: int | None = None
        self.sent = 0  # bytes given to the other ranks in the last step
        self.saver, self.faults = Saver(self), Faults(self)
        self.about: dict[str, Any] = {}  # more fields of the summary: what made the run
        self.budget = MemoryBudget(model, config.memory_budget, self.ranks if config.shard else ALONE) if config.memory_budget else None
        self.caches = caches or Caches()
        self.features = self.caches.features_of(self)
        self.notes += self.caches.keep_layers_of(self)
        parts = {"features": self.features, "budget": self.budget, "mixed": self.mixed, "ranks": self.ranks}
        known = (model, dataset, self.optimizer, self.inputs, self.device, self.dtype)
        self.step = step_for(config, self.ungraphed, *known, **parts)
        self.rows = Rows(self)
        if config.eval_every and validation is None:
            raise ValueError("eval_every needs validation samples: Trainer(..., validation=ValidationData(...))")
        more = (self.scoring, self.device, None if config.shard else self.features, self._askers)
        self.validation = Validation(model, validation, config, *more) if config.eval_every else None

    @property
    def _askers(self) -> Ranks:
        """Ranks that share questions; of a base in pieces none does, as all have to run the same layers at the same time."""
        return ALONE if self.config.shard else self.ranks

    def sample_batches_of(self, samples: int) -> None:
        """Over all ranks."""
        config = self.config
        self.sampler = EpochSampler(self.dataset, samples, config.seed, config.questions_per_image)
        shares = Shares(self.sampler, self.ranks, config.batch_size, together=bool(config.shard))
        how = {"workers": config.num_workers, "timeout": config.worker_timeout, "pin_memory": self.device.type == "cuda"}
        self.loading = Loading(self.dataset, shares, self.collator, **how)

    @property
    def model_name(self) -> str:
        return getattr(self.model, "fastpeft_source", {}).get("model") or type(self.model).__name__

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

    @property
    def shares_prefixes(self) -> bool:
        """Not beside kept lower layers, which hold samples alone, nor in place of CUDA graphs where questions come one an image."""
        config, graphs = self.config, not self.ungraphed and self.config.questions_per_image == 1
        return config.share_prefix and config.cache_layers is None and not graphs and takes_shared_prefixes(self.model, self.inputs)

    @functools.cached_property
    def collator(self) -> Callable[[list[dict]], dict]:
        """The data set's; with ``share_prefix``, where the model takes such batches, samples share what they begin with."""
        if not self.shares_prefixes:
            return self.dataset.collator()
        self.notes += [note] if (note := sharing_note(self.dataset, self.sampler)) else []
        return self.dataset.collator(share=True)

    def fit(self) -> dict[str, Any]:
        """Train to the last step; returns the summary and, with ``out``, writes summary.json, metrics.jsonl, adapter/, checkpoint/.

        SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 let the step end and save a checkpoint; :class:`Interrupted`, a KeyboardInterrupt, then
        says how to go on. A run that ends by an error between two steps, or before a step's update, saves one too. Another process cannot
        run in ``out`` meanwhile. A finished run that is resumed changes no file, and returns the summary that is there.
        """
        with StopBetweenSteps(self.ranks) as stop:
            return to_the_end(self.turns(stop, alone=True))

    def turns(self, stop: StopBetweenSteps, alone: bool = False) -> Generator[None, None, dict[str, Any]]:
        """What :meth:`fit` does, in turns: it halts before the first step and after each, and returns the summary. Random numbers are this
        run's own, whoever draws some meanwhile (``alone``: nobody). What is thrown in where it halts ends it there, with a checkpoint."""
        torch.manual_seed(self.config.seed)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out), self.followers:
            if (finished := open_runs(self)) is not None:
                return finished
            reset_peak(self.device)
            self.model.train()
            try:
                yield from self._train(stop, alone)
            except Interrupted as error:
                raise Interrupted(self._saved_at_end(stop, "stopped"), error.number) from None
            except RankLost as error:
                raise RankLost(f"{error}; {said}" if (said := self._saved_at_end(stop, "")) else str(error)) from None
            except Exception as error:
                with stop.ending():
                    cause, error = error, self.loading.fault(error) or error
                said = self._saved_at_end(stop, "").removesuffix(f": {error}")  # of one cause, which is told once
                if said and type(error) in (RuntimeError, ValueError, OSError, ChildProcessError, FloatingPointError):
                    raise type(error)(f"{error}; {said}") from cause
                raise error from cause if cause is not error else error.__cause__
            try:
                return self._finish()
            except Interrupted as error:
                said = "stopped when all steps were done" + (" and saved; --resume scores them" if self.out else "")
                raise Interrupted(said, error.number) from None

    def _train(self, stop: StopBetweenSteps, alone: bool) -> Iterator[None]:
        """Steps from where the run stands to its last, and the last checkpoint; halts between them."""
        config, done = self.config, self.done
        self.stop = stop
        self.caches.prepare(self)
        if config.shard:
            take_apart(self)
        about = {"out": self.out, "step": done["step"], "total_steps": self.total_steps, "config": asdict(config)}
        self.followers.start(about | {"model": self.model_name, "plan": str(self.model.fastpeft_plan)})
        log = MetricsLog(self.out, done, self.device, self.total_steps, progress=config.progress)
        with (
            lean_logits(self.model),
            log,
            step_tracer(self.out if config.trace else None, self.total_steps - done["step"]) as tracer,
            stop.together(),
        ):
            self.step.start(done["step"])
            yield from halt(alone)
            began = time.perf_counter()
            try:
                for batches, whole in self._batches():
                    stop.hold_workers()
                    with stop.later(), without(*config.savings_off):
                        self.rows.waiting.append(self._step(batches, whole))
                        saves = self.out and config.save_every and done["step"] % config.save_every == 0
                        read = saves or tracer or stop.asked or self.rows.due()
                        if read:
                            self.rows.log(log, began)
                        if tracer is not None:
                            tracer.step()
                        if saves and done["step"] < self.total_steps:
                            self.save()
                    if read:
                        self.followers.check()
                        yield from halt(alone)
                        began = time.perf_counter()
            except BaseException:
                with contextlib.suppress(FloatingPointError, OSError):
                    self.rows.log(log, began, whole=False)
                raise
        self.notes += self.caches.leave(self)
        self.saver.finish(stop.later)

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
            with stop.ending():
                if self.saved_step != step:
                    self.save(rng=self._before if stop.busy else None)
                self.saver.wait()
        except OSError as error:
            return f"{how or 'stopped'} after step {step}, which could not be saved: {error}"
        return f"{how or 'stopped'} after step {step}; --resume goes on from there"

    def validate(self) -> dict[str, Any]:
        """What a validation adds to the step's row, where one is due; the best adapter is kept as it comes."""
        validation, done = self.validation, self.done
        if validation is None or not validation.due(done["step"], self.total_steps):
            return {}
        began = time.perf_counter()
        with rest_gathered(self.model):
            row = validation.row()
        if validation.better(done["step"], row, done["validation"]):
            if self.out:
                self.saver.save_adapter(BEST)
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
            if scored is not None:
                write_answers(self.out / "predictions.json", self.eval_dataset, self.answers)
            write_json(self.out / "summary.json", summary)
            asked = self.eval_dataset.samples if self.eval_dataset is not None else ()
            write_report(self.out, data={sample.image.parent for sample in asked if sample.image is not None})
        self.followers.end(summary)
        if failure is not None:
            raise failure
        return self.ranks.from_first(summary)

    def _measured(self) -> dict[str, Any]:
        """What each rank has measured for itself."""
        counts = self.features.counts() if self.features is not None else None
        return {"peak_memory_bytes": self.done["peak_memory_bytes"], "features": counts}

    def _batches(self) -> Iterator[tuple[list[dict], int]]:
        """(``gradient_accumulation`` batches, their number), the last group of what is left, from where the run stands to its last step.
        Of several ranks each has its share of every batch, in as many pieces as forwards."""
        group, whole = [], 0
        while self.done["batches"] < self.total_batches:
            self.dataset.load_images = self.features is None
            for pieces in self.loading.epoch_from(self.done["batches"] + whole):
                group, whole = group + pieces, whole + 1
                if whole == min(self.config.gradient_accumulation, self.total_batches - self.done["batches"]):
                    yield group, whole
                    group, whole = [], 0
                    if self.done["batches"] == self.total_batches:
                        return

    def _step(self, batches: list[dict], whole: int) -> dict[str, float]:
        """Forward, backward and update on one group of batches, this rank's part of ``whole`` ones; the run's first is also measured."""
        done, ranks, sent = self.done, self.ranks, self.ranks.sent
        if not ranks.alone:  # a draw of its own for each rank and step: no state of it is needed to go on, on as many ranks or others
            torch.manual_seed(random.Random(f"dropout {self.config.seed} {ranks.rank} {done['step']}").getrandbits(63))
        before = random_state()
        self._before = before if self.out else None
        self.rows.begin(before, whole)
        loss, by_source, cost = self.faults.passes(batches, whole, before)
        done["cost"] = done["cost"] or cost
        own = [batch for batch in batches if batch["counts"]]
        mine = [loss, sum(len(batch["samples"]) for batch in own), sum(map(self.dataset.tokens, own))]
        loss, samples, tokens, *heard = ranks.sum([*mine, *self.stop.heard()])
        self.stop.agree(heard)
        self.sent = ranks.sent - sent
        if loss is not None:
            self.rows.settle()
        row: dict[str, Any] = {"step": done["step"] + 1, "loss": loss}
        try:
            self.step.sums.finish()
            self._before = None
            row["learning_rate"], row["grad_norm"] = self.step.update(done["step"], loss)
            done["skipped_in_a_row"] = 0
        except FloatingPointError as error:
            self._before = before if self.out else None  # nothing has changed
            row |= self.faults.not_finite(error, batches, whole, before)
        self._before = None
        done["step"] += 1
        done["batches"] += whole
        done["samples"] += int(samples)
        done["tokens"] += int(tokens)
        row["samples"] = int(samples)
        if "skipped" not in row:
            if loss is not None:
                self.rows.enter(loss)
            row |= {"loss_by_source": by_source.over(ranks).log(done["sources"])} if self.mixed else {}
        return row

    def evaluate(self) -> dict[str, Any] | None:
        """Answers to ``eval_dataset``, scored: open, closed, global; None without one. The answers stay in ``self.answers``."""
        if self.eval_dataset is None:
            return None
        how = {"progress": self.config.progress, "scoring": self.scoring, "ranks": self._askers}
        how |= {"features": None if self.config.shard else self.features}
        with rest_gathered(self.model):
            self.answers, scores = answer_and_score(self.model, self.eval_dataset, self.dataset.tokenizer, **how)
        return scores

    def summary(self, evaluation: dict[str, Any] | None, everywhere: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """As :func:`fastpeft.train.summary.summary_of`, for the steps so far; ``evaluation``: what :meth:`evaluate` returns;
        ``everywhere``: what each rank has measured (None: this one alone)."""
        everywhere = everywhere or [self._measured()]
        generation = None if evaluation is None else generation_settings(self.eval_dataset, self.dataset.tokenizer)
        savings = [saving.note() for saving in (self.features, self.budget) if saving is not None]
        notes = self.notes + [note for note in (self.step.said(),) if note] + savings
        scored = {"eval": evaluation, "generation": generation}
        scored |= over_ranks(everywhere) | {name: self.done[name] for name in ("skipped", "half_batches") if self.done[name]}
        if not self.ranks.alone:
            scored["ranks"] = {"world": self.ranks.world, "batch_size": self.sampler.batch_size, "bytes_sent_per_step": self.sent}
        return summary_of(self.model, self.config, self.device, self.done) | scored | self.about | {"notes": notes}

    def save(self, rng: dict[str, Any] | None = None) -> None:
        """Write ``adapter/`` and ``checkpoint/`` in ``out``, each atomically. ``rng``: the random state to save (None: now)."""
        self.rows.settle()
        self.saver.save(rng)
        self.saved_step = self.done["step"]

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, unless ``allow_change`` names it."""
        return identity_of(self)
