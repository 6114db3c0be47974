"""Splits of a run: the samples to train on, and those to score."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastpeft.data import SampleList, hold_out
from fastpeft.runs.options import DataOptions, TextOptions

OVERLAP = "no test split apart from the training samples"


def load_splits(
    data: DataOptions, evaluate: bool = True, *, read: Callable[..., SampleList], text: TextOptions | None = None
) -> tuple[SampleList, SampleList | None]:
    """(training samples, samples to score or None): a held-out part, else ``eval_split_file``, else a test split where the folder has one.

    read(data, text, split, split_file): of runs.vqa or runs.causal. What is held out is whole images where every sample has one."""
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
