"""Digests of tensors: of data, on the device that holds it, and of weights, on the host.

A row's data are 32-bit words w[c, i] (chunk c of 1024 words, zeros at its end). With fixed random 64-bit numbers a and b and arithmetic
modulo 2^64, lane l of four is

    H_l = sum_c sum_j b_l[c, j] h_cj,   h_c = the 32-bit halves of (sum_i a_k[i] w[c, i])_k=0..3

a multilinear hash: two different rows agree in a lane with a chance of at most 2^-32 over the choice of a and b, in all with 2^-128.
Zeros at the end of a row change nothing, so an image padded to its batch's tiles has the digest it has alone. The host reads 32 bytes
a row.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fastpeft.methods.quantized import pieces_of

WORDS, LANES = 1024, 4
BLOCK = 1 << 22  # words hashed at a time: their products take 8 bytes each


@functools.lru_cache(maxsize=16)
def _coefficients(count: int, width: int, seed: int, device: torch.device) -> Tensor:
    """[LANES, count, width] int64: row c is the same whatever ``count`` is."""
    rows = [torch.randint(-(2**63), 2**63 - 1, (LANES, width), generator=torch.Generator().manual_seed(seed + c)) for c in range(count)]
    return torch.stack(rows, 1).to(device)


def row_digests(data: Tensor) -> list[bytes]:
    """32 bytes of each row data[i], by its bits, zero bits at its end left out; dtype and shape are not in them. On the host they are
    blake2b's (7 times as fast there: 1.2 ms for an image of 3 x 336 x 336 in float32), on a device the multilinear hash's, in one copy."""
    raw = _bytes_of_rows(data)
    if raw.device.type == "cpu":
        return [hashlib.blake2b(row.numpy().tobytes().rstrip(b"\0"), digest_size=32).digest() for row in raw]
    return multilinear(raw)


def _bytes_of_rows(data: Tensor) -> Tensor:
    """[rows, bytes] uint8."""
    rows = data.detach().contiguous().reshape(len(data), -1) if data.numel() else data.new_zeros(len(data), 0)
    rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    return rows.to(torch.uint8) if rows.dtype == torch.bool else rows.view(torch.uint8)


def multilinear(raw: Tensor) -> list[bytes]:
    """32 bytes of each row of raw [rows, bytes] uint8, computed on its device (see the module)."""
    if not raw.numel():
        return [bytes(8 * LANES)] * len(raw)
    padded = torch.nn.functional.pad(raw, (0, -raw.shape[1] % (4 * WORDS))).contiguous()
    words = padded.view(torch.int32).view(-1, WORDS)
    chunks = len(words) // len(raw)
    inner = _coefficients(1, WORDS, 0, raw.device)[:, 0]  # [LANES, WORDS]
    outer = _coefficients(1 << (chunks - 1).bit_length(), 2 * LANES, 1, raw.device)[:, :chunks]  # [LANES, chunks, 2 LANES]
    parts = [torch.stack([(part * lane).sum(-1) for lane in inner], -1) for part in words.split(BLOCK // WORDS)]  # [.., LANES]
    halves = torch.cat(parts).view(torch.int32).view(len(raw), chunks, 2 * LANES)
    lanes = torch.stack([(halves * lane).sum((1, 2)) for lane in outer], -1)
    return [b"".join(value.to_bytes(8, "little", signed=True) for value in row) for row in lanes.tolist()]


def digest_of_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits of tensors by name, to the bit, whatever device they are on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in pieces_of(tensor):
            digest.update(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
