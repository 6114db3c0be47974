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
from fastpeft.documents import parse_json
from fastpeft.files import atomic_file, atomic_folder


def write_blip_folder(out: Path, source: Path, contents: Contents, image_size=None, text_heads=None, vision_heads=None) -> ConversionReport:
    """A checkpoint's contents as a transformers folder, with MISS's preprocessing."""
    with naming(source):
        state, config, more = blip_with_notes(contents.state, image_size, text_heads, vision_heads)
    state = {k: v for k, v in state.items() if k not in TIED}
    dtypes = {v.dtype for v in state.values()}
    config.dtype = dtypes.pop() if len(dtypes) == 1 else None
    config.architectures = ["BlipForQuestionAnswering"]
    preprocess = {"image_size": config.vision_config.image_size, "mean": None, "std": None, "extra_255": True}
    with atomic_folder(out, keep=besides_weights) as draft:
        count = write_model(draft, config, state.items())
        (draft / "fastpeft_preprocess.json").write_text(json.dumps(preprocess) + "\n")
    more.append("fastpeft_preprocess.json holds MISS's preprocessing (divided by 255 twice, not normalised): edit it for BLIP's own")
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
