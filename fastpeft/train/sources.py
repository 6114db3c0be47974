"""Losses by data set, of runs that mix several."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from fastpeft.ranks import Ranks

WINDOW = 20  # steps, as of the summary's other losses


class SourceLosses:
    """Adds up a step's losses by data set: each as the model's own loss counts, by labelled tokens or by samples."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.terms: dict[str, int] = defaultdict(int)
        self.samples: dict[str, int] = defaultdict(int)

    def add(self, batch: dict, dataset, recorded: list[Tensor]) -> None:
        """recorded: of `fused.head.loss.token_losses`; a loss of the model's own leaves none, and then no loss is known."""
        counts = dataset.labelled(batch)
        known = len(recorded) == 1 and len(recorded[0]) == sum(counts)
        values = recorded[0].split(counts) if known else ()
        sums = [float(value.sum()) for value in values]
        for i, (sample, count) in enumerate(zip(batch["samples"], counts)):
            self.samples[sample.data] += 1
            if known:
                self.sums[sample.data] += sums[i]
                self.terms[sample.data] += dataset.terms(count)

    def over(self, ranks: Ranks) -> SourceLosses:
        """Of all ranks together."""
        if ranks.alone:
            return self
        whole = SourceLosses()
        for sums, terms, samples in ranks.gather((dict(self.sums), dict(self.terms), dict(self.samples))):
            for mine, theirs in ((whole.sums, sums), (whole.terms, terms), (whole.samples, samples)):
                for name, value in theirs.items():
                    mine[name] += value
        return whole

    def log(self, done: dict[str, Any]) -> dict[str, float]:
        """The step's mean loss of each data set in it; ``done`` keeps the run's samples and last losses of each."""
        means = {name: self.sums[name] / terms for name, terms in self.terms.items() if terms}
        for name, count in self.samples.items():
            entry = done.setdefault(name, {"samples": 0, "losses": []})
            entry["samples"] += count
            entry["losses"] = (entry["losses"] + ([means[name]] if name in means else []))[-WINDOW:]
        return means
