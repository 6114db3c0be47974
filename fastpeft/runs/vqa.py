"""Visual question answering in runs: the models' tokenizer, preprocessing, data and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.data import Preprocess, SampleList, VQADataset, load_samples, load_tokenizer, train_tokenizer
from fastpeft.data.images import CLIP_MEAN, CLIP_STD
from fastpeft.documents import parse_json
from fastpeft.evaluate import answer_and_score
from fastpeft.models import ModelSource, resolve
from fastpeft.plan import build
from fastpeft.runs.options import DataOptions, TextOptions

PREPROCESS = "fastpeft_preprocess.json"
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which transformers' files have
BEAMS = 3  # of the papers


def read(data: DataOptions, text: TextOptions, split: str, split_file: str | None = None, check_images: bool | None = None) -> SampleList:
    """The samples of one split."""
    how = {"languages": data.languages, "skip_bad": data.skip_bad, "check_images": check_images}
    (source,) = data.sources
    if given := [name for name in ("kind", "image_folder", "image_prefix") if getattr(source, name)] + ["turns"] * (
        source.turns != "dialogue"
    ):
        raise ValueError(f"{source.path}: {', '.join(given)}: options of instruction data, which causal language models read")
    return load_samples(source.path, split_file, split=split, **how)


def model_for(
    model: str | ModelSource, samples: SampleList, *, vocab: str | None = None, pretrained: bool = True, seed: int = 0
) -> tuple[nn.Module, Any, Preprocess]:
    """A backbone, its tokenizer and its preprocessing. The vocabulary is ``vocab``, else the model folder's, else learnt from the data."""
    source = resolve(model)
    source = source if pretrained else source.without_weights()
    tokenizer = tokenizer_for(source, samples, vocab)
    if source.folder is None:
        network = build(source, pretrained=False, seed=seed, **vocabulary_of(tokenizer))
    else:
        network = build(source)
        check_vocabulary(network, tokenizer, source.name)
    return network, tokenizer, preprocess_for(source.folder, network)


def tokenizer_for(source: ModelSource, samples: SampleList, vocab: str | None = None):
    """``vocab``'s, else the model folder's, else one learnt from the data."""
    folder = source.folder
    if vocab is not None:
        return load_tokenizer(vocab)
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return load_tokenizer(folder)
    texts = [text for s in samples for text in (s.question, *s.question_pool, s.answer)]
    return train_tokenizer(texts, vocab_size=4096)


def vocabulary_of(tokenizer) -> dict[str, int]:
    """What of a configuration is the vocabulary's."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ids}


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
    """From the model's folder: ours, or transformers' preprocessor_config.json (what it does not say is BlipImageProcessor's); else
    [-1, 1] at the model's image size. ValueError names a file that cannot be followed."""
    size = network.config.vision_config.image_size
    if folder is not None:
        for name in (PREPROCESS, "preprocessor_config.json"):
            path = folder / name
            if path.is_file():
                try:
                    content = parse_json(path.read_text(encoding="utf-8"))
                    if name == PREPROCESS:
                        return Preprocess.from_dict(content)
                    scaled = content.get("do_normalize", True)
                    numbers = (content.get("image_mean", CLIP_MEAN), content.get("image_std", CLIP_STD)) if scaled else (None, None)
                    if (how := content.get("resample", 3)) not in RESAMPLE:
                        raise ValueError(f"resample={how!r}: images are resized with 2 (bilinear) or 3 (bicubic)")
                    return Preprocess(size, *numbers, interpolation=RESAMPLE[how])
                except (ValueError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}: {error}") from None
    return Preprocess(size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def dataset(
    network: nn.Module,
    samples: SampleList,
    tokenizer,
    preprocess: Preprocess,
    text: TextOptions,
    *,
    prompts_only: bool = False,
    seed: int = 0,
    skip_bad: bool = False,
) -> VQADataset:
    """Samples as ``network`` reads them, to train on or (``prompts_only``) to answer."""
    room = None if prompts_only else network.config.text_config.max_position_embeddings
    return VQADataset(samples, preprocess, seed, tokenizer=tokenizer, max_answer=room, skip_bad=skip_bad, max_question=text.max_question)


def answer(network: nn.Module, asked: VQADataset, tokenizer, **generation) -> tuple[list[str], dict[str, Any]]:
    """(answers, scores). ``generation``: batch_size, num_beams, progress, scoring."""
    return answer_and_score(network, asked, tokenizer, **generation)
