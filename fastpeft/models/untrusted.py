"""Checks of a model's configuration and size before it is built: a folder's config.json is anybody's, and a number in it costs nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastpeft.tensor_files import read_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST = 1 << 31  # of any number of a configuration: the next vocabulary to need as much is not yet written
MOST_LAYERS = 1000  # of a model without weights; published ones have up to 126
SIZES = re.compile(r".*_(size|heads|layers|dim|channels)|heads|vision_layers|text_layers")
BITS = 8  # weights are quantised to no fewer than one bit


@contextmanager
def naming_config(where: Any) -> Iterator[None]:
    """Whatever transformers raises of a configuration from within names where it stands, in one line. Its classes check their fields each
    in their own way: a strict dataclass's error, a KeyError for an unknown activation, a division by no heads."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(where)):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: no model is made of it: {kind}{' '.join(str(error).split())[:300]}") from error


def check_config(config: PretrainedConfig, where: Any, tensors: int | None = None) -> None:
    """ValueError names the field of a configuration, or of one within it, that no model can be made of: a size below 1, an unknown
    activation or rotary embedding, more layers than there are ``tensors`` in the files (None: no files)."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for prefix, each in [("", config), *((f"{name}.", getattr(config, name, None)) for name in config.sub_configs)]:
        if not isinstance(kind := getattr(each, "model_type", ""), str):
            raise ValueError(f"{where}: {prefix}model_type = {str(kind)[:100]!r} is no name of a kind of model")
        for name, value in vars(each).items() if each is not None else ():
            told = f"{where}: {prefix}{name} = {str(value)[:100]!r}"
            if name.endswith("_act") and isinstance(value, str) and value not in ACT2FN:
                raise ValueError(f"{told} is no activation that transformers knows")
            if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
                kind = str(value.get("rope_type", value.get("type", "default")))
                if kind not in ("default", *ROPE_INIT_FUNCTIONS):
                    raise ValueError(f"{where}: {prefix}{name}: {kind[:100]!r} is no rotary embedding that transformers knows")
            if type(value) is int and not name.endswith("token_id") and (problem := _problem(name, value, tensors)):
                raise ValueError(f"{told}: {problem}")


def _problem(name: str, value: int, tensors: int | None) -> str:
    """What is wrong with a number of a configuration; '' for nothing."""
    layers = name.endswith("layers")
    if abs(value) > MOST or (layers and tensors is None and value > MOST_LAYERS):
        return "that is beyond any model"
    if SIZES.fullmatch(name) and value < 1:
        return "it must be 1 or more"
    return f"its files hold {tensors} tensors" if layers and tensors is not None and value > tensors else ""


def tensors_in(folder: Path) -> tuple[int | None, int]:
    """(how many tensors the folder's safetensors files declare, their bytes on the disk); (None, 0) where there are none, or one is
    damaged: whoever loads them says so."""
    files = sorted(folder.glob("*.safetensors"))
    try:
        return (sum(len(read_shapes(file)) for file in files), sum(file.stat().st_size for file in files)) if files else (None, 0)
    except ValueError:
        return None, 0


def check_size(model: nn.Module, where: Any, size: int, quantised: bool) -> None:
    """ValueError where a model on the meta device has more parameters than files of ``size`` bytes (0: unknown) can hold."""
    if not size:
        return
    elements = sum(p.numel() for p in model.parameters())
    if elements > 2 * size * (BITS if quantised else 1) + (1 << 20):  # some may be missing: they are told by name
        raise ValueError(f"{where} describes a model of {elements:,} parameters, and its files have {size:,} bytes")


def check_memory(model: nn.Module, where: Any) -> None:
    """ValueError where the weights of a model on the meta device take more than the machine's memory."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    needed, there = sum(p.nbytes for p in model.parameters()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(f"{where}: its weights take {needed / 1e9:.1f} GB, and this machine has {there / 1e9:.1f} GB of memory")
