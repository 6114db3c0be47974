"""Checks and inference on state dicts: names and shapes of tensors, sizes, layers and heads that they imply."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor


def common_size(state: dict[str, Tensor], default: int, *places: tuple[str, int]) -> int:
    """The size that most of the ``places``, (name, dimension), have."""
    found = Counter(state[name].shape[dim] for name, dim in places if name in state and state[name].dim() > dim)
    return found.most_common(1)[0][0] if found else default


def count_layers(state: dict[str, Tensor], pattern: str, default: int = 12) -> int:
    """Layers whose numbers ``pattern``'s group matches at the beginning of names."""
    return max((int(m[1]) + 1 for name in state if (m := re.match(pattern, name))), default=default)


def heads_of(width: int, given: int | None, argument: str) -> int:
    """``given``, or as many as are 64 wide."""
    if width % (given or 64) or (given is not None and given < 1):
        raise ValueError(f"width {width} is not {f'a multiple of {given}' if given else 'made of heads of 64'}: give {argument}")
    return given or width // 64


def check_tensors(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], tied: Mapping[str, str] | None = None) -> None:
    """ValueError names every missing, unexpected, misshapen and untied tensor. ``wanted``: shapes by name; ``tied``: pairs of names of one
    tensor."""
    faults = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {shape}"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        "untied": [a for a, b in (tied or {}).items() if a in state and b in state and not torch.equal(state[a], state[b])],
    }
    if any(faults.values()):
        raise ValueError("; ".join(f"{len(names)} {kind}: {listing(names)}" for kind, names in faults.items() if names))


def listing(names: list[str], most: int = 10) -> str:
    """The first ``most`` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
