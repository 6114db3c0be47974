"""Batched generation and scoring of the responses of causal language models."""

from __future__ import annotations

import inspect
from collections import defaultdict

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastpeft.data import CausalDataset
from fastpeft.data.causal_batches import common_prefix
from fastpeft.device import to_device
from fastpeft.evaluate.answers import images_left_alone
from fastpeft.evaluate.captions import references_of, score_captions
from fastpeft.evaluate.decoding import callers_settings_only, response_settings
from fastpeft.evaluate.metrics import score_responses
from fastpeft.evaluate.scienceqa import score_scienceqa
from fastpeft.evaluate.scoring import Scoring
from fastpeft.files import write_json
from fastpeft.progress import progress_bar
from fastpeft.ranks import ALONE, Ranks

WORTH_A_BATCH = 256  # tokens that a batch of one image's prompts must save: with fewer, full batches of any prompts cost less


def model_inputs(model: nn.Module, dataset) -> tuple[str, ...]:
    """Names of the batch entries that ``model`` takes. ValueError where the data have images and the model takes none."""
    taken = inspect.signature(model.forward).parameters
    if "pixel_values" not in taken and any(sample.image is not None for sample in dataset.samples):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        captioned = getattr(dataset.samples[0], "kind", None) == "scienceqa"
        instead = "; ScienceQA's captions can stand in for them (use_caption)" if captioned else ""
        raise ValueError(f"the data have images, and a {kind} sees none: choose a model that does, or data without{instead}")
    return tuple(name for name in dataset.inputs if name in taken)


def takes_shared_prefixes(model: nn.Module, inputs: tuple[str, ...]) -> bool:
    """Whether ``model``, which takes these ``inputs`` of a batch, computes what samples of a batch begin with once: where its language
    model is a fused one."""
    return all("prefix_lengths" in names for names in (inputs, getattr(model, "host_inputs", ())))


@torch.no_grad()
def respond(
    model: nn.Module,
    dataset: CausalDataset,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: bool = True,
    ranks: Ranks = ALONE,
    features=None,
    **generation,
) -> list[str]:
    """One response per sample, in the data set's order; ``generation`` goes to transformers' ``generate`` (greedy by default). What the
    model's ``generation_config`` says beside token ids does not count.

    dataset: with ``prompts_only``. A response ends before the template's stop string, where it has one. Prompts of similar length are
    batched, padded on the left and masked, so that a response does not depend on the other samples of its batch. Prompts about one image go
    together where the model can compute what they begin with once (its ``generate`` takes ``prefix_length``) and that saves enough.
    ``features``: a FeatureCache of this model, whose images are then not encoded again. ``ranks`` share the
    batches, and each has all responses.
    """
    if not dataset.prompts_only:
        raise ValueError("to generate, give a data set of prompts: CausalDataset(..., prompts_only=True)")
    tokenizer, was_training, first = dataset.tokenizer, model.training, next(model.parameters())
    names = model_inputs(model, dataset)
    whole = _batches(dataset, batch_size, share="prefix_lengths" in getattr(model, "host_inputs", ()))
    batches, prefixes = (of[ranks.rank :: ranks.world] for of in whole)
    stop = dataset.ending.stop
    settings = response_settings(tokenizer, max_new_tokens, stop, **generation)
    if stop:
        settings["tokenizer"] = tokenizer
    responses: dict[int, str] = {}
    model.eval()
    try:
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collator())
        bar = progress_bar(loader, desc="responding", unit="batch", disable=not progress, leave=False)
        with callers_settings_only(model), images_left_alone(dataset, features is not None):
            for batch, indices, prefix in zip(bar, batches, prefixes):
                inputs = to_device(batch, names, first.device, first.dtype) | ({"prefix_length": prefix} if prefix else {})
                inputs = inputs if features is None else features.put_in(inputs, batch)
                ids = model.generate(**inputs, **settings)[:, batch["input_ids"].shape[1] :]
                responses |= dict(zip(indices, tokenizer.batch_decode(ids, skip_special_tokens=True)))
    finally:
        model.train(was_training)
    responses = {i: response for part in ranks.gather(responses) for i, response in part.items()}
    return [(responses[i].partition(stop)[0] if stop else responses[i]).strip() for i in range(len(dataset))]


def _batches(dataset: CausalDataset, batch_size: int, share: bool) -> tuple[list[list[int]], list[int]]:
    """Batches of samples, and of each how many first tokens its prompts share, 0 where that is not worth a batch of one image's alone."""
    lengths, about = dataset.lengths, defaultdict(list)
    if share:
        for i, sample in enumerate(dataset.samples):
            if sample.image is not None:
                about[sample.image].append(i)
    batches, prefixes, alone = [], [], set(range(len(dataset)))
    for indices in about.values():
        for at in range(0, len(indices), batch_size):
            batch = indices[at : at + batch_size]
            prefix = common_prefix([dataset.text_item(i) for i in batch]) if len(batch) > 1 else 0
            if prefix * (len(batch) - 1) >= WORTH_A_BATCH:
                batches.append(batch)
                prefixes.append(prefix)
                alone -= set(batch)
    order = sorted(alone, key=lambda i: -lengths[i])
    rest = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches + rest, prefixes + [0] * len(rest)


def respond_and_score(
    model: nn.Module, dataset: CausalDataset, *, progress: bool = True, scoring: Scoring | None = None, **generation
) -> tuple[list[str], dict]:
    """(responses, scores). Scores are accuracies of free text (:func:`score_free_text`) and text metrics, with ``scoring``; for ScienceQA
    also the columns of its table, with their average as "global"; for captions and reports also caption metrics against all references of
    an image."""
    responses, samples = respond(model, dataset, progress=progress, **generation), dataset.samples
    scores, kinds = score_responses(responses, samples), {sample.kind for sample in samples}
    device = next(model.parameters()).device
    scoring = scoring or Scoring()
    scores |= scoring.score(responses, samples, dataset.tokenizer, sentences=True, device=device)
    if kinds == {"scienceqa"}:
        columns = score_scienceqa(responses, samples, scoring.draw_unparsed)
        scores |= {"global": columns["Avg"], "filled_by": {"global": "scienceqa"}, "scienceqa": columns}
    elif kinds <= {"coco", "reports"}:
        first, references = references_of(samples)
        scores["captions"] = score_captions([responses[i] for i in first], references)
    return responses, scores


def write_responses(path, samples, responses: list[str]) -> None:
    """A JSON list of qid, image, question, answer and prediction of each sample; the file appears whole or not at all."""
    rows = [
        {
            "qid": sample.qid,
            "image": None if sample.image is None else str(sample.image),
            "question": sample.question,
            "answer": sample.answer,
            "prediction": response,
        }
        for sample, response in zip(samples, responses, strict=True)
    ]
    write_json(path, rows)
