"""Validation between steps: loss and scores of held-out samples, the best adapter kept, early stopping.

Validation draws nothing from the run's random state and reads the model in evaluation mode: a run with it takes the same steps to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastpeft.adapters import load_adapter
from fastpeft.device import to_device
from fastpeft.evaluate import Scoring, answer_and_score
from fastpeft.evaluate.answers import images_left_alone
from fastpeft.evaluate.responses import model_inputs, takes_shared_prefixes
from fastpeft.features.cache import FeatureCache
from fastpeft.ranks import ALONE, Ranks
from fastpeft.train.config import TrainConfig

SCORES = ("open", "closed", "global")


@dataclass(frozen=True)
class ValidationData:
    """``labelled``: the samples as a training data set, for their loss; ``asked``: as prompts, for their answers, or None."""

    labelled: Any
    asked: Any = None


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """PyTorch's generators are afterwards as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class Validation:
    """Validates a run's model every ``config.eval_every`` steps. ``done``: what the run keeps of it, in its checkpoint too. ``features``:
    the run's cache of frozen features, None without; validation's images are in it from the first time on."""

    def __init__(
        self,
        model: nn.Module,
        data: ValidationData,
        config: TrainConfig,
        scoring: Scoring,
        device: torch.device,
        features: FeatureCache | None = None,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.model, self.data, self.config, self.scoring, self.device = model, data, config, scoring, device
        self.features = features
        self.inputs = model_inputs(model, data.labelled)
        if config.best_by != "loss" and data.asked is None:
            raise ValueError(f"best_by={config.best_by} needs answers: give the validation samples as prompts, too")
        self.kept: dict[str, torch.Tensor] | None = None  # of a run that writes no files

    def due(self, step: int, last: int) -> bool:
        """After a step: every ``eval_every`` of them, and after the last."""
        return step % self.config.eval_every == 0 or step == last

    def row(self) -> dict[str, Any]:
        """{"validation_loss": as the model's own loss over all samples, "eval": {"open", "closed", "global"} where answers are asked}."""
        config = self.config
        with random_state_kept(self.device):
            found: dict[str, Any] = {"validation_loss": self.loss()}
            if config.eval_scores and self.data.asked is not None:
                how = {"progress": config.progress, "scoring": Scoring(self.scoring.training, {"metrics": ()})}
                how |= {"features": self.features, "ranks": self.ranks}
                _, scores = answer_and_score(self.model, self.data.asked, self.data.labelled.tokenizer, **how)
                found["eval"] = {name: scores.get(name) for name in SCORES}
        return found

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over all samples, each batch by its terms; dropout is off. Ranks share the batches."""
        labelled, was_training, size = self.data.labelled, self.model.training, self.config.batch_size
        order, collate = list(range(len(labelled))), labelled.collator()
        if self.config.share_prefix and self.config.cache_layers is None and takes_shared_prefixes(self.model, self.inputs):
            first: dict[Any, int] = {}
            order.sort(key=lambda i: first.setdefault(labelled.samples[i].image, i))  # an image's samples next to each other
            collate = labelled.collator(share=True)
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        loader = DataLoader(labelled, batch_sampler=self.ranks.share(batches), collate_fn=collate, generator=torch.Generator())
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        total, terms = 0.0, 0
        self.model.eval()
        try:
            with images_left_alone(labelled, self.features is not None):
                for batch in loader:
                    weight = labelled.weight(batch)
                    if weight:
                        inputs = to_device(batch, self.inputs, self.device, dtype, self.model)
                        inputs = inputs if self.features is None else self.features.put_in(inputs, batch)
                        total += float(self.model(**inputs).loss) * weight
                        terms += weight
        finally:
            self.model.train(was_training)
        total, terms = self.ranks.sum([total, terms])
        return total / terms if terms else math.nan

    def better(self, step: int, row: dict[str, Any], done: dict[str, Any]) -> bool:
        """Enters a validation in ``done``; whether it is the best so far. Of equals the first stays."""
        by_loss = self.config.best_by == "loss"
        value = row["validation_loss"] if by_loss else row["eval"][self.config.best_by]
        value = math.nan if value is None else value
        best = done.get("best")
        if not math.isnan(value) and (best is None or (value < best if by_loss else value > best)):
            done |= {"best": value, "best_step": step, "without_better": 0}
            return True
        done["without_better"] = done.get("without_better", 0) + 1
        return False

    def exhausted(self, done: dict[str, Any]) -> bool:
        """Whether patience is at its end."""
        return 0 < self.config.patience <= done.get("without_better", 0)

    def keep(self) -> None:
        """The trained parameters, in memory, where the run writes no files."""
        self.kept = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def put_best_back(self, folder: Path | None) -> None:
        """The best adapter into the model: from ``folder``, or from memory. ValueError where the folder is gone."""
        if folder is not None:
            if not folder.is_dir():
                raise ValueError(f"{folder}, the best adapter so far, is gone: put it back, or start afresh in another --out")
            load_adapter(self.model, folder)
        elif self.kept is not None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in self.kept:
                        parameter.copy_(self.kept[name])

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        text = repr([(s.image_name, s.question, s.answer) for s in self.data.labelled.samples])
        samples = {"samples": len(self.data.labelled), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
        return samples | {name: getattr(self.config, name) for name in ("eval_every", "patience", "best_by")}
