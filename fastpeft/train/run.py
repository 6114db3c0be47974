"""From a model's name and a data folder to a run: what `fastpeft train` and `fastpeft eval` do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.checkpoints import atomic_folder, describe, load_adapter, merge
from fastpeft.data import (
    Preprocess,
    SampleList,
    VQADataset,
    hold_out,
    load_samples,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from fastpeft.models import NAMES, pretrained_folder
from fastpeft.plan import adapt, build
from fastpeft.train.config import TrainConfig
from fastpeft.train.trainer import Trainer, write_json

PREPROCESS = "fastpeft_preprocess.json"


@dataclass
class DataOptions:
    """Which samples: ``data`` folder, ``split_file`` for training, ``eval_split_file``, or ``hold_out`` a fraction of images to score."""

    data: str
    split_file: str | None = None
    eval_split_file: str | None = None
    hold_out: float = 0.0
    languages: tuple[str, ...] = ("en",)
    skip_bad: bool = False


def train_run(
    model: str,
    plan: str | dict,
    data: DataOptions,
    config: TrainConfig,
    *,
    vocab: str | None = None,
    pretrained: bool = True,
    evaluate: bool = True,
    **plan_options,
) -> dict[str, Any]:
    """Load, adapt, train, score; returns the summary."""
    samples, held = load_split(data, evaluate)
    network, tokenizer, preprocess = model_for(model, samples, vocab=vocab, pretrained=pretrained, seed=config.seed)
    adapt(network, plan, **plan_options)
    dataset = VQADataset(samples, preprocess, config.seed, tokenizer=tokenizer)
    eval_dataset = VQADataset(held, preprocess, tokenizer=tokenizer) if held is not None else None
    trainer = Trainer(network, dataset, config, eval_dataset=eval_dataset)
    trainer.notes += data_notes(samples)
    summary = trainer.fit()
    if held is not None and data.hold_out and config.out:
        write_json(Path(config.out) / "held_out.json", [sample.qid for sample in held])
    return summary


def load_split(data: DataOptions, evaluate: bool = True) -> tuple[SampleList, SampleList | None]:
    """(training samples, samples to score or None): a held-out part, else a test split where the folder has one."""
    options = {"languages": data.languages, "skip_bad": data.skip_bad}
    samples = load_samples(data.data, data.split_file, split="train", **options)
    if data.hold_out:
        return hold_out(samples, data.hold_out)
    if not evaluate:
        return samples, None
    if data.eval_split_file:
        return samples, load_samples(data.data, data.eval_split_file, split="test", **options)
    try:
        held = load_samples(data.data, split="test", **options)
    except ValueError:  # no such split, or nothing usable in it: training needs none
        return samples, None
    trained_on = {(sample.source, sample.entry) for sample in samples}
    return samples, None if any((sample.source, sample.entry) in trained_on for sample in held) else held


def data_notes(samples: SampleList) -> list[str]:
    """What was left out of the data, in words."""
    notes = [f"{count} entries in language {language!r} left out" for language, count in samples.filtered.items()]
    notes += [f"{count} bad entries skipped: {reason}" for reason, count in samples.skipped.items()]
    return notes + ([samples.note] if samples.note else [])


def model_for(model: str, samples: SampleList, *, vocab: str | None, pretrained: bool, seed: int) -> tuple[nn.Module, Any, Preprocess]:
    """A backbone, its tokenizer and its preprocessing. The vocabulary is ``vocab``, else the model folder's, else learnt from the data."""
    folder = pretrained_folder(model) if pretrained or model not in NAMES else None
    if vocab is not None:
        tokenizer = load_tokenizer(vocab)
    elif folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        tokenizer = load_tokenizer(folder)
    else:
        texts = [text for s in samples for text in (s.question, *s.question_pool, s.answer)]
        tokenizer = train_tokenizer(texts, vocab_size=4096)
    if folder is None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}
        network = build(model, pretrained=False, seed=seed, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids)
    else:
        network = build(model)
        check_vocabulary(network, tokenizer, model)
    return network, tokenizer, preprocess_for(folder, network)


def check_vocabulary(network: nn.Module, tokenizer, model: str) -> None:
    """ValueError where the model's embeddings cannot be this vocabulary's."""
    text = network.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(tokenizer)} tokens, {model} embeds {text.vocab_size}: use the vocabulary it was trained with"
        )
    for name, mine, theirs in (("[DEC]", text.bos_token_id, tokenizer.bos_token_id), ("[SEP]", text.sep_token_id, tokenizer.sep_token_id)):
        if mine != theirs:
            raise ValueError(f"{name} is token {theirs} in the vocabulary and {mine} in {model}: use the vocabulary it was trained with")


def preprocess_for(folder: Path | None, network: nn.Module) -> Preprocess:
    """From the model's folder: ours, or transformers' preprocessor_config.json; else [-1, 1] at the model's image size."""
    size = network.config.vision_config.image_size
    if folder is not None:
        for name in (PREPROCESS, "preprocessor_config.json"):
            path = folder / name
            if path.is_file():
                try:
                    content = json.loads(path.read_text(encoding="utf-8"))
                    if name == PREPROCESS:
                        return Preprocess.from_dict(content)
                    return Preprocess(size, mean=content.get("image_mean"), std=content.get("image_std"))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}: {error}") from None
    return Preprocess(size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def load_run(adapter: str | Path, device: str | None = None, model: str | None = None) -> tuple[nn.Module, Any, Preprocess]:
    """The model, tokenizer and preprocessing that an adapter folder describes, ready to answer. ``model`` replaces a moved base."""
    adapter = Path(adapter)
    about = describe(adapter)
    if not about:
        raise ValueError(f"{adapter} has no fastpeft.json: it is not an adapter folder that fastpeft wrote")
    base = dict(about["base"])
    dtype = getattr(torch, base.pop("dtype", "float32"))
    name = model or base.pop("model", None)
    if name is None:
        raise ValueError(f"{adapter} does not say its base model; give --model")
    base.pop("model", None)
    network = build(name, dtype=dtype, **base.pop("overrides", {}), **base) if model is None else build(name, dtype=dtype)
    load_adapter(network, adapter)
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return network, load_tokenizer(adapter / about.get("tokenizer", "tokenizer")), Preprocess.from_dict(about["preprocess"])


def merge_run(adapter: str | Path, out: str | Path, model: str | None = None) -> Path:
    """Fold an adapter into its base and write a plain transformers folder with tokenizer and preprocessing; ValueError if out exists."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another --out")
    network, tokenizer, preprocess = load_run(adapter, "cpu", model)
    merge(network)
    with atomic_folder(out) as draft:
        network.config.architectures = ["BlipForQuestionAnswering"]
        network.save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        write_json(draft / PREPROCESS, preprocess.to_dict())
    return out
