"""Store of tensors by key: a folder of safetensors files with checksums, which several processes may share.

    store = FeatureStore("features", {"weights": "1f3c...", "preprocess": {...}})
    store.put({"a": torch.randn(5, 8)}); store.flush()
    store.get("a")                                    # reads it from its file; None where no undamaged copy exists

Files are ``folder/<digest of the identity>/<digest of the header>.safetensors``. Each identity has its own folder, so tensors of
different identities never mix. The header holds each tensor's offset and CRC-32, and the file name is the header's checksum. A truncated
or altered header is detected when the folder is read, an altered tensor when it is first asked for. The damaged file is then removed with
a warning that names it, and its tensors count as absent.

Files are read, not mapped: if another process truncates a mapped file, touching it ends the process (SIGBUS), while a read returns fewer
bytes. A 480-pixel image's features (2.8 MB) take 1 to 2 ms to read from the page cache and 0.7 to check, in a step of 100 ms per image.

Writers do not wait for each other. Each writes its own files under a hidden name and renames them when they are complete. Two writers that
compute the same tensor at the same time store it twice. Files are not synced to the disk before the rename: their checksums detect what a
power failure tears.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.documents import parse_json
from fastpeft.files import save_tensors
from fastpeft.tensor_files import DTYPES

SHARD_BYTES = 64 << 20  # of a file: large enough that a data set takes few, small enough to lose when a process is killed
ABANDONED = 3600  # seconds after which an unfinished file is removed: its process was killed
HEADER_BYTES = 100_000_000  # at most, as in safetensors


class Place(NamedTuple):
    """Where a tensor lies in a file, and its bytes' CRC-32."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    crc: int


def digest_of(value: Any) -> str:
    """32 hexadecimal digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def crc(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def read_header(path: Path) -> tuple[str, dict[str, Place]]:
    """(digest of a file's header, its tensors by key). ValueError where it is damaged, the file is shorter than it says, or a tensor's
    shape is not its bytes'."""
    with open(path, "rb") as file:
        length = int.from_bytes(start := file.read(8), "little")
        if not 0 < length <= min(os.fstat(file.fileno()).st_size - 8, HEADER_BYTES):
            raise ValueError("it ends within its header")
        raw, size = file.read(length), os.fstat(file.fileno()).st_size
    content = parse_json(raw)
    sums, first, places = parse_json(content.pop("__metadata__")["crc32"]), 8 + length, {}
    for key, told in content.items():
        (begin, end), shape, dtype = told["data_offsets"], tuple(told["shape"]), DTYPES[told["dtype"]]
        numbers = (begin, end, sums[key], *shape)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{key}: its header holds another thing than numbers")
        if begin > end or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{key}: its shape is not its bytes'")
        places[key] = Place(dtype, shape, first + begin, first + end, sums[key])
    if max((place.end for place in places.values()), default=first) != size:
        raise ValueError("its length is not what its header says")
    return hashlib.blake2b(start + raw, digest_size=16).hexdigest(), places


def read_tensor(path: Path, place: Place, check: bool) -> Tensor:
    """The tensor at its place, in memory of its own. ValueError where it is not all there, or (``check``) is not what was written."""
    tensor = torch.empty(place.shape, dtype=place.dtype)
    with open(path, "rb", buffering=0) as file:
        file.seek(place.begin)
        buffer, got = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), 0
        while got < len(buffer) and (more := file.readinto(buffer[got:])):
            got += more
    if got != place.end - place.begin or (check and crc(tensor) != place.crc):
        raise ValueError("a tensor is not what was written")
    return tensor


class FeatureStore:
    """Tensors by key; ``identity`` (JSON-able) is what they all depend on. Reading never raises; writing raises OSError, and what could not
    be written is still given out until then."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]):
        self.identity = digest_of(identity)
        self.about = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / self.identity
        self._files: dict[str, dict[str, Place]] = {}  # by file name
        self._where: dict[str, str] = {}  # key -> file name
        self._verified: set[str] = set()
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._where.keys() | self._waiting.keys())

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._where

    def keys(self) -> list[str]:
        """Of all that is in files or waits."""
        return [*self._where, *self._waiting]

    def refresh(self) -> None:
        """See what others have written since."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".safetensors"))
        except OSError:
            return
        for name in names:
            if name not in self._files:
                try:
                    checksum, places = read_header(self.folder / name)
                    if name != f"{checksum}.safetensors":
                        raise ValueError("its header is not what was written")
                    self._files[name] = places
                except FileNotFoundError:  # another process removed it
                    continue
                except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                    self._damaged(name, error)
                    continue
                self._where |= dict.fromkeys(self._files[name], name)

    def get(self, key: str) -> Tensor | None:
        """The tensor, on the CPU: do not write to it. None where the store has none that is whole."""
        while key not in self._waiting and key in self._where:  # several files may hold it
            name = self._where[key]
            try:
                tensor = read_tensor(self.folder / name, self._files[name][key], check=key not in self._verified)
                self._verified.add(key)
                return tensor
            except (OSError, ValueError) as error:
                self._damaged(name, error)
        return self._waiting.get(key)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep contiguous CPU tensors, each of its own memory; they are written in files of 64 MiB, the last by :meth:`flush`."""
        fresh = {key: tensor for key, tensor in tensors.items() if key not in self}
        self._waiting |= fresh
        self._waiting_bytes += sum(tensor.nbytes for tensor in fresh.values())
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits. OSError says why it cannot be; it then waits no longer."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        if not waiting:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        sums = {key: crc(tensor) for key, tensor in waiting.items()}
        draft = self.folder / f".{uuid.uuid4().hex}.draft"
        try:
            save_tensors(waiting, draft, metadata={"crc32": json.dumps(sums), "identity": self.about})
            checksum, places = read_header(draft)
            name = f"{checksum}.safetensors"
            os.replace(draft, self.folder / name)
        finally:
            draft.unlink(missing_ok=True)
        self._files[name] = places
        self._where |= dict.fromkeys(places, name)

    def _remove_abandoned(self) -> None:
        for draft in self.folder.glob(".*.draft"):
            try:
                if time.time() - draft.stat().st_mtime > ABANDONED:
                    draft.unlink()
            except OSError:  # its process has just finished it
                continue

    def _damaged(self, name: str, error: Exception) -> None:
        path = self.folder / name
        lost = self._files.pop(name, {})
        for key in lost:
            self._verified.discard(key)
            if self._where.get(key) == name:
                other = next((file for file, places in self._files.items() if key in places), None)
                self._where.pop(key) if other is None else self._where.update({key: other})
        warnings.warn(f"{path} is damaged ({error}): it is removed, and what it held is computed again", stacklevel=3)
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a read-only folder: it will be found damaged again
            self._files[name] = {}
