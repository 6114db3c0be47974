"""Evaluation of a run's adapter: loads it, answers a data set, scores the answers (`fastpeft eval`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.adapters import adapter_in, describe, load_adapter
from fastpeft.data import Preprocess, load_causal_tokenizer, load_tokenizer
from fastpeft.data.images import allow_pixels
from fastpeft.device import choose_device
from fastpeft.evaluate import Scoring, generation_settings, write_answers
from fastpeft.evaluate.judge import write_outputs
from fastpeft.files import is_folder
from fastpeft.models import ModelSource, family_of, resolve
from fastpeft.plan import build
from fastpeft.runs import causal, vqa
from fastpeft.runs.mmlu import asks_mmlu, mmlu_run
from fastpeft.runs.options import DataOptions, MetricOptions, MMLUOptions, TextOptions
from fastpeft.runs.splits import data_notes
from fastpeft.runs.train import RUNS


def load_run(
    adapter: str | Path, device: str | None = None, model: str | None = None, adapted: bool = True
) -> tuple[nn.Module, Any, Preprocess]:
    """The model, tokenizer and preprocessing that an adapter's folder, or a run's, describes, ready to answer; or those of a model's own
    folder. ``model`` replaces a moved base. ``adapted`` False: the base alone."""
    adapter = adapter_in(adapter)
    if not is_folder(adapter):
        raise ValueError(f"no adapter folder at {adapter}")
    about = describe(adapter)
    if not about and (adapter / "config.json").is_file() and model is None:
        return load_folder(resolve(adapter), device)
    if not about:
        raise ValueError(f"{adapter} has neither fastpeft.json nor config.json: it is no adapter that fastpeft wrote, and no model")
    prompted = "prompt" in about
    if not about.get("tokenizer") or not (prompted or about.get("preprocess")):
        raise ValueError(f"{adapter} holds an adapter alone: its tokenizer and preprocessing, which a training run writes, are missing")
    if "base" not in about or not about["base"].get("model"):
        raise ValueError(f"{adapter / 'fastpeft.json'} is damaged: it does not say the base's model")
    base = dict(about["base"])
    name, dtype, overrides = base.pop("model"), getattr(torch, base.pop("dtype", "float32")), base.pop("overrides", {})
    kept = {"dtype": dtype, "quantize": base.pop("quantize", None)}
    try:
        preprocess = Preprocess.from_dict(about["preprocess"]) if about.get("preprocess") else None
    except ValueError as error:
        raise ValueError(f"{adapter / 'fastpeft.json'} is damaged: preprocess: {error}") from None
    device = choose_device(device)
    tokenizer = (load_causal_tokenizer if prompted else load_tokenizer)(adapter / about["tokenizer"])
    network = build(model, **kept) if model else build(name, **kept, **overrides, **base)
    if adapted:
        load_adapter(network, adapter)
    return network.to(device), tokenizer, preprocess


def load_folder(source: ModelSource, device: str | None = None) -> tuple[nn.Module, Any, Preprocess | None]:
    """A model's folder with its tokenizer and its images' preprocessing, without an adapter."""
    network = build(source)
    if source.kind == "vqa":
        tokenizer, preprocess = load_tokenizer(source.folder), vqa.preprocess_for(source.folder, network)
        vqa.check_vocabulary(network, tokenizer, source.name)
    else:
        tokenizer, preprocess = load_causal_tokenizer(source.folder), causal.clip_preprocess(source.folder, network)
    return network.to(choose_device(device)).eval(), tokenizer, preprocess


def text_options(folder: str | Path, network: nn.Module) -> TextOptions:
    """How an adapter's model reads text, as it was trained; a model's own folder as its configuration and template say."""
    about = describe(adapter_in(folder))
    return causal.options_of(about) if about or family_of(network).kind == "vqa" else causal.asking_options(network)


def eval_run(
    adapter: str | Path,
    data: DataOptions,
    *,
    device: str | None = None,
    model: str | None = None,
    out: str | None = None,
    progress: bool = True,
    batch_size: int = 32,
    num_beams: int | None = None,
    metrics: MetricOptions | None = None,
    prompt_format: str | None = None,
    template: str | None = None,
    draw_unparsed: int | None = None,
    outputs: str | None = None,
    generator: str = "fastpeft",
    mmlu: MMLUOptions | None = None,
    kept: Path | None = None,
    **generation,
) -> dict[str, Any]:
    """Answer a data set's test split with an adapter, or with a model's folder alone, and score the answers; the scores, with
    ``generation`` (the decoding settings) and ``notes``. The base folder's generation_config.json does not count. ``out``: a file for the
    predictions. num_beams: the papers' by default (3 for visual question answering, 1 for responses). ``generation``: further options of
    transformers' ``generate``, for responses (top_p=0.75, temperature=0.1, do_sample=True). ``metrics``: of generated text. prompt_format:
    of ScienceQA, instead of the one trained with. template: of prompts, instead of the one trained with. draw_unparsed: a seed, to draw a
    choice where a response names none. The candidates of free-text answers are those of the data's training split, the questions that are
    asked apart. outputs: a file for the responses in AlpacaEval's form, under the name ``generator``. mmlu, kept: of a folder of MMLU, see
    :func:`fastpeft.runs.mmlu.mmlu_run`: nothing is generated there."""
    adapter = adapter_in(adapter)
    _refuse_folders(out, outputs)
    allow_pixels(data.max_pixels)
    if asks_mmlu(data):
        if any((generation, num_beams, prompt_format, template, outputs, draw_unparsed is not None)):
            raise ValueError("MMLU is scored by likelihood: leave out the options of generation, of its outputs and of ScienceQA")
        base, tokenizer, _ = load_run(adapter, device, model, adapted=False)
        more = {"out": out, "progress": progress, "batch_size": batch_size, "kept": kept}
        return mmlu_run(adapter, base, tokenizer, data, mmlu or MMLUOptions(), **more)
    network, tokenizer, preprocess = load_run(adapter, device, model)
    kind = family_of(network).kind
    if generation and kind != "causal":
        raise ValueError(f"{', '.join(generation)} are options of causal language models, and this adapter's base is none")
    run, text = RUNS[kind], text_options(adapter, network)
    chosen = {name: value for name, value in (("prompt_format", prompt_format), ("template", template)) if value is not None}
    if (chosen or draw_unparsed is not None) and kind != "causal":
        raise ValueError(
            "prompt_format, template and draw_unparsed are of causal language models, which answer in sentences, and this adapter's base "
            "is none"
        )
    text = dataclasses.replace(text, **chosen)
    samples = run.read(data, text, "test", data.split_file)
    dataset = run.dataset(network, samples, tokenizer, preprocess, text, prompts_only=True, skip_bad=data.skip_bad)
    generation["num_beams"] = num_beams or run.BEAMS
    training, notes = training_split(run, data, text)
    scoring = Scoring(training, (metrics or MetricOptions()).chosen(), draw_unparsed).apart_from(dataset.samples)
    how = {"batch_size": batch_size, "progress": progress, "scoring": scoring}
    answers, scored = run.answer(network, dataset, tokenizer, **how, **generation)
    if out:
        write_answers(out, dataset, answers)
    if outputs:
        write_outputs(outputs, dataset.samples, answers, generator)
    settings = generation_settings(dataset, tokenizer, **generation)
    return scored | {"generation": settings, "notes": data_notes(samples) + dataset.notes + notes}


def _refuse_folders(*files: str | None) -> None:
    if folder := next((path for path in files if path and Path(path).is_dir()), None):
        raise ValueError(f"{folder} is a folder: give a file for the predictions")


def training_split(run, data: DataOptions, text) -> tuple[Sequence, list[str]]:
    """(training samples, whose answers are candidates; notes): none where the data have no training split."""
    try:
        return run.read(dataclasses.replace(data, skip_bad=True), text, "train", check_images=False), []  # their images are not looked at
    except ValueError as error:
        return (), [f"no candidate accuracy: the data have no training split ({error})"]
