"""Caches of runs: what is constant is computed once, for one run or for several on one base that take their steps in turn."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

from fastpeft.caching.attach import forget_layers, keep_layers, place_of
from fastpeft.caching.layers import layer_caches
from fastpeft.features.cache import FeatureCache, cache_of


class Caches:
    """Outputs of frozen stages and of constant lower layers.

    Runs have one cache together where each of them would have kept the same numbers alone, to the bit. How an output is rounded may depend
    on the batch in which it was computed: where a run visits every sample, all are computed before the first step, whatever the order of
    its batches; a shorter run computes them as they come, and has them in common with runs of the same batches alone."""

    def __init__(self):
        self.features: dict[Hashable, FeatureCache] = {}
        self.shelves: dict[Hashable, dict[str, Any]] = {}
        self.progress = False  # whether what is computed before the first step shows how far it is

    def features_of(self, trainer) -> FeatureCache | None:
        """The cache that a run's options ask for, where there is something to keep."""
        config, found = trainer.config, cache_of(trainer.model, trainer.dataset, trainer.config, trainer.ranks)
        if found is None:
            return None
        asked = (type(found.stages), found.dtype, config.feature_cache_dir, config.feature_cache_memory)
        whole = trainer.total_batches >= len(trainer.sampler)
        key = (*asked, None if whole else _batches_of(trainer), config.batch_size if config.eval_every else None)
        if key in self.features:
            self.features[key].readers += 1
        return self.features.setdefault(key, found)

    def keep_layers_of(self, trainer) -> list[str]:
        """Put the caches of lower layers that a run's options ask for on its model; returns notes."""
        config = trainer.config
        if config.cache_layers is None:
            return []
        shelf = self.shelves.setdefault((config.cache_layers, _batches_of(trainer)), {})
        return keep_layers(trainer.model, *place_of(config.cache_layers, "cache_layers"), shelf)

    def prepare(self, trainer) -> None:
        """Before a run's first step: where it visits every sample, all outputs at once, in full batches."""
        config, left = trainer.config, trainer.total_batches - trainer.done["batches"]
        if trainer.features is not None and (config.shard or left >= len(trainer.sampler)):
            trainer.features.prepare(config.progress or self.progress)

    def divide_memory(self) -> None:
        """Let caches of features share a third of the free memory, where each would have taken it."""
        default = [cache for (_, _, _, memory, *_), cache in self.features.items() if memory is None]
        for cache in default:
            cache.limit_bytes //= len(default)

    @staticmethod
    def leave(trainer) -> list[str]:
        """Write what is still to be written, and take a run's caches of layers away; returns notes."""
        if trainer.features is not None:
            trainer.features.flush()
        notes = [cache.note() for cache in layer_caches(trainer.model)]
        forget_layers(trainer.model)
        return notes


def _batches_of(trainer) -> str:
    """The same of runs whose steps have the same batches."""
    return json.dumps([trainer.sampler.identity(), trainer.dataset.seed], sort_keys=True)
