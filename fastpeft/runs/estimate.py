"""Estimate of a run on its data (`fastpeft estimate --data`): its batches' lengths and images, its steps, its time on this machine."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastpeft.cost.estimate import DTYPES, Estimate, estimate
from fastpeft.data import CausalDataset, EpochSampler, SampleList
from fastpeft.device import choose_device
from fastpeft.labels import IGNORE_INDEX
from fastpeft.models import ModelSource
from fastpeft.options import split
from fastpeft.plan import Plan, build
from fastpeft.runs import causal, vqa
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.splits import load_splits
from fastpeft.train.trainer import Trainer

ROOMS = {"vqa": vqa, "causal": causal}
SECONDS = 0.3  # of measuring a machine's products
BATCHES = 8  # of an epoch, whose mean length stands for all


@dataclass(frozen=True)
class Run:
    """A run's data as a step sees them. batch: its first, collated, without pixels. samples: of an epoch. seq_len, answer_len: means over
    samples, in tokens, as :func:`fastpeft.estimate` takes them."""

    batch: dict[str, Any]
    samples: int
    seq_len: int
    answer_len: int


def run_of(dataset: Dataset, batch_size: int, seed: int = 0, questions_per_image: int = 1, share: bool = True) -> Run:
    """The run that a trainer would make of ``dataset``, read without its images. Samples are drawn as the run draws them. ``share``: what
    a causal model's samples begin with is in a batch once."""
    sampler, images = EpochSampler(dataset, batch_size, seed, questions_per_image), dataset.load_images
    dataset.load_images = False
    try:
        collate, batches = dataset.collator(share) if isinstance(dataset, CausalDataset) else dataset.collator(), []
        for indices in sampler:
            batches.append(collate([dataset[i] for i in indices]))
            if len(batches) == BATCHES:
                break
    finally:
        dataset.load_images = images
    samples = sum(len(batch["samples"]) for batch in batches)
    answers = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches) / samples
    if "decoder_input_ids" in batches[0]:
        tokens = statistics.fmean(batch["input_ids"].shape[1] for batch in batches)
        answers = statistics.fmean(batch["labels"].shape[1] for batch in batches)
    else:
        tokens = sum(map(dataset.tokens, batches)) / samples
    return Run(batches[0], len(dataset), max(1, round(tokens)), max(1, round(answers)))


def read_run(
    source: ModelSource, data: DataOptions, text: TextOptions, batch_size: int, *, vocab: str | None = None, **how
) -> tuple[ModelSource, Run]:
    """The same for a model that is not loaded: (the source, of a vocabulary learnt from the data where a run would learn one; its run).
    ``how``: of :func:`run_of`."""
    room = ROOMS[source.kind]
    samples, _ = load_splits(data, False, read=room.read, text=text)
    tokenizer = room.tokenizer_for(source, samples, vocab)
    if source.folder is None:
        learnt = vqa.vocabulary_of(tokenizer) if room is vqa else causal.vocabulary_of(tokenizer, source)
        source = replace(source, overrides=dict(source.overrides) | learnt)
    network = build(source, device="meta")
    preprocess = (vqa.preprocess_for if room is vqa else causal.clip_preprocess)(source.folder, network)
    dataset = room.dataset(network, samples, tokenizer, preprocess, text, skip_bad=data.skip_bad, seed=how.get("seed", 0))
    return source, run_of(dataset, batch_size, **how)


def estimate_run(source: ModelSource | nn.Module, plan: Plan, run: Run, **how) -> Estimate:
    """:func:`fastpeft.estimate` of a step on the run's first batch; ``how``: its other arguments."""
    alike = {"batch_size": len(run.batch["samples"]), "seq_len": run.seq_len, "answer_len": run.answer_len}
    return estimate(source, plan, batch=run.batch, **how | alike)


@torch.no_grad()
def products_per_second(dtype: str = "fp32", device: str | None = None, width: int = 1024) -> float:
    """FLOPs a second of a square matrix product here and now, measured for a third of a second: what a step can reach at best."""
    place = choose_device(device)
    a = torch.randn(width, width, device=place).to(DTYPES[dtype])
    waited = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    done, _ = 0, a @ a
    waited()
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        a @ a
        waited()
        done += 1
    return done * 2 * width**3 / (time.perf_counter() - began)


