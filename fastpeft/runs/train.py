"""Training run: load, adapt, train, score (`fastpeft train`)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastpeft.evaluate import Scoring
from fastpeft.files import write_json
from fastpeft.models import ModelSource, resolve
from fastpeft.models.family import Kind
from fastpeft.models.quantize import check_quantize
from fastpeft.plan import adapt, plan_for
from fastpeft.runs import causal, vqa
from fastpeft.runs.options import DataOptions, MetricOptions, TextOptions
from fastpeft.runs.splits import data_notes, load_splits
from fastpeft.train.config import TrainConfig
from fastpeft.train.trainer import Trainer

RUNS: dict[Kind, ModuleType] = {"vqa": vqa, "causal": causal}  # each has read, model_for, dataset and answer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train_run(
    model: str | ModelSource,
    plan: str | dict,
    data: DataOptions,
    config: TrainConfig,
    *,
    text: TextOptions | None = None,
    metrics: MetricOptions | None = None,
    vocab: str | None = None,
    pretrained: bool = True,
    evaluate: bool = True,
    quantize: str | None = None,
    **lora,
) -> dict[str, Any]:
    """Load, adapt, train, score; returns the summary. ``text``: how a causal language model reads its data. ``metrics``: of
    generated text, with the scores. ``quantize``: as
    :func:`fastpeft.build` takes it, from weights in the run's dtype. ``lora``: as :func:`plan_for`."""
    source, text = resolve(model), text or TextOptions()
    run, model_options = RUNS[source.kind], {"vocab": vocab, "pretrained": pretrained, "seed": config.seed}
    if quantize is not None:
        check_quantize(quantize, DTYPES[config.dtype], source)
        model_options["base"] = {"quantize": quantize, "dtype": DTYPES[config.dtype]}
    samples, held = load_splits(data, evaluate, read=run.read, text=text)
    network, tokenizer, preprocess = run.model_for(source, samples, **model_options)
    torch.manual_seed(config.seed)  # new adapters are drawn at random
    adapt(network, plan_for(source.family.parts, plan, **lora))
    reading = {"tokenizer": tokenizer, "preprocess": preprocess, "text": text, "skip_bad": data.skip_bad}
    dataset = run.dataset(network, samples, seed=config.seed, **reading)
    eval_dataset = run.dataset(network, held, prompts_only=True, **reading) if evaluate and held is not None else None
    scoring = Scoring(samples, (metrics or MetricOptions()).chosen())
    trainer = Trainer(network, dataset, config, eval_dataset=eval_dataset, scoring=scoring)
    trainer.notes += data_notes(samples) + dataset.notes
    trainer.notes += [f"to score: {note}" for note in (eval_dataset.notes if eval_dataset is not None else ())]
    summary = trainer.fit()
    if data.hold_out and config.out:
        write_json(Path(config.out) / "held_out.json", [sample.qid for sample in held])  # a split file
    return summary
