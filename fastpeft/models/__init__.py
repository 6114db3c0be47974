"""Backbones: what :func:`build` can make, and where methods attach in it. Architectures and weights come from transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BlipConfig, BlipForQuestionAnswering

from fastpeft.methods import Part
from fastpeft.models.miss import PARTS as MISS_PARTS
from fastpeft.models.miss import MissForQuestionAnswering, miss_config

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CONFIGS = {"miss": lambda **o: miss_config(**o), "miss-tiny": lambda **o: miss_config(tiny=True, **o)}
NAMES = tuple(CONFIGS)


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts of a backbone, in the order of the papers' plans; ValueError for a model that fastpeft does not know."""
    if isinstance(model, BlipForQuestionAnswering):
        return MISS_PARTS
    raise ValueError(f"{type(model).__name__} has no parts here; fastpeft.build makes {', '.join(NAMES)} or a BLIP VQA folder")


def pretrained_folder(name: str | Path) -> Path | None:
    """The local transformers folder behind a name or path: a user's own, or one that the package ships; None for a bare name."""
    if str(name) in CONFIGS:
        shipped = ASSETS / str(name)
        return shipped if (shipped / "model.safetensors").is_file() else None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{str(name)!r} is neither a model name ({', '.join(NAMES)}) nor a folder; nothing is downloaded")
    return folder


def new_model(name: str, *, device: torch.device, seed: int, **overrides) -> MissForQuestionAnswering:
    """A named backbone with random weights that depend on ``seed`` alone; on ``meta`` it costs nothing."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.manual_seed(seed)
        return MissForQuestionAnswering(CONFIGS[name](**overrides))


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> MissForQuestionAnswering:
    """A BLIP VQA folder of transformers (config.json and safetensors). ValueError names missing, unexpected or misshapen keys."""
    config = read_config(folder)
    if device.type == "meta":
        with torch.device("meta"):
            return MissForQuestionAnswering(config)
    try:
        model, info = MissForQuestionAnswering.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} did not load as BlipForQuestionAnswering: {' '.join(str(error).split())[:600]}") from None
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{folder} does not hold this model: " + "; ".join(f"{k}: {', '.join(v[:8])}" for k, v in wrong.items()))
    return model


def read_config(folder: Path) -> BlipConfig:
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a transformers folder: cannot read config.json ({error})") from None
    if kind != "blip":
        raise ValueError(f"{path}: model_type {kind!r} is not supported; supported: 'blip' (BlipForQuestionAnswering)")
    return BlipConfig.from_pretrained(folder, local_files_only=True)
