"""Estimate of a run on its data (`fastpeft estimate --data`): its batches' lengths and images, its steps, its time on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from fastpeft.cost.estimate import DTYPES, Estimate, estimate
from fastpeft.data import EpochSampler
from fastpeft.device import choose_device
from fastpeft.labels import IGNORE_INDEX
from fastpeft.models import ModelSource, resolve
from fastpeft.options import split
from fastpeft.plan import Plan, build, plan_for
from fastpeft.runs import causal, vqa
from fastpeft.runs.options import DataOptions, TextOptions
from fastpeft.runs.splits import load_splits

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


def run_of(dataset: Dataset, batch_size: int, seed: int = 0, questions_per_image: int = 1) -> Run:
    """The run that a trainer would make of ``dataset``, read without its images. Samples are drawn as the run draws them."""
    sampler, images = EpochSampler(dataset, batch_size, seed, questions_per_image), dataset.load_images
    dataset.load_images = False
    try:
        collate, batches = dataset.collator(), []
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


def estimate_run(source: ModelSource, plan: Plan, run: Run, **how) -> Estimate:
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
    model: str, plan: str | None, rank: int | None, image_encoder: str | None, batch_size: int, step: dict, lengths: dict, *, data, vocab, steps, reading
) -> tuple[Estimate, dict[str, Any]]:
    """What `fastpeft estimate` says: the estimate, and with ``data`` the run's own fields (samples, steps, seconds at best, notes)."""
    source = resolve(model, image_encoder)
    chosen = plan_for(source.family.parts, plan or source.family.plan, r=rank)
    if data is None:
        if given := [f"--{name.replace('_', '-')}" for name, value in (("vocab", vocab), ("steps", steps), *reading.items()) if value is not None]:
            raise ValueError(f"{', '.join(given)} say how data are read: give --data too")
        return estimate(source, chosen, batch_size=batch_size, **step, **lengths), {}
    if given := [f"--{name.replace('_', '-')}" for name, value in lengths.items() if value is not None]:
        raise ValueError(f"--data says how long samples are: leave {', '.join(given)} out")
    options, text = split({"data": data, **reading}, DataOptions, TextOptions)
    source, run = read_run(source, options, text, batch_size, vocab=vocab, questions_per_image=step["questions_per_image"])
    found = estimate_run(source, chosen, run, **step)
    return found, run_fields(found, run, steps, step["gradient_accumulation"])


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
