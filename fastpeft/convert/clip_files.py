"""Conversion of OpenAI's CLIP: a file to a folder of its image encoder, or with a LLaMA to one of a model of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, PretrainedConfig

from fastpeft.convert.clip_names import clip_to_transformers
from fastpeft.convert.llama_files import no_tokenizer, open_llama
from fastpeft.convert.reading import Contents, naming
from fastpeft.convert.writing import ConversionReport, besides_weights, write_model
from fastpeft.data.images import CLIP_MEAN, CLIP_STD
from fastpeft.files import atomic_folder
from fastpeft.models.excitor import ExcitorModelConfig
from fastpeft.models.lavin import LavinConfig, Neck


def write_clip_folder(out: Path, source: Path, contents: Contents, vision_heads=None, llama=None, backbone=None, vicuna_delta=None):
    """CLIP's image encoder as a transformers folder, or with ``llama`` and ``backbone`` as a folder of fastpeft's model of both."""
    with naming(source):
        config, state, notes = clip_to_transformers(contents.state, vision_heads)
    notes, tokenizer, direction = [*contents.notes(), *notes], [], "CLIP -> transformers"
    tensors: Iterator[tuple[str, Tensor]] = iter(state.items())
    if (llama is None) != (backbone is None) or backbone not in (None, *_BACKBONES):
        raise ValueError("llama (a LLaMA's folder) and backbone (excitor or lavin) go together: they make a model of CLIP and LLaMA")
    if vicuna_delta is not None and llama is None:
        raise ValueError("vicuna_delta is added to a LLaMA: give llama, too")
    if llama is not None:
        opened = open_llama(Path(llama).expanduser(), None if vicuna_delta is None else Path(vicuna_delta).expanduser())
        config, seen = _BACKBONES[backbone](config, opened.config, state)
        tensors, tokenizer = chain(seen, ((f"llm.{name}", tensor) for name, tensor in opened.tensors)), opened.tokenizer
        notes, direction = [*notes, *no_tokenizer(tokenizer)], f"CLIP + LLaMA -> {backbone}"
        if backbone == "lavin":
            notes.append("the neck is new, its weights random: LaVIN's adapter files hold a trained one")
    with atomic_folder(out, keep=besides_weights) as draft:
        count = write_model(draft, config, tensors, tokenizer)
        if backbone != "lavin":  # which squeezes images in and takes ImageNet's numbers
            (draft / "preprocessor_config.json").write_text(json.dumps(clip_preprocessing(config), indent=1) + "\n")
    return ConversionReport(direction, count, notes)


def _excitor(vision: CLIPVisionConfig, text, state: dict[str, Tensor]):
    config = ExcitorModelConfig(vision_config=vision, text_config=text, architectures=["ExcitorForConditionalGeneration"], dtype=text.dtype)
    return config, ((f"vision.{name}", tensor) for name, tensor in state.items())


def _lavin(vision: CLIPVisionConfig, text, state: dict[str, Tensor]):
    config = LavinConfig(vision_config=vision, text_config=text, architectures=["LavinForConditionalGeneration"], dtype=text.dtype)
    if not config.visual_tokens:
        raise ValueError(f"CLIP has {vision.num_hidden_layers} layers: LaVIN takes a token after every fourth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        neck = Neck(config).to(text.dtype)
    new = ((f"neck.{name}", tensor) for name, tensor in neck.state_dict().items())
    return config, chain(lavin_vision(state), new)


_BACKBONES = {"excitor": _excitor, "lavin": _lavin}


def lavin_vision(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """CLIPVisionModelWithProjection's tensors as LaVIN names them, which has no use for the projection."""
    return ((f"vision.{n.removeprefix('vision_model.')}", t) for n, t in state.items() if n.startswith("vision_model."))


def clip_preprocessing(config: PretrainedConfig) -> dict:
    """What transformers' CLIPImageProcessor reads: OpenAI's resize, crop and numbers."""
    size = getattr(config, "vision_config", config).image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
