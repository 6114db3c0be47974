"""Checkpoint of a run: trained parameters as safetensors, optimiser and random state, and the position in the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fastpeft.files import atomic_folder, save_tensors
from fastpeft.methods.base import check_keys


def save_state(folder: Path, model: nn.Module, optimizer, progress: dict[str, Any]) -> None:
    """Write the folder atomically: a run killed while saving keeps its last checkpoint."""
    with atomic_folder(folder) as draft:
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_tensors(trained, draft / "trained.safetensors")
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda}
        try:
            torch.save(state, draft / "optimizer.pt")
        except RuntimeError as error:  # torch's error for a full disk
            raise OSError(f"{folder} cannot be written: {' '.join(str(error).split())[:200]}") from None
        (draft / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")


def read_progress(folder: Path) -> dict[str, Any]:
    """What :func:`save_state` was given. ValueError if it cannot be read."""
    try:
        progress = json.loads((folder / "progress.json").read_text())
        if not (isinstance(progress, dict) and isinstance(progress.get("done"), dict) and isinstance(progress.get("identity"), dict)):
            raise ValueError("progress.json is not a run's")
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    return progress


def check_done(folder: Path, done: dict[str, Any], fresh: dict[str, Any]) -> None:
    """ValueError where what a run has done is not of the kinds that a fresh run starts with."""
    for name, first in fresh.items():
        value = done.get(name, first)
        if first is None:  # the cost of the first batch
            good = value is None or (isinstance(value, dict) and {"flops", "saved_bytes", "samples"} <= value.keys())
        elif name == "sources":
            good = isinstance(value, dict) and all(isinstance(v, dict) and {"samples", "losses"} <= v.keys() for v in value.values())
        elif name == "validation":
            good = isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())
        elif isinstance(first, list):
            good = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
        else:
            good = isinstance(value, int | float if isinstance(first, float) else int) and not isinstance(value, bool) and value >= 0
        if not good:
            raise _damaged(folder, ValueError(f"progress.json says {name} is {value!r}"))


def differences(name: str, was: Any, now: Any) -> list[str]:
    """What changed, in words, as deep as both have the same fields: "plan vit LoRA r was 4, now 8"."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now) == 1:
        was, now = was[0], now[0]
    if isinstance(was, dict) and isinstance(now, dict):
        if was.keys() == now.keys():
            return [text for key in was for text in differences(f"{name} {key}", was[key], now[key])]
        was, now = "+".join(was), "+".join(now)
    return [] if was == now else [f"{name} was {was!r}, now {now!r}"]


def load_state(folder: Path, model: nn.Module, optimizer) -> None:
    """Put parameters, optimiser and random state back. ValueError names what is missing, damaged or does not fit."""
    try:
        trained = load_file(folder / "trained.safetensors")
        rest = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        state, rng, cuda_rng = rest["optimizer"], rest["rng"], rest["cuda_rng"]
    except Exception as error:  # torch and pickle raise a dozen types on a broken file
        raise _damaged(folder, error) from None
    mine = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    check_keys(mine, trained, str(folder))
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint in {folder} does not fit this run's optimiser: {error}") from None
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(trained[name])
    torch.set_rng_state(rng)
    if cuda_rng and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda_rng)


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or repr(error)
    return ValueError(f"the checkpoint in {folder} is damaged ({reason}): remove the folder to start afresh")
