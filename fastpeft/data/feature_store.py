"""Tensors by key in a folder of safetensors files, which appear whole or not at all and which several processes may share.

    store = FeatureStore("features", {"weights": "1f3c...", "preprocess": {...}})
    store.put({"a": torch.randn(5, 8)}); store.flush()
    store.get("a")                                    # a view of the mapped file; None where nothing whole is kept

A file lies in ``folder/<digest of the identity>/<digest of its header>.safetensors``: another identity is another folder, so it never
meets these tensors. The header names every tensor with its place and its CRC-32, and the file's name is the header's checksum; so a file
that was cut, torn or written to is known: the header when the folder is read, a tensor when it is first asked for. Such a file is removed
with a warning that names it, and its tensors count as absent.

Writers never wait for each other: each writes files of its own under a hidden name and renames them when they are whole. Two that compute
the same tensor at the same time keep it twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 64 << 20  # of a file: large enough that a data set takes few, small enough to lose when a process is killed
ABANDONED = 3600  # seconds after which an unfinished file is nobody's


def digest_of(value: Any) -> str:
    """32 hexadecimal digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def crc(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def read_header(path: Path) -> tuple[str, dict[str, Any]]:
    """(digest, content) of a safetensors file's header. ValueError where it is damaged or the file is shorter than it says."""
    with open(path, "rb") as file:
        length = int.from_bytes(start := file.read(8), "little")
        if not 0 < length <= os.fstat(file.fileno()).st_size - 8:
            raise ValueError("it ends within its header")
        raw, size = file.read(length), os.fstat(file.fileno()).st_size
    content = json.loads(raw)
    if max((t["data_offsets"][1] for name, t in content.items() if name != "__metadata__"), default=0) != size - 8 - length:
        raise ValueError("its length is not what its header says")
    return hashlib.blake2b(start + raw, digest_size=16).hexdigest(), content


class FeatureStore:
    """Tensors by key; ``identity`` (JSON-able) is what they all depend on. Reading never raises; writing raises OSError, and what could not
    be written is still given out until then."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]):
        self.identity = digest_of(identity)
        self.about = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / self.identity
        self._files: dict[str, dict[str, int]] = {}  # file name -> {key: CRC-32}
        self._where: dict[str, str] = {}  # key -> file name
        self._open: dict[str, Any] = {}
        self._verified: set[str] = set()
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._where.keys() | self._waiting.keys())

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._where

    def refresh(self) -> None:
        """See what others have written since."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".safetensors"))
        except OSError:
            return
        for name in names:
            if name not in self._files:
                try:
                    checksum, header = read_header(self.folder / name)
                    if name != f"{checksum}.safetensors":
                        raise ValueError("its header is not what was written")
                    self._files[name] = json.loads(header["__metadata__"]["crc32"])
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
                if name not in self._open:
                    self._open[name] = safe_open(self.folder / name, "pt")
                tensor = self._open[name].get_tensor(key)
                if key not in self._verified and crc(tensor) != self._files[name][key]:
                    raise ValueError("a tensor is not what was written")
                self._verified.add(key)
                return tensor
            except (OSError, SafetensorError, ValueError) as error:
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
            save_file(waiting, draft, metadata={"crc32": json.dumps(sums), "identity": self.about})
            name = f"{read_header(draft)[0]}.safetensors"
            os.replace(draft, self.folder / name)
        except SafetensorError as error:  # how safetensors says that the disk is full or the folder read-only
            raise OSError(str(error)) from None
        finally:
            draft.unlink(missing_ok=True)
        self._files[name] = sums
        self._where |= dict.fromkeys(sums, name)

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
        self._open.pop(name, None)
        for key in lost:
            self._verified.discard(key)
            if self._where.get(key) == name:
                other = next((file for file, sums in self._files.items() if key in sums), None)
                self._where.pop(key) if other is None else self._where.update({key: other})
        warnings.warn(f"{path} is damaged ({error}): it is removed, and what it held is computed again", stacklevel=3)
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a read-only folder: it will be found damaged again
            self._files[name] = {}