def estimate_command(
    source: ModelSource, plan: Plan, step: dict[str, Any], *, data: str | None, vocab: str | None, steps: int | None, reading: dict
) -> tuple[Estimate, dict[str, Any]]:
    """What `fastpeft estimate` says: (the estimate of a ``step``, which holds arguments of :func:`fastpeft.estimate`; with ``data`` also
    the fields of :func:`run_fields`). ``reading``: options of DataOptions and TextOptions that were given."""
    if data is None:
        refuse("say how data are read: give --data too", vocab=vocab, steps=steps, **reading)
        return estimate(source, plan, **step), {}
    refuse("say how long samples are, and so does --data: leave one out", seq_len=step["seq_len"], answer_len=step["answer_len"])
    options, text = split({"data": data, **reading}, DataOptions, TextOptions)
    how = {"questions_per_image": step["questions_per_image"], "share": step.get("optimized", True)}
    source, run = read_run(source, options, text, step["batch_size"], vocab=vocab, **how)
    found = estimate_run(source, plan, run, **step)
    return found, run_fields(found, run, steps, step["gradient_accumulation"])


def refuse(why: str, **options: Any) -> None:
    """ValueError naming those of ``options`` that were given."""
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} {why}")


def run_fields(found: Estimate, run: Run, steps: int | None, gradient_accumulation: int = 1) -> dict[str, Any]:
    """How long a run takes where products are all it takes: samples, steps, seconds_at_best, measured products, and it in words."""
    batch, rate = len(run.batch["samples"]) * gradient_accumulation, products_per_second(found.dtype)
    steps = steps or -(-run.samples // batch)
    seconds = steps * batch * found.flops_per_sample / rate
    said = f"{run.samples} samples of {run.seq_len} tokens on average; {steps} steps take {_time(seconds)} at best, at the "
    said += f"{rate / 1e9:,.0f} GFLOP/s that a product of matrices reaches here now"
    return {"samples": run.samples, "steps": steps, "seconds_at_best": seconds, "product_flops_per_second": rate, "notes": [said]}


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def expectations(source: ModelSource, data: DataOptions, held: SampleList | None, asked: Dataset | None, evaluate: bool) -> list[str]:
    """Notes: what a reader should know before a run's figures. ``held``, ``asked``: what will be scored, where something will."""
    notes = [] if asked is None else [f"to score: {note}" for note in [*asked.notes, *filter(None, [held.note])]]
    drawn = all((Path(one.path) / "phantom.json").is_file() for one in data.sources)
    if source.name.endswith("-tiny") and not drawn:
        knows = "knows drawn phantoms alone" if source.folder is not None else "has random weights"
        notes.append(f"{source} is for trying things out: it {knows}, and learns little more than frequent answers from other data")
    elif source.folder is None and not source.name.endswith("-tiny"):
        notes.append(f"{source}'s weights are random here: to adapt trained ones, give their folder as --model")
    if evaluate and asked is None and not data.hold_out:
        notes.append("nothing was scored: --hold-out 0.2 would hold out a fifth of the images, or of samples without any, and score it")
    return notes


def about_run(trainer: Trainer, data: DataOptions, command: str | None) -> dict[str, Any]:
    """Fields of the summary on what made the run; where progress is shown also what its first step will compute and keep, told now."""
    about = {"data": [{"path": one.path} for one in data.sources], "samples_to_train": len(trainer.dataset)}
    about |= {"samples_to_score": len(trainer.eval_dataset)} if trainer.eval_dataset is not None else {}
    about |= {"command": command} if command else {}
    return about | ({"estimate": _first_step(trainer)} if trainer.config.progress else {})


def _first_step(trainer: Trainer) -> dict[str, Any] | None:
    """What the estimate is of the first step; None where there is none."""
    config, network = trainer.config, trainer.model
    run = run_of(trainer.dataset, config.batch_size, config.seed, config.questions_per_image, trainer.shares_prefixes)
    step = {"feature_cache": config.feature_cache, "gradient_accumulation": config.gradient_accumulation, "dtype": config.dtype}
    try:
        found = estimate_run(network, network.fastpeft_plan, run, **step, questions_per_image=config.questions_per_image)
    except ValueError:
        return None
    fields = run_fields(found, run, trainer.total_steps, config.gradient_accumulation)
    told = f"a step: {found.flops_per_sample * found.batch_size / 1e9:,.2f} GFLOP, {found.saved_bytes / 1e6:,.1f} MB kept for backward"
    print(f"{told}, {found.peak_bytes / 1e9:.2f} GB at its peak; {fields['notes'][0]}", file=sys.stderr)
    kept = {name: getattr(found, name) for name in ("flops_per_sample", "saved_bytes", "peak_bytes")}
    return kept | {"seconds_at_best": fields["seconds_at_best"]}
