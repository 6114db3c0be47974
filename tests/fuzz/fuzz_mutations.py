"""Small changes to valid documents and bytes, drawn by a random.Random."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63, -(2**63), 10**7, 10**9, 10**30, 0.0, -0.5, 1e-300, 1e308, float("nan")),
    *(10**400, -(10**400)),
    *(float("inf"), "", " ", "x", "a" * 3000, "\0", "\x1b[31m", "é\ud800", "../../etc/passwd", "/etc/passwd", "nan", "1e9", "LoRA", "F"),
    *([], {}, [[]], [None], {"": None}, [1, "a", None], {"a": {"b": []}}, [0] * 40, "<image>", "bfloat16", "(a+)+$", "miss-tiny"),
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Paths to everything inside a document."""
    found = [at] if at else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*at, key))
    return found


def document(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with up to three changes: a value replaced, removed, moved, doubled, or nested."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        spots = places(value)
        if not spots or draw.random() < 0.02:
            return copy.deepcopy(draw.choice(VALUES))
        *way, key = draw.choice(spots)
        parent = value
        for step in way:
            parent = parent[step]
        how = draw.randrange(8)
        if how < 4:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
        elif how == 4:
            del parent[key]
        elif how == 5:
            parent[key] = [parent[key]]
        elif how == 6:
            *way, other = draw.choice(spots)
            there = value
            try:
                for step in way:
                    there = there[step]
                parent[key] = copy.deepcopy(there[other])
            except (KeyError, IndexError, TypeError):  # removed by a change before
                parent[key] = None
        elif isinstance(parent, dict):
            parent[draw.choice(("extra", "", "a.b", str(key) + "s"))] = copy.deepcopy(draw.choice(VALUES))
        else:
            parent.insert(0, copy.deepcopy(draw.choice(VALUES)))
    return value


def text_of(value: Any) -> str:
    """JSON, where a value has one that other programs read; halves of surrogate pairs too."""
    return json.dumps(value)


def data(whole: bytes, draw: random.Random) -> bytes:
    """Bytes with some changed, removed, put in, or the rest cut off."""
    changed = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        if not changed:
            break
        at, how = draw.randrange(len(changed)), draw.randrange(8)
        if how < 3:
            changed[at] ^= 1 << draw.randrange(8)
        elif how == 3:
            del changed[at : at + draw.choice((1, 4, 64))]
        elif how == 4:
            changed[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 16))))
        elif how == 5:
            width = draw.choice((2, 4, 8))
            number = draw.choice((0, 1, 255, 65535, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)) % 2 ** (8 * width)
            changed[at : at + width] = struct.pack({2: "<H", 4: draw.choice(("<I", ">I")), 8: "<Q"}[width], number)
        elif how == 6:
            changed[at : at + draw.choice((8, 64))] = b"\0" * draw.choice((8, 64))
        elif draw.random() < 0.4:
            del changed[at:]
    return bytes(changed)
