"""From a model's name and a data folder to a run: what `fastpeft train` and `fastpeft eval` do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.checkpoints import describe, load_adapter, merge, save_adapter
from fastpeft.data import (
    Preprocess,
    SampleList,
    VQADataset,
    hold_out,
    load_causal_tokenizer,
    load_instructions,
    load_samples,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from fastpeft.evaluate import answer_questions, generation_settings, respond_and_score, score, write_answers
from fastpeft.evaluate.answers import choose_device
from fastpeft.files import atomic_folder, write_json
from fastpeft.methods import LoRA
from fastpeft.models import NAMES, family_named, family_of, parts_of, pretrained_folder
from fastpeft.plan import Plan, adapt, build, detach, parse
from fastpeft.train.causal_run import (
    OVERLAP,
    TextOptions,
    causal_dataset,
    causal_model_for,
    load_instruction_split,
    options_of,
    overlap,
    unscored,
)
from fastpeft.train.config import TrainConfig
from fastpeft.train.trainer import Trainer

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

    def __post_init__(self):
        for name in ("data", "split_file", "eval_split_file"):
            value = getattr(self, name)
            if isinstance(value, Path):
                setattr(self, name, str(value))
            elif not isinstance(value, str) and not (value is None and name != "data"):
                raise ValueError(f"{name} must be a path, not {value!r}")
        if isinstance(self.hold_out, bool) or not isinstance(self.hold_out, int | float) or not 0 <= self.hold_out < 1:
            raise ValueError(f"hold_out={self.hold_out!r}: use a number between 0 and 1, such as 0.1")
        if self.hold_out and self.eval_split_file:
            raise ValueError("hold_out and eval_split_file both say what to score: give one of them")
        if isinstance(self.languages, str):
            self.languages = tuple(self.languages.split(","))
        if not isinstance(self.languages, list | tuple | None) or not all(isinstance(name, str) for name in self.languages or ()):
            raise ValueError(f"languages must be a list of q_lang values, not {self.languages!r}")
        if not isinstance(self.skip_bad, bool):
            raise ValueError(f"skip_bad must be true or false, not {self.skip_bad!r}")


def train_run(
    model: str,
    plan: str | dict,
    data: DataOptions,
    config: TrainConfig,
    *,
    text: TextOptions | None = None,
    vocab: str | None = None,
    pretrained: bool = True,
    evaluate: bool = True,
    quantize: str | None = None,
    **lora,
) -> dict[str, Any]:
    """Load, adapt, train, score; returns the summary. ``text``: how a causal language model reads its data. ``quantize``: as
    :func:`fastpeft.build` takes it, from weights in the run's dtype. ``lora``: as :func:`plan_for`."""
    how = {"vocab": vocab, "pretrained": pretrained, "seed": config.seed}
    causal = bool(family_named(model).template)
    if quantize is not None:
        how["base"] = {"quantize": quantize, "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]}
        if not causal:
            build(model, device="meta", quantize=quantize)  # says why not
    open_data = _open_causal if causal else _open_vqa
    network, samples, held, dataset_of = open_data(model, data, text or TextOptions(), evaluate, how)
    torch.manual_seed(config.seed)  # new adapters are drawn at random
    adapt(network, plan_for(network, plan, **lora))
    dataset = dataset_of(samples, seed=config.seed)
    eval_dataset = dataset_of(held, prompts_only=True) if evaluate and held is not None else None
    trainer = Trainer(network, dataset, config, eval_dataset=eval_dataset)
    trainer.notes += data_notes(samples) + [f"{n} samples left out: {reason}" for reason, n in dataset.skipped.items()]
    summary = trainer.fit()
    if data.hold_out and config.out:
        write_json(Path(config.out) / "held_out.json", [sample.qid for sample in held])  # a split file
    return summary


def _open_vqa(model, data: DataOptions, text: TextOptions, evaluate: bool, how: dict):
    samples, held = load_split(data, evaluate)
    network, tokenizer, preprocess = model_for(model, samples, **how)

    def dataset_of(samples, *, prompts_only: bool = False, seed: int = 0):
        room = None if prompts_only else network.config.text_config.max_position_embeddings
        return VQADataset(samples, preprocess, seed, tokenizer=tokenizer, max_answer=room, skip_bad=data.skip_bad)

    return network, samples, held, dataset_of


def _open_causal(model, data: DataOptions, text: TextOptions, evaluate: bool, how: dict):
    samples, held = load_instruction_split(data, text, evaluate)
    network, tokenizer, preprocess = causal_model_for(model, samples, **how)
    skip = {"skip_bad": data.skip_bad}

    def dataset_of(samples, *, prompts_only: bool = False, seed: int = 0):
        return causal_dataset(network, samples, tokenizer, preprocess, text, prompts_only=prompts_only, seed=seed, **skip)

    return network, samples, held, dataset_of


def plan_for(network: nn.Module, plan: str | dict, **lora) -> Plan:
    """``plan`` (notation, YAML file or mapping), with those of ``lora`` (r=, lora_alpha=, lora_dropout=) that are not None in all its
    LoRA, over what it says itself. A plan without LoRA ignores them, as tables print a rank of their own for every row."""
    given = {name: value for name, value in lora.items() if value is not None}
    LoRA(**given)  # bad values are errors in any plan
    parsed = parse(plan, parts_of(network))

    def told(method):
        return dataclasses.replace(method, **given) if isinstance(method, LoRA) else method

    return Plan({part: tuple(map(told, methods)) for part, methods in parsed.treatments.items()})


def load_split(data: DataOptions, evaluate: bool = True) -> tuple[SampleList, SampleList | None]:
    """(training samples, samples to score or None): a held-out part, else a test split where the folder has one."""
    options = {"languages": data.languages, "skip_bad": data.skip_bad}
    samples = load_samples(data.data, data.split_file, split="train", **options)
    if data.hold_out:
        kept, held = hold_out(samples, data.hold_out)
        kept.skipped, kept.filtered = samples.skipped, samples.filtered
        return kept, held
    if not evaluate:
        return samples, None
    if data.eval_split_file:
        return samples, load_samples(data.data, data.eval_split_file, split="test", **options)
    try:
        held = load_samples(data.data, split="test", **options)
    except ValueError as error:  # no such split, or nothing usable in it: training needs none
        return unscored(samples, str(error)), None
    return (unscored(samples, OVERLAP), None) if overlap(samples, held) else (samples, held)


def data_notes(samples: SampleList) -> list[str]:
    """What was left out of the data, in words."""
    notes = [f"{count} entries in language {language!r} left out" for language, count in samples.filtered.items()]
    notes += [f"{count} bad entries skipped: {reason}" for reason, count in samples.skipped.items()]
    return notes + ([samples.note] if samples.note else [])


def model_for(
    model: str, samples: SampleList, *, vocab: str | None = None, pretrained: bool = True, seed: int = 0
) -> tuple[nn.Module, Any, Preprocess]:
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
                    scaled = content.get("do_normalize", True)
                    return Preprocess(size, *((content.get("image_mean"), content.get("image_std")) if scaled else ()))
                except (ValueError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}: {error}") from None
    return Preprocess(size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def load_run(adapter: str | Path, device: str | None = None, model: str | None = None) -> tuple[nn.Module, Any, Preprocess]:
    """The model, tokenizer and preprocessing that an adapter folder describes, ready to answer. ``model`` replaces a moved base."""
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise ValueError(f"no adapter folder at {adapter}")
    about = describe(adapter)
    if not about:
        raise ValueError(f"{adapter} has no fastpeft.json: it is not an adapter folder that fastpeft wrote")
    causal = "prompt" in about
    if not about.get("tokenizer") or not (causal or about.get("preprocess")):
        raise ValueError(f"{adapter} holds an adapter alone: its tokenizer and preprocessing, which a training run writes, are missing")
    try:
        base = dict(about["base"])
        name, dtype, overrides = base.pop("model"), getattr(torch, base.pop("dtype", "float32")), base.pop("overrides", {})
        kept = {"dtype": dtype, "quantize": base.pop("quantize", None)}
        preprocess = Preprocess.from_dict(about["preprocess"]) if about.get("preprocess") else None
        about["treatments"] = dict(about["treatments"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{adapter / 'fastpeft.json'} is damaged: {error!r}") from None
    device = choose_device(device)
    tokenizer = (load_causal_tokenizer if causal else load_tokenizer)(adapter / about["tokenizer"])
    network = build(model, **kept) if model else build(name, **kept, **overrides, **base)
    load_adapter(network, adapter)
    return network.to(device), tokenizer, preprocess


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
    **generation,
) -> dict[str, Any]:
    """Answer a data set's test split with an adapter and score the answers; the scores, with ``generation`` (the decoding settings) and
    ``notes``. The base folder's generation_config.json does not count. ``out``: a file for the predictions. num_beams: the papers' by
    default (3 for visual question answering, 1 for responses). ``generation``: further options of transformers' ``generate``, for responses
    (top_p=0.75, temperature=0.1, do_sample=True)."""
    if out and Path(out).is_dir():
        raise ValueError(f"{out} is a folder: give a file for the predictions")
    network, tokenizer, preprocess = load_run(adapter, device, model)
    split = {"split": "test", "split_file": data.split_file, "languages": data.languages, "skip_bad": data.skip_bad}
    if family_of(network).template:
        text = options_of(describe(adapter))
        samples = load_instructions(data.data, **split, **text.reading())
        dataset = causal_dataset(network, samples, tokenizer, preprocess, text, prompts_only=True)
        generation["num_beams"] = num_beams or 1
        answers, scored = respond_and_score(network, dataset, progress=progress, batch_size=batch_size, **generation)
    else:
        if generation:
            raise ValueError(f"{', '.join(generation)} are options of causal language models, and this adapter's base is none")
        samples = load_samples(data.data, **split)
        dataset = VQADataset(samples, preprocess)
        generation["num_beams"] = num_beams or 3
        answers = answer_questions(network, dataset, tokenizer, batch_size=batch_size, progress=progress, **generation)
        scored = score(answers, samples)
    if out:
        write_answers(out, dataset, answers)
    return scored | {"generation": generation_settings(dataset, tokenizer, **generation), "notes": data_notes(samples)}


def merge_run(adapter: str | Path, out: str | Path, model: str | None = None, modality: str | None = None) -> Path:
    """Fold an adapter into its base and write a plain transformers folder with tokenizer and preprocessing; ValueError if out exists.
    What no weight can hold (see :func:`fastpeft.merge`) stays in ``out/adapter``."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out")
    network, tokenizer, preprocess = load_run(adapter, "cpu", model)
    merge(network, modality)
    with atomic_folder(out) as draft:
        if network.fastpeft_plan is not None:
            about = describe(adapter)
            network.fastpeft_source = {"model": str(out.resolve()), "dtype": about["base"].get("dtype", "float32")}
            more = {key: about[key] for key in about.keys() - {"format", "plan", "treatments", "base", "base_fingerprint"}}
            tokens = lambda folder: shutil.copytree(Path(adapter) / about["tokenizer"], folder / about["tokenizer"])  # noqa: E731
            save_adapter(network, draft / "adapter", description=more, write_more=tokens)
            detach(network)
        network.config.architectures = [family_of(network).known.__name__]
        network.save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        if preprocess is not None:
            write_json(draft / PREPROCESS, preprocess.to_dict())
    return out
