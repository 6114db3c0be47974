"""Several adapters of one base, trained in one run (`fastpeft train --adapters`): base and data are loaded once, what is constant is
computed once, and each adapter's folder is what a run of its own would have left."""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpeft.adapters import adapter_in
from fastpeft.cost.estimate import Estimate
from fastpeft.cost.several_adapters import SeveralAdapters, frozen_bytes, together
from fastpeft.device import choose_device
from fastpeft.features.frozen_stages import ImageFeatures
from fastpeft.models import resolve
from fastpeft.models.shared_base import on_base_of, share_memory
from fastpeft.options import as_command, split
from fastpeft.plan import Plan, plan_for
from fastpeft.ranks import ranks_here
from fastpeft.runs.estimate import estimate_command
from fastpeft.runs.options import RECIPE, DataOptions, TextOptions
from fastpeft.runs.train import DTYPES, Loaded, described
from fastpeft.train.caches import Caches
from fastpeft.train.optimizer import base_in
from fastpeft.train.together import Together
from fastpeft.train.trainer import Trainer

OF_THE_BASE = ("model", "image_encoder", "from_scratch", "quantize", "dtype", "device")
OF_THE_DATA = ("no_eval", *(f.name for cls in (DataOptions, TextOptions) for f in dataclasses.fields(cls)))


def common(given: Mapping[str, Any]) -> dict[str, Any]:
    """What adapters of one run have in common: options of the base and of the data, by name, and what of others bears on the base."""
    run, data, text, _, config = split(given, *RECIPE)
    found = {name: getattr(of, name) for of in (run, config, data, text) for name in (*OF_THE_BASE, *OF_THE_DATA) if hasattr(of, name)}
    before = None if run.init_adapter is None else described(run.init_adapter)
    vocab = run.vocab or (None if before is None else str(adapter_in(run.init_adapter) / before["tokenizer"]))
    found["vocab"] = None if vocab is None else _content(Path(vocab))
    source = resolve(run.model, run.image_encoder)
    if (source.without_weights() if run.from_scratch else source).folder is None:  # its weights are drawn
        found["seed"] = config.seed if before is None else before["base"].get("seed", config.seed)
    return found


def _content(path: Path) -> str:
    """Digest of a tokenizer's files, wherever they lie."""
    crc, files = 0, sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        crc = zlib.crc32(file.read_bytes(), zlib.crc32(file.name.encode(), crc)) if file.is_file() else crc
    return f"{crc:08x}"


def check(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError where the runs are not of one base and the same data, or say what only a run by itself can do."""
    if not runs:
        raise ValueError("there are no adapters to train")
    if not ranks_here().alone:
        raise ValueError("several adapters in one run are for one process: start it without torchrun")
    every = {name: common(given) for name, given in runs.items()}
    first, *others = every
    for name, given in runs.items():
        if given.get("stages"):
            raise ValueError(f"{name}: stages go on from each other: train it by itself, or in a study")
    for name in others:
        for option in every[first] | every[name]:
            a, b = every[first].get(option), every[name].get(option)
            if a != b:
                why = "the base's weights are drawn by the seed here: give a model with weights" if option == "seed" else "train them apart"
                raise ValueError(f"{first} and {name} are not of one base and the same data: {option} is {a!r} and {b!r}; {why}")


def train_adapters(runs: Mapping[str, Mapping[str, Any]], *, progress: bool = True) -> Together:
    """Train several adapters of one base on the same data, a step of each in turn; ``runs``: options of `fastpeft train` by name, each with
    an ``out`` of its own. Returns their summaries, and the error of each that failed while the others went on.

    Each ends with the numbers of its own run alone, to the bit on one device, and with its files. ValueError where they are not of one base
    and the same data; Interrupted as by a run."""
    check(runs)
    options = {name: split(given, *RECIPE) for name, given in runs.items()}
    run, data, text, _, config = next(iter(options.values()))
    base = {name: value for name, value in run.arguments().items() if name in BASE}
    loaded = Loaded(run.model, data, config, text=text, **base)
    caches, trainers, networks = Caches(), {}, {}
    for name, (run, *_, config) in options.items():
        network = on_base_of(loaded.network)
        networks[name] = network, loaded.adapted(network, run.plan, config, run.init_adapter, **run.lora)
    loaded.network.to(choose_device(config.device))
    base_in(loaded.network, DTYPES[config.dtype])
    for name, (network, started_from) in networks.items():
        share_memory(network, loaded.network)
        _, _, _, metrics, config = options[name]
        how = {"metrics": metrics, "started_from": started_from, "command": as_command("train", runs[name], *RECIPE), "caches": caches}
        trainers[name] = loaded.trainer(network, dataclasses.replace(config, progress=False), **how)
        trainers[name].notes += _notes(name, trainers[name], list(runs))
    together = Together(trainers)
    del trainers, networks, network, loaded.network  # who ends gives its memory back
    together.fit(progress)
    for name in together.summaries:
        loaded.write_held_out(options[name][-1])
    return together


BASE = ("vocab", "pretrained", "evaluate", "quantize", "init_adapter", "image_encoder")


def _notes(name: str, trainer: Trainer, names: list[str]) -> list[str]:
    """What is to be said of an adapter that was trained beside others."""
    others, notes = ", ".join(other for other in names if other != name), []
    if others:
        notes.append(f"trained on one base with {others}: the seconds are of its own steps, the peak of memory is of all")
    sees = trainer.config.feature_cache and any(sample.image is not None for sample in trainer.dataset.samples)
    if sees and trainer.features is None and None not in ImageFeatures.parts(trainer.model):
        notes.append(f"its image encoder runs at every visit, for it alone: {ImageFeatures.why_not(trainer.model, trainer.dataset)}")
        warnings.warn(f"{name}: {notes[-1]}", stacklevel=3)
    return notes


def estimate_adapters(shapes: Mapping[str, Mapping[str, Any]], **reading: Any) -> SeveralAdapters:
    """What a run of several adapters computes and holds, without running it. ``shapes``: of each adapter by its name, model, image_encoder,
    plan, rank, lora_alpha, lora_dropout, and arguments of :func:`fastpeft.estimate`; ``reading``: arguments of
    :func:`fastpeft.runs.estimate.estimate_command` about data. ValueError where they are not of one base."""
    found: dict[str, Estimate] = {}
    plans: list[Plan] = []
    bases = {tuple(shape[name] for name in ("model", "image_encoder", "dtype", "quantize")) for shape in shapes.values()}
    if len(bases) > 1:
        told = "; ".join(" ".join(filter(None, base)) for base in sorted(bases, key=str))
        raise ValueError(f"the adapters are not of one base: {told}")
    for name, shape in shapes.items():
        step = dict(shape)
        source, plan = resolve(step.pop("model"), step.pop("image_encoder")), step.pop("plan")
        lora = {"r": step.pop("rank"), "lora_alpha": step.pop("lora_alpha"), "lora_dropout": step.pop("lora_dropout")}
        gpu_memory, step["cache_layers"] = step.pop("gpu_memory"), bool(step["cache_layers"])
        if step["world"] != 1 or step["nodes"] != 1 or step["shard"] is not None:
            raise ValueError("several adapters in one run are for one process: leave world, nodes and shard out")
        plans.append(plan_for(source.family.parts, plan or source.family.plan, **lora))
        alike = next((other for other in found if dict(shapes[other]) == dict(shape)), None)  # of another seed
        found[name] = found[alike] if alike else estimate_command(source, plans[-1], step, **reading)[0]
    return together(found, frozen_bytes(source, plans, step["dtype"], next(iter(found.values()))), gpu_memory)
