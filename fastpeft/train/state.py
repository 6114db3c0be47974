"""A run's checkpoint: trained parameters as safetensors, optimiser and random state, and where in the data it stands."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastpeft.checkpoints import atomic_folder
from fastpeft.methods.base import check_keys


def save_state(folder: Path, model: nn.Module, optimizer, progress: dict[str, Any]) -> None:
    """Write the folder atomically: a run killed while saving keeps its last checkpoint."""
    with atomic_folder(folder) as draft:
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, draft / "trained.safetensors")
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda}, draft / "optimizer.pt")
        (draft / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")


def load_state(folder: Path, model: nn.Module, optimizer) -> dict[str, Any]:
    """Put model, optimiser and random state back; returns the progress. ValueError names what is missing, damaged or does not fit."""
    try:
        progress = json.loads((folder / "progress.json").read_text())
        trained = load_file(folder / "trained.safetensors")
        rest = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"the checkpoint in {folder} is damaged: {' '.join(str(error).split())[:300]}") from None
    mine = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    check_keys(mine, trained, str(folder))
    try:
        optimizer.load_state_dict(rest["optimizer"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint in {folder} does not fit this run's optimiser: {error}") from None
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(trained[name])
    torch.set_rng_state(rest["rng"])
    if rest["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rest["cuda_rng"])
    return progress
