"""Conversion of MISS and BLIP VQA: a checkpoint file to a transformers folder, and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import BlipConfig

from fastpeft.convert.blip_names import TIED, blip_with_notes, lost, transformers_to_blip
from fastpeft.convert.reading import Contents, naming, read_file, read_safetensors
from fastpeft.convert.writing import ConversionReport, besides_weights, owned, write_model
from fastpeft.data.images import CLIP_MEAN, CLIP_STD
from fastpeft.documents import parse_json
from fastpeft.files import atomic_file, atomic_folder

PREPROCESSING = {  # of images; a checkpoint does not say whose it is
    "miss": {"mean": None, "std": None, "extra_255": True},
    "blip": {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"},
}


def write_blip_folder(
    out: Path, source: Path, contents: Contents, image_size=None, text_heads=None, vision_heads=None, preprocess: str = "miss"
) -> ConversionReport:
    """A checkpoint's contents as a transformers folder, with the preprocessing of MISS or, ``preprocess`` "blip", of BLIP."""
    if preprocess not in PREPROCESSING:
        raise ValueError(f"preprocess must be one of {', '.join(PREPROCESSING)}, not {preprocess!r}")
    with naming(source):
        state, config, more = blip_with_notes(contents.state, image_size, text_heads, vision_heads)
    state = {k: v for k, v in state.items() if k not in TIED}
    dtypes = {v.dtype for v in state.values()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else None
    config.architectures = ["BlipForQuestionAnswering"]
    images = {"image_size": config.vision_config.image_size} | PREPROCESSING[preprocess]
    with atomic_folder(out, keep=besides_weights) as draft:
        count = write_model(draft, config, state.items())
        (draft / "fastpeft_preprocess.json").write_text(json.dumps(images) + "\n")
    if not any((out / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        more.append("a checkpoint has no vocabulary: put BERT's vocab.txt (bert-base-uncased) into the folder, or give it with --vocab")
    if preprocess == "miss":
        more.append("images are prepared as MISS's (divided by 255 twice, not normalised); for a checkpoint of BLIP's: --preprocess blip")
    return ConversionReport("official -> transformers", count, [*contents.notes(), *more])


def write_blip_checkpoint(out: Path, source: Path, contents: None) -> ConversionReport:
    """A transformers folder as a checkpoint file, its tensors under ``model``."""
    with naming(source):
        state, config = _read_folder(source)
        renamed = transformers_to_blip(state, config)
    renamed |= owned({k: v for k, v in renamed.items() if k not in TIED})
    renamed |= {tied: renamed[kept] for tied, kept in TIED.items()}
    with atomic_file(out) as draft:
        torch.save({"model": renamed}, draft)
    return ConversionReport("transformers -> official", len(renamed) - len(TIED), lost(config))


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], BlipConfig]:
    try:
        values = parse_json((folder / "config.json").read_text())
        if (kind := values.get("model_type")) != "blip":
            raise ValueError(f"a {kind!r} model, and only 'blip' (BlipForQuestionAnswering) has an official form")
        config = BlipConfig.from_dict(values)
        index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
        if index.exists() and not (folder / shards[0]).exists():
            shards = sorted({Path(name).name for name in parse_json(index.read_text())["weight_map"].values()}) or shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"no transformers folder to convert: {' '.join(str(error).split())}") from None
    if not (folder / shards[0]).exists() and (folder / "pytorch_model.bin").exists():
        return read_file(folder / "pytorch_model.bin").state, config
    state = {}
    for shard in shards:
        state |= read_safetensors(folder / shard)
    return state, config
