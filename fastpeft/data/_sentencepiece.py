"""Reader of LLaMA's tokenizer.model that does not need the sentencepiece package.

The file is a protocol buffer message of which three things count: field 1, repeated, a piece (1 its text, 2 its score, 3 its
type); field 2, the trainer's settings, whose field 3 is the algorithm (2: byte-pair encoding).
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2
_LONGEST = 256  # characters of a piece: sentencepiece makes none of more than 16 unless it is told to


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, object]]:
    """(field number, value) of a message: whole numbers, floats, or the bytes of texts and messages."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        elif kind == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("cut short")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind}")
        yield tag >> 3, value


def read_pieces(file: Path) -> list[tuple[str, float, int]]:
    """(text, score, type) of every piece, in the order of their ids. ValueError where the file isn't a byte-pair model."""
    pieces, algorithm = [], 1  # the format's default: unigram
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                if len(piece[1]) > 4 * _LONGEST:
                    raise ValueError(f"a piece of {len(piece[1])} bytes")
                pieces.append((piece[1].decode("utf-8"), piece.get(2, 0.0), piece.get(3, NORMAL)))
            elif number == 2:
                algorithm = dict(_fields(value)).get(3, 1)
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{file}: not a sentencepiece model, or cut short ({error})") from None
    if not pieces or algorithm != _BPE:
        raise ValueError(f"{file}: holds no byte-pair model, which LLaMA's tokenizer.model is")
    return pieces


def byte_pair_merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The pairs that give each piece, best score first: sentencepiece joins the neighbours whose piece scores highest."""
    rank = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for text, score, kind in pieces:
        if kind in (NORMAL, USER_DEFINED):
            cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
            pairs = sorted((p for p in cuts if p[0] in rank and p[1] in rank), key=lambda p: (rank[p[0]], rank[p[1]]))
            merges += [(score, pair) for pair in pairs]
    return [pair for _, pair in sorted(merges, key=lambda m: -m[0])]
