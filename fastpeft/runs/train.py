"""Training run: load, adapt, train, score (`fastpeft train`)."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastpeft.adapters import adapter_in, describe, fingerprint, load_adapter
from fastpeft.data import SampleList
from fastpeft.data.images import allow_pixels
from fastpeft.evaluate import Scoring
from fastpeft.files import write_json
from fastpeft.models import ModelSource, resolve
from fastpeft.models.family import Kind
from fastpeft.models.quantize import check_quantize
from fastpeft.models.shared_base import own_what_is_trained
from fastpeft.plan import adapt, plan_for
from fastpeft.ranks import ranks_here
from fastpeft.runs import causal, vqa
from fastpeft.runs.estimate import about_run, expectations
from fastpeft.runs.options import DataOptions, MetricOptions, TextOptions
from fastpeft.runs.splits import data_notes, load_splits, load_validation
from fastpeft.train.caches import Caches
from fastpeft.train.config import TrainConfig
from fastpeft.train.resume import check_start
from fastpeft.train.trainer import Trainer
from fastpeft.train.validation import ValidationData

RUNS: dict[Kind, ModuleType] = {"vqa": vqa, "causal": causal}  # each has read, model_for, dataset and answer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def described(adapter: str | Path) -> dict[str, Any]:
    """An adapter's description, of one that a training run wrote, or of that run's folder. ValueError for anything else."""
    about = describe(adapter_in(adapter))
    if not about.get("tokenizer") or not isinstance(about.get("base"), dict):
        raise ValueError(f"init_adapter: {adapter} is no adapter that `fastpeft train` wrote (its tokenizer and base are missing)")
    return about


def go_on_from(network: nn.Module, adapter: str | Path, about: dict[str, Any]) -> dict[str, Any]:
    """Load an adapter's tensors into an adapted model, and return its lineage for the new adapter's description. ValueError where plan
    or base are others."""
    if about.get("base_fingerprint") not in (None, fingerprint(network)):
        raise ValueError(f"init_adapter: {adapter} was trained on another base ({about['base'].get('model')} with other weights)")
    adapter = adapter_in(adapter)
    load_adapter(network, adapter)
    crc = 0
    for file in sorted(Path(adapter).rglob("*.safetensors")):
        crc = zlib.crc32(file.read_bytes(), crc)
    earlier = {"started_from": about["started_from"]} if about.get("started_from") else {}
    return {"adapter": str(adapter), "plan": about["plan"], "tensors": f"{crc:08x}"} | earlier


@dataclass
class Splits:
    """Samples to train on, to score, to validate on, and of those what ``hold_out`` held out."""

    samples: SampleList
    held: SampleList | None
    validating: SampleList | None
    held_out: SampleList | None


class Loaded:
    """A base and its data, loaded once: what runs have in common that differ in their adapters alone. Options are those of
    :func:`train_run`; of ``config`` only the seed, which draws random weights, and the dtype count here."""

    def __init__(
        self,
        model: str | ModelSource,
        data: DataOptions,
        config: TrainConfig,
        *,
        text: TextOptions | None = None,
        vocab: str | None = None,
        pretrained: bool = True,
        evaluate: bool = True,
        quantize: str | None = None,
        init_adapter: str | None = None,
        image_encoder: str | None = None,
    ):
        allow_pixels(data.max_pixels)
        self.source, self.data, self.text, self.evaluate = resolve(model, image_encoder), data, text or TextOptions(), evaluate
        before = None if init_adapter is None else described(init_adapter)
        parts = {part.name for part in self.source.family.parts}
        if before is not None and before["treatments"].keys() != parts:  # told before data are read, which another model cannot
            trained = f"{init_adapter} is of {before['base'].get('model')}"
            raise ValueError(f"init_adapter: {trained}, and the model is {self.source.name}: give its own")
        self.run, options = RUNS[self.source.kind], {"vocab": vocab, "pretrained": pretrained, "seed": config.seed}
        if quantize is not None:
            check_quantize(quantize, DTYPES[config.dtype], self.source)
            options["base"] = {"quantize": quantize, "dtype": DTYPES[config.dtype]}
        if before is not None:  # the vocabulary and the random base that it was trained with
            vocab = vocab or str(adapter_in(init_adapter) / before["tokenizer"])
            options |= {"vocab": vocab, "seed": before["base"].get("seed", config.seed)}
        self._splits: dict[bool, Splits] = {}
        self._datasets: dict[tuple[int, bool], Any] = {}
        samples = self.splits(bool(config.eval_every)).samples
        self.network, self.tokenizer, self.preprocess = self.run.model_for(self.source, samples, **options)

    def splits(self, validates: bool) -> Splits:
        """``validates``: with samples to validate on."""
        if validates not in self._splits:
            reading = {"read": self.run.read, "text": self.text}
            samples, held = load_splits(self.data, self.evaluate, **reading)
            held_out, validating = held if self.data.hold_out else None, None
            if validates:
                validating, held = load_validation(self.data, held, **reading)
            self._splits[validates] = Splits(samples, held, validating, held_out)
        return self._splits[validates]

    def dataset(self, samples: SampleList, tokenizer, seed: int = 0, *, prompts_only: bool = False) -> Any:
        """Samples as the base reads them; text is encoded once, and images are decoded once, whatever the seed. ``tokenizer``: the base's,
        or a copy."""
        key = (id(samples), prompts_only)
        if key not in self._datasets:
            reading = {"tokenizer": self.tokenizer, "preprocess": self.preprocess, "text": self.text, "skip_bad": self.data.skip_bad}
            asks = {"prompts_only": True} if prompts_only else {"seed": seed}
            self._datasets[key] = self.run.dataset(self.network, samples, **reading, **asks)
        return self._datasets[key].seeded(seed, tokenizer)

    def adapted(
        self, network: nn.Module, plan: str | dict | None, config: TrainConfig, init_adapter: str | None = None, **lora
    ) -> dict[str, Any] | None:
        """Adapt ``network``, the base or a model on it, in place; returns the lineage of ``init_adapter``, None without. plan None: the
        plan of ``init_adapter``, its options included, or of the model's paper."""
        torch.manual_seed(config.seed)  # new adapters are drawn at random
        family = self.source.family
        default = family.plan if init_adapter is None else described(init_adapter)["treatments"]
        adapt(network, plan_for(family.parts, plan or default, **lora))
        if network is not self.network:
            own_what_is_trained(network)
        return None if init_adapter is None else go_on_from(network, init_adapter, described(init_adapter))

    def trainer(
        self,
        network: nn.Module,
        config: TrainConfig,
        *,
        metrics: MetricOptions | None = None,
        started_from: dict[str, Any] | None = None,
        command: str | None = None,
        caches: Caches | None = None,
    ) -> Trainer:
        """A run of an adapted network. A run on a model of its own has a tokenizer of its own: using one changes what it saves."""
        splits = self.splits(bool(config.eval_every))
        tokenizer = self.tokenizer if network is self.network else copy.deepcopy(self.tokenizer)
        dataset = self.dataset(splits.samples, tokenizer, config.seed)
        eval_dataset = self.dataset(splits.held, tokenizer, prompts_only=True) if self.evaluate and splits.held is not None else None
        scoring = Scoring(splits.samples, (metrics or MetricOptions()).chosen())
        validation = None
        if splits.validating is not None:
            asked = self.dataset(splits.validating, tokenizer, prompts_only=True) if config.eval_scores else None
            validation = ValidationData(self.dataset(splits.validating, tokenizer, config.seed), asked)
        more = {"eval_dataset": eval_dataset, "scoring": scoring, "started_from": started_from, "validation": validation}
        trainer = Trainer(network, dataset, config, caches=caches, **more)
        said = expectations(self.source, self.data, splits.held, eval_dataset, self.evaluate)
        trainer.notes += data_notes(splits.samples) + dataset.notes + said
        trainer.about = about_run(trainer, self.data, command)
        return trainer

    def write_held_out(self, config: TrainConfig) -> None:
        """What was held out, as a split file in the run's folder."""
        held_out = self.splits(bool(config.eval_every)).held_out
        if held_out is not None and config.out is not None:
            write_json(Path(config.out) / "held_out.json", [sample.qid for sample in held_out])


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
    plan None: ``init_adapter``'s, or of the model's paper. ``command``: a command line that does the same, for the summary. With progress
    shown, the step is estimated first, and the summary has the estimate beside what was measured."""
    ranks_here().first_does(lambda: check_start(config))
    base = {"vocab": vocab, "pretrained": pretrained, "quantize": quantize, "image_encoder": image_encoder}
    loaded = Loaded(model, data, config, text=text, evaluate=evaluate, init_adapter=init_adapter, **base)
    started_from = loaded.adapted(loaded.network, plan, config, init_adapter, **lora)
    trainer = loaded.trainer(loaded.network, config, metrics=metrics, started_from=started_from, command=command)
    summary = trainer.fit()
    if trainer.out is not None:
        loaded.write_held_out(config)
    return summary
