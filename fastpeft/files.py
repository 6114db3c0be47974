"""Files and folders that appear whole or not at all, whoever is killed while writing them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, making the folder where absent; half a surrogate pair, which no UTF-8 holds, becomes "?"."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(text.encode("utf-8", "replace"))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_tensors(tensors: dict[str, Any], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Contiguous CPU tensors as a safetensors file. OSError, as of any file, where the disk is full or the folder read-only."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling to write in, which becomes ``folder`` on success and vanishes on failure; what stood there is replaced.

    Two renames replace a folder: a process killed between them leaves it under another name, and :func:`recover_folder` finds it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-new-", dir=folder.parent))
    draft.chmod(0o755)
    old = None
    try:
        yield draft
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent)) / "old"
            os.replace(folder, old)
        os.replace(draft, folder)
    except BaseException:
        if old is not None and old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


def recover_folder(folder: str | Path) -> None:
    """Clear up after a process that was killed in :func:`atomic_folder`: put the folder back where it was being replaced, and remove
    unfinished drafts. Not for a folder that another process is writing."""
    folder = Path(folder)
    for left in folder.parent.glob(f".{folder.name}-old-*/old"):
        if not folder.exists():
            os.replace(left, folder)
    for kind in ("new", "old"):
        for left in folder.parent.glob(f".{folder.name}-{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)
