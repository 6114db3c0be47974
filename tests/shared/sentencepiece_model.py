"""A tokenizer.model in LLaMA's layout, written without the sentencepiece package."""

import struct


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float, kind: int) -> bytes:
    return field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind))


SPECIALS = (("<unk>", 2), ("<s>", 3), ("</s>", 3))  # text and type of a piece


def write_sentencepiece(
    file, merges=("he", "ll", "hell", "▁t", "▁th", "▁hell"), algorithm=2, specials=(("<unk>", 2), ("<s>", 3), ("</s>", 3))
):
    """LLaMA's layout: special pieces, the 256 bytes, merges by falling score, then single characters."""
    parts = [piece(text, 0.0, kind) for text, kind in specials]
    parts += [piece(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    parts += [piece(text, -float(i), 1) for i, text in enumerate([*merges, *"▁helot"])]
    parts += [field(2, varint(3 << 3) + varint(algorithm)), field(3, field(1, b"identity"))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(parts))
    return file
