"""Causal language models in runs: their tokenizer, preprocessing, data (with images or without) and responses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.data import CausalDataset, Instruction, Preprocess, SampleList, load_causal_tokenizer, load_instructions
from fastpeft.data import train_causal_tokenizer as learn_tokenizer
from fastpeft.data.images import CLIP_MEAN, CLIP_STD
from fastpeft.data.scienceqa import asked_in
from fastpeft.documents import parse_json
from fastpeft.evaluate import respond_and_score
from fastpeft.models import ModelSource, family_of, resolve
from fastpeft.plan import build
from fastpeft.runs.options import DataOptions, TextOptions

BEAMS = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
AROUND = ("<im_start>", "<im_end>")  # beside an image, where LLaVA's configuration says so (mm_use_im_start_end)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(data: DataOptions, text: TextOptions, split: str, split_file: str | None = None, check_images: bool | None = None) -> SampleList:
    """The samples of one split."""
    reading = {"languages": data.languages, "skip_bad": data.skip_bad, "check_images": check_images, **text.reading()}
    (source,) = data.sources
    of_images = {"image_folder": source.image_folder, "image_prefix": source.image_prefix, "turns": source.turns}
    return load_instructions(source.path, source.kind, split, split_file=split_file, **of_images, **reading)


def model_for(
    model: str | ModelSource,
    samples: SampleList,
    *,
    vocab: str | None = None,
    pretrained: bool = True,
    seed: int = 0,
    base: dict | None = None,
) -> tuple[nn.Module, Any, Preprocess | None]:
    """A backbone, its tokenizer, and its images' preprocessing (None where it sees none). The tokenizer is ``vocab``'s, else the model
    folder's, else learnt from the data. ``base``: more that :func:`fastpeft.build` takes (quantize, dtype)."""
    source = resolve(model)
    source = source if pretrained else source.without_weights()
    tokenizer = tokenizer_for(source, samples, vocab)
    random = {} if source.folder is not None else {"pretrained": False, "seed": seed, **vocabulary_of(tokenizer, source)}
    network = build(source, **base or {}, **random)
    size = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, {source} embeds {size}: use the one it was trained with")
    return network, tokenizer, clip_preprocess(source.folder, network)


def tokenizer_for(source: ModelSource, samples: SampleList, vocab: str | None = None):
    """``vocab``'s, else the model folder's, else one learnt from the data; ValueError for a folder without."""
    folder = source.folder
    if vocab is not None:
        return load_causal_tokenizer(vocab)
    if folder is None:
        return learn_tokenizer([text for sample in samples for text in _texts(sample)])
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer: give one (--vocab FOLDER)")
    return load_causal_tokenizer(folder)


def vocabulary_of(tokenizer, source: ModelSource) -> dict[str, Any]:
    """What of the model's configuration is the vocabulary's."""
    text = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text["pad_token_id"] = tokenizer.pad_token_id
    return {"text_config": text} if "text_config" in source.family.config.sub_configs else text


def _texts(sample: Instruction) -> list[str]:
    return [sample.context, *(text for turns in (sample.turns, *sample.alternatives) for turn in turns for text in turn)]


def clip_preprocess(folder: Path | None, network: nn.Module) -> Preprocess | None:
    """CLIP's own resize, crop and normalisation at the encoder's size, its numbers the folder's preprocessor_config.json's where there is
    one. LaVIN, as published, squeezes the whole image in and takes ImageNet's numbers; LLaVA-Med v1.5 pads it to a square."""
    vision = getattr(network.config, "vision_config", None)
    if vision is None:
        return None
    squeezed = family_of(network).template == "lavin"
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if squeezed else (CLIP_MEAN, CLIP_STD)
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is not None and path.is_file():
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            mean, std = content.get("image_mean", mean), content.get("image_std", std)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None
    padded = getattr(network.config, "image_aspect_ratio", None) == "pad"
    return Preprocess(vision.image_size, mean=tuple(mean), std=tuple(std), interpolation="bicubic", crop=not squeezed, pad=padded)


def template_of(network: nn.Module, text: TextOptions) -> str:
    """The prompt template that was chosen, else the folder's own, else the family's."""
    return text.template or getattr(network.config, "prompt_template", None) or family_of(network).template


def dataset(network: nn.Module, samples, tokenizer, preprocess, text: TextOptions, *, prompts_only: bool = False, **more):
    """Samples as ``network`` reads them, to train on or (``prompts_only``) to answer: ScienceQA's, where it was trained on several prompt
    formats, in the one without reasons. A model that sees no images reads their captions, where ``use_caption`` says so."""
    family = family_of(network)
    if text.use_caption and preprocess is None:
        blind = [dataclasses.replace(sample, image=None) for sample in samples]
        samples = dataclasses.replace(samples, samples=blind) if isinstance(samples, SampleList) else blind
    if prompts_only and not isinstance(text.prompt_format, str):
        asked = asked_in(samples, text.prompt_format)
        samples = dataclasses.replace(samples, samples=asked) if isinstance(samples, SampleList) else asked
    return CausalDataset(
        samples,
        tokenizer,
        template_of(network, text),
        text.max_length,
        preprocess=preprocess,
        image_tokens=family.image_tokens(network.config),
        image_place=text.image_place,
        image_around=AROUND if getattr(network.config, "mm_use_im_start_end", False) else None,
        prompts_only=prompts_only,
        packed=text.packed and not prompts_only,
        reading=text.reading(),
        **more,
    )


def answer(network: nn.Module, asked: CausalDataset, tokenizer, **generation) -> tuple[list[str], dict[str, Any]]:
    """(responses, scores). ``generation``: batch_size, progress, and options of transformers' ``generate``."""
    return respond_and_score(network, asked, **generation)


def asking_options(network: nn.Module) -> TextOptions:
    """For a model that says nothing of prompts: 512 tokens of text beside the image's, as far as the model has positions."""
    config, options = network.config, TextOptions()
    places, positions = family_of(network).image_tokens(config), getattr(config, "text_config", config).max_position_embeddings
    return dataclasses.replace(options, max_length=min(options.max_length + places, positions))


def options_of(about: dict[str, Any]) -> TextOptions:
    """The options an adapter was trained with, from its description."""
    known = {f.name for f in dataclasses.fields(TextOptions)}
    said = about.get("prompt", {}) | {name: about[name] for name in ("max_question",) if name in about}
    return TextOptions(**{name: value for name, value in said.items() if name in known})
