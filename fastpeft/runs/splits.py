"""Splits of a run: the samples to train on, and those to score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from fastpeft.data import SampleList, hold_out, mix
from fastpeft.runs.options import DataOptions, TextOptions

OVERLAP = "no test split apart from the training samples"


def load_splits(
    data: DataOptions, evaluate: bool = True, *, read: Callable[..., SampleList], text: TextOptions | None = None
) -> tuple[SampleList, SampleList | None]:
    """(training samples, samples to score or None): a held-out part, else ``eval_split_file``, else a test split where the folder has one.

    read(data, text, split, split_file): of runs.vqa or runs.causal. What is held out is whole images where every sample has one."""
    if len(data.sources) > 1:
        return _mixed(data, evaluate, read, text)
    read = partial(read, data, text or TextOptions())
    samples = read("train", data.split_file)
    if data.hold_out:
        by_image = all(sample.image is not None for sample in samples)
        kept, held = hold_out(samples, data.hold_out, by="image" if by_image else "sample")
        kept.skipped, kept.filtered = samples.skipped, samples.filtered
        return kept, held
    if not evaluate:
        return samples, None
    if data.eval_split_file:
        return samples, read("test", data.eval_split_file)
    try:
        held = read("test")
    except ValueError as error:  # no such split, or nothing usable in it: training needs none
        return _unscored(samples, str(error)), None
    return (_unscored(samples, OVERLAP), None) if _overlap(samples, held) else (samples, held)


CHOSEN = "scored on the validation samples, which chose the best adapter: their scores are too good"


def load_validation(
    data: DataOptions, held: SampleList | None, *, read: Callable[..., SampleList], text: TextOptions | None = None
) -> tuple[SampleList, SampleList | None]:
    """(validation samples, samples to score at the end or None): the data's own validation split, else what ``hold_out`` holds out, and
    then the test split is scored, where there is one. ``held``: what :func:`load_splits` scores. ValueError where there are none."""
    found = {}
    for name, source in zip(source_names(data), data.sources):
        given = {key: value for key, value in asdict(source).items() if value is not None}
        try:
            found[name] = read(replace(data, data=given), text or TextOptions(), "val")
        except ValueError as error:
            missing = error
    if found:
        own = mix(found) if len(data.sources) > 1 else next(iter(found.values()))
        return own, _chosen_by(own, held)
    if not data.hold_out or held is None:
        raise ValueError(f"eval_every needs validation samples: the data have none ({missing}); give hold_out, such as 0.1")
    tested = load_splits(replace(data, hold_out=0.0), read=read, text=text)[1]
    return held, _chosen_by(held, held if tested is None else tested)


def _chosen_by(validation: SampleList, scored: SampleList | None) -> SampleList | None:
    """``scored``, with a note where it has samples that the run chose its adapter by."""
    if scored is not None and _overlap(validation, scored):
        scored.note = "; ".join(filter(None, (scored.note, CHOSEN)))
    return scored


def _mixed(data: DataOptions, evaluate: bool, read: Callable[..., SampleList], text: TextOptions | None):
    """The splits of each data set, joined; those to score, of the data sets that have some."""
    names, splits = source_names(data), []
    for source in data.sources:
        given = {name: value for name, value in asdict(source).items() if value is not None}
        splits.append(load_splits(replace(data, data=given), evaluate, read=read, text=text))
    weights = {name: source.weight for name, source in zip(names, data.sources) if source.weight is not None}
    samples = mix({name: kept for name, (kept, _) in zip(names, splits)}, weights)
    held = {name: held for name, (_, held) in zip(names, splits) if held is not None}
    return samples, mix(held) if held else None


def source_names(data: DataOptions) -> list[str]:
    """A name for each data set, different from the others': the end of its path, as much of it as that takes."""
    paths = [Path(source.path).absolute().parts for source in data.sources]
    names = []
    for i, parts in enumerate(paths):
        ends = (("/".join(parts[-n:])) for n in range(1, len(parts)))
        others = [other for j, other in enumerate(paths) if j != i]
        end = next((e for e in ends if not any(other[-len(e.split("/")) :] == tuple(e.split("/")) for other in others)), None)
        names.append(end or f"{parts[-1]} ({i + 1})")
    return names


def _overlap(samples: SampleList, held: SampleList) -> bool:
    """Whether some entry of a file is in both."""
    trained_on = {(sample.source, sample.entry) for sample in samples}
    return any((sample.source, sample.entry) in trained_on for sample in held)


def _unscored(samples: SampleList, reason: str) -> SampleList:
    """The training samples, with a note of why there is nothing to score."""
    samples.note = "; ".join(filter(None, (samples.note, f"no test questions were asked ({reason})")))
    return samples


def data_notes(samples: SampleList) -> list[str]:
    """What was left out of the data, in words."""
    notes = [f"{count} entries in language {language!r} left out" for language, count in samples.filtered.items()]
    notes += [f"{count} bad entries skipped: {reason}" for reason, count in samples.skipped.items()]
    return notes + ([samples.note] if samples.note else [])
