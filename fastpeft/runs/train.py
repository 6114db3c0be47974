"""Training run: load, adapt, train, score (`fastpeft train`)."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastpeft.adapters import describe, fingerprint, load_adapter
from fastpeft.data.images import allow_pixels
from fastpeft.evaluate import Scoring
from fastpeft.files import write_json
from fastpeft.models import ModelSource, resolve
from fastpeft.models.family import Kind
from fastpeft.models.quantize import check_quantize
from fastpeft.plan import adapt, plan_for
from fastpeft.runs import causal, vqa
from fastpeft.runs.estimate import about_run, expectations
from fastpeft.runs.options import DataOptions, MetricOptions, TextOptions
from fastpeft.runs.splits import data_notes, load_splits, load_validation
from fastpeft.train.config import TrainConfig
from fastpeft.train.trainer import Trainer
from fastpeft.train.validation import ValidationData

RUNS: dict[Kind, ModuleType] = {"vqa": vqa, "causal": causal}  # each has read, model_for, dataset and answer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def described(adapter: str | Path) -> dict[str, Any]:
    """An adapter's description, of one that a training run wrote. ValueError for anything else."""
    about = describe(adapter)
    if not about.get("tokenizer") or not isinstance(about.get("base"), dict):
        raise ValueError(f"init_adapter: {adapter} is no adapter that `fastpeft train` wrote (its tokenizer and base are missing)")
    return about


def go_on_from(network: nn.Module, adapter: str | Path, about: dict[str, Any]) -> dict[str, Any]:
    """Load an adapter's tensors into an adapted model, and return its lineage for the new adapter's description. ValueError where plan
    or base are others."""
    if about.get("base_fingerprint") not in (None, fingerprint(network)):
        raise ValueError(f"init_adapter: {adapter} was trained on another base ({about['base'].get('model')} with other weights)")
    load_adapter(network, adapter)
    crc = 0
    for file in sorted(Path(adapter).rglob("*.safetensors")):
        crc = zlib.crc32(file.read_bytes(), crc)
    earlier = {"started_from": about["started_from"]} if about.get("started_from") else {}
    return {"adapter": str(adapter), "plan": about["plan"], "tensors": f"{crc:08x}"} | earlier


def train_run(
    model: str | ModelSource,
    plan: str | dict | None,
    data: DataOptions,
    config: TrainConfig,
    *,
    text: TextOptions | None = None,
    metrics: MetricOptions | None = None,
    vocab: str | None = None,
    pretrained: bool = True,
    evaluate: bool = True,
    quantize: str | None = None,
    init_adapter: str | None = None,
    image_encoder: str | None = None,
    command: str | None = None,
    **lora,
) -> dict[str, Any]:
    """Load, adapt, train, score; returns the summary. ``text``: how a causal language model reads its data. ``metrics``: of
    generated text, with the scores. ``quantize``: as
    :func:`fastpeft.build` takes it, from weights in the run's dtype. ``init_adapter``: an adapter of the same base and plan to go on from,
    with a fresh optimiser and schedule. ``image_encoder``: as :func:`fastpeft.models.resolve`. ``lora``: as :func:`plan_for`.
    plan None: of the model's paper. ``command``: a command line that does the same, for the summary. With progress shown, the step is
    estimated first, and the summary has the estimate beside what was measured."""
    allow_pixels(data.max_pixels)
    source, text = resolve(model, image_encoder), text or TextOptions()
    before = None if init_adapter is None else described(init_adapter)
    run, model_options = RUNS[source.kind], {"vocab": vocab, "pretrained": pretrained, "seed": config.seed}
    if quantize is not None:
        check_quantize(quantize, DTYPES[config.dtype], source)
        model_options["base"] = {"quantize": quantize, "dtype": DTYPES[config.dtype]}
    if before is not None:  # the vocabulary and the random base that it was trained with
        model_options |= {"vocab": vocab or str(Path(init_adapter) / before["tokenizer"]), "seed": before["base"].get("seed", config.seed)}
    samples, held = load_splits(data, evaluate, read=run.read, text=text)
    held_out, validating = held if data.hold_out else None, None
    if config.eval_every:
        validating, held = load_validation(data, held, read=run.read, text=text)
    network, tokenizer, preprocess = run.model_for(source, samples, **model_options)
    torch.manual_seed(config.seed)  # new adapters are drawn at random
    adapt(network, plan_for(source.family.parts, plan or source.family.plan, **lora))
    started_from = None if before is None else go_on_from(network, init_adapter, before)
    reading = {"tokenizer": tokenizer, "preprocess": preprocess, "text": text, "skip_bad": data.skip_bad}
    dataset = run.dataset(network, samples, seed=config.seed, **reading)
    eval_dataset = run.dataset(network, held, prompts_only=True, **reading) if evaluate and held is not None else None
    scoring = Scoring(samples, (metrics or MetricOptions()).chosen())
    more = {"started_from": started_from, "validation": None}
    if validating is not None:
        asked = run.dataset(network, validating, prompts_only=True, **reading) if config.eval_scores else None
        more["validation"] = ValidationData(run.dataset(network, validating, seed=config.seed, **reading), asked)
    trainer = Trainer(network, dataset, config, eval_dataset=eval_dataset, scoring=scoring, **more)
    trainer.notes += data_notes(samples) + dataset.notes + expectations(source, data, held, eval_dataset, evaluate)
    trainer.about = about_run(trainer, data, command)
    summary = trainer.fit()
    if held_out is not None and trainer.out is not None:
        write_json(Path(config.out) / "held_out.json", [sample.qid for sample in held_out])  # a split file
    return summary
