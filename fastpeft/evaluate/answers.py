"""Generation of answers to questions about images: batched beam search, each image encoded once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastpeft.data import EpochSampler, VQACollator, VQADataset, decode
from fastpeft.device import to_device
from fastpeft.evaluate.decoding import answer_settings, callers_settings_only
from fastpeft.progress import progress_bar
from fastpeft.ranks import ALONE, Ranks


@contextlib.contextmanager
def images_left_alone(dataset, left: bool) -> Iterator[None]:
    """Inside, no image of the data set is decoded where they are ``left``."""
    before = dataset.load_images
    dataset.load_images = before and not left
    try:
        yield
    finally:
        dataset.load_images = before


MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_index")


@torch.no_grad()
def answer_questions(
    model: nn.Module,
    dataset: VQADataset,
    tokenizer,
    *,
    batch_size: int = 32,
    num_beams: int = 3,
    max_length: int = 10,
    progress: bool = True,
    ranks: Ranks = ALONE,
    features=None,
) -> list[str]:
    """One answer per sample, in the data set's order. Defaults are the papers': beams of 3, at most 10 tokens. What the model's
    ``generation_config`` says beside token ids does not count.

    A batch gathers questions on the same images; padding is masked, so an answer does not depend on the other samples of its batch.
    ``ranks`` share the batches, and each has all answers. ``features``: a FeatureCache of this model, whose images are then not encoded
    again.
    """
    was_training, first = model.training, next(model.parameters())
    images = len({sample.image for sample in dataset.samples})
    sampler = EpochSampler(dataset, batch_size, questions_per_image=max(1, len(dataset) // images))
    batches = ranks.share(list(sampler))
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=VQACollator(tokenizer, dataset.max_question))
    answers: list[str] = []
    settings = answer_settings(num_beams, max_length)
    model.eval()
    try:
        with callers_settings_only(model), images_left_alone(dataset, features is not None):
            for batch in progress_bar(loader, desc="answering", unit="batch", disable=not progress, leave=False):
                inputs = to_device(batch, MODEL_INPUTS, first.device, first.dtype)
                ids = model.generate(**(inputs if features is None else features.put_in(inputs, batch)), **settings)
                answers += decode(tokenizer, ids)
    finally:
        model.train(was_training)
    found = dict(zip((i for batch in batches for i in batch), answers))
    whole = {i: answer for part in ranks.gather(found) for i, answer in part.items()}
    return [whole[i] for i in range(len(dataset))]
