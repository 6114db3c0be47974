"""Weights of converted models as transformers folders, a large model's one shard at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastpeft.files import save_tensors

SHARD_BYTES = 2 << 30  # what is in memory at once
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did. n_tensors: tensors written, a tied one counted once; notes: what was left out or altered."""

    direction: str
    n_tensors: int
    notes: list[str] = field(default_factory=list)


def check_out(out: Path, a_file: bool, overwrite: bool) -> None:
    if out.is_dir() and a_file:
        raise ValueError(f"{out} is a folder: name the file to write, such as {out / 'official.pth'}")
    if out.is_file() and not a_file:
        raise ValueError(f"{out} is a file: name the folder to write")
    if not overwrite and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ValueError(f"{out} exists{' and is not empty' if out.is_dir() else ''}: choose another place, or overwrite")


def owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous and alone in its storage: safetensors refuses shared memory, and torch.save keeps a view's whole."""
    out, seen = {}, set()
    for name, tensor in state.items():
        storage, tensor = tensor.untyped_storage(), tensor.detach()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        out[name] = tensor
    return out


def write_model(folder: Path, config: PretrainedConfig, tensors, tokenizer: list[Path] = ()) -> int:
    """A transformers folder's files, in an empty one; how many tensors."""
    config.save_pretrained(folder)
    for file in tokenizer:
        shutil.copyfile(file, folder / file.name)
    return write_tensors(folder, tensors)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int | None = None) -> int:
    """``model.safetensors``, or shards of about ``shard_bytes`` (SHARD_BYTES) with transformers' index; returns how many tensors.
    ``tensors`` may make each as it is asked for: no more than a shard is held."""
    shards, size, most = [{}], 0, SHARD_BYTES if shard_bytes is None else shard_bytes
    where: dict[str, int] = {}

    def put() -> None:  # and let go
        save_tensors(owned(shards[-1]), folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards[-1] = {}

    total = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > most:
            put()
            shards.append({})
            size = 0
        shards[-1][name], where[name] = tensor, len(shards)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    put()
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = names if len(names) > 1 else ["model.safetensors"]
    for number, name in enumerate(names, 1):
        os.replace(folder / f"part-{number}", folder / name)
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[number - 1] for name, number in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return len(where)


def besides_weights(name: str) -> bool:
    """What a folder that is converted into once more keeps where it has no new version: old weights beside new ones would be loaded."""
    return not any(fnmatch(name, pattern) for pattern in _WEIGHTS)
