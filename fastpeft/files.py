"""Atomic writes: files and folders that appear whole or not at all, whoever is killed while writing them. And locks on folders."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

ASIDE = "aside"  # in a folder that is being removed: what stood at atomic_folder's ``aside``
SETTLED = 10  # seconds after which an unfinished folder that no process holds is one of a killed process


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, making the folder where absent; half a surrogate pair, which no UTF-8 holds, becomes "?"."""
    with atomic_file(path) as draft, open_new(draft) as file:
        file.write(text.encode("utf-8", "replace"))


def open_new(path: str | Path) -> IO[bytes]:
    """A file that is not there yet, to write to. OSError where anything stands there, a link that somebody planted among them."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666), "wb")


def open_append(path: str | Path) -> IO[str]:
    """A text file to add lines to, made where absent. OSError where a link stands there: it may lead out of the folder."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK, 0o666), "a", encoding="utf-8")


_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_tensors(tensors: dict[str, Any], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Contiguous CPU tensors as a safetensors file. OSError, as of any file, where the disk is full or the folder read-only."""
    path = Path(path)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=metadata)
        if metadata is not None and len(metadata) > 1:
            _sort_metadata(path)
        path.chmod(mode)  # safetensors lets none but its owner read a file, whatever the umask
    except SafetensorError as error:
        raise OSError(f"{_whole(path)} cannot be written: {error}") from None


def _sort_metadata(path: Path) -> None:
    """Metadata of a safetensors file by name: safetensors writes it in any order, and the same tensors are to be the same bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # always, unless a later safetensors writes its header shorter than JSON needs
            file.seek(8)
            file.write(text.ljust(length))


def sha256(path: str | Path) -> str:
    """Digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_digest(tensors: dict[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of contiguous CPU tensors, in hexadecimal; their order does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file at, which takes its name on success and vanishes on failure; a file there is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _beside(path, "new")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    folder: str | Path,
    *,
    keep: Callable[[str], bool] | None = None,
    replace: bool = True,
    durable: bool = True,
    aside: str | Path | None = None,
) -> Iterator[Path]:
    """A new folder beside ``folder`` to write in, which takes its name on success and vanishes on failure; what stood there is replaced.

    keep: by name, which entries of the replaced folder the new one keeps where it has none of that name (None: no entry).
    replace: False raises OSError where anything but an empty folder stands there by then.
    durable: reach the disk before the rename, so that power may fail; not for what can be made again.
    aside: a name beside ``folder`` that the replaced folder keeps, in place of what stands there; None: it is removed.

    On Linux a folder is replaced in one step, so that a whole one stands at any moment. Elsewhere two renames replace it: a process killed
    between them leaves it under another name, and the next writer, reader (:func:`is_folder`) or :func:`recover_folder` puts it back.
    What killed processes left unfinished is removed by the next writer.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    _clear_abandoned(folder)
    draft, old = _beside(folder, "new"), _beside(folder, "old")
    draft.mkdir()  # with the permissions that the umask leaves
    moved = None
    try:
        with locked(draft):
            yield draft
        _finish(folder, draft, keep, durable)
        if replace and folder.exists():
            old.mkdir()
            if aside is not None and os.path.lexists(aside):
                os.replace(aside, old / ASIDE)
            if not _exchange(draft, folder):
                os.replace(folder, old / folder.name if aside is None else aside)
                moved = aside
                os.replace(draft, folder)
            elif aside is not None:
                os.replace(draft, aside)
        else:
            os.replace(draft, folder)
        if durable:
            sync(folder.parent)
    except BaseException:
        if moved is not None and not folder.exists():
            os.replace(moved, folder)
        _put_back(folder)
        raise
    finally:
        for left in (draft, old):
            shutil.rmtree(left, ignore_errors=True)


def _finish(folder: Path, draft: Path, keep: Callable[[str], bool] | None, durable: bool) -> None:
    """A draft as it is to stand: permissions, entries that are kept, on the disk."""
    mode = stat.S_IMODE(draft.stat().st_mode) & 0o666
    for file in (path for path in draft.rglob("*") if path.is_file() and not path.is_symlink()):
        file.chmod(stat.S_IMODE(file.stat().st_mode) | mode)  # as in save_tensors, for what transformers wrote
    if keep is not None and folder.is_dir():
        _keep_entries(folder, draft, keep)
    if durable:
        for path in [*draft.rglob("*"), draft]:
            sync(path)


def _exchange(draft: Path, folder: Path) -> bool:
    """Give two folders each other's names, in one step. False, with nothing changed, where the system or the file system cannot."""
    if not sys.platform.startswith("linux") or folder.is_symlink():  # a link is replaced, not what it leads to
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(-100, os.fsencode(draft), -100, os.fsencode(folder), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE


def is_folder(path: str | Path) -> bool:
    """Whether a folder stands there, put back where a writer was killed while replacing it."""
    path = Path(path)
    if not path.exists():
        _put_back(path)
    return path.is_dir()


def recover_folder(folder: str | Path) -> None:
    """Clear up after a process that was killed in :func:`atomic_folder`: put the folder back where it was being replaced, and remove
    unfinished drafts. Not for a folder that another process is writing."""
    folder = Path(folder)
    _put_back(folder)
    for kind in ("new", "old"):
        for left in folder.parent.glob(f".{escape(folder.name)}-{kind}-*"):
            shutil.rmtree(left, ignore_errors=True)


def clear_drafts(folder: Path) -> None:
    """Remove unfinished files of processes that were killed in :func:`atomic_file`. Not for a folder that another process writes in."""
    for left in folder.glob(".*-new-*"):
        if left.is_file() and re.fullmatch(r"\..+-new-[0-9a-f]{8}", left.name):
            left.unlink(missing_ok=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}-{kind}-{uuid.uuid4().hex[:8]}")


def _whole(path: Path) -> Path:
    """What a file in a draft is called once that is whole: a message names what its reader asked for."""
    return Path(*(found[1] if (found := re.fullmatch(r"\.(.+)-new-[0-9a-f]{8}", name)) else name for name in path.parts))


def _clear_abandoned(folder: Path) -> None:
    """Remove drafts of the folder that killed processes left: whoever writes one holds its lock."""
    for draft in folder.parent.glob(f".{escape(folder.name)}-new-*"):
        with suppress(OSError, ValueError):
            if draft.is_dir() and time.time() - draft.stat().st_mtime > SETTLED:
                with locked(draft, sure=True):
                    shutil.rmtree(draft, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Give a folder that was moved aside, and not replaced, its name again."""
    for left in folder.parent.glob(f".{escape(folder.name)}-old-*/*"):
        if left.name != ASIDE and not folder.exists():
            os.replace(left, folder)


def _keep_entries(folder: Path, draft: Path, keep: Callable[[str], bool]) -> None:
    for entry in folder.iterdir():
        if keep(entry.name) and not os.path.lexists(draft / entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, draft / entry.name, symlinks=True, copy_function=_link)
            else:
                _link(entry, draft / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under another name, whatever its size; a copy where the file system has no such names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Not every system can do the latter."""
    if os.name == "nt" or path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(number)


@contextmanager
def locked(folder: str | Path | None, *, what: str = "process", wait: bool = False, sure: bool = False) -> Iterator[None]:
    """The folder is this process's alone inside, and free when the process ends, however it ends. Where another process has it,
    ValueError that names the ``what`` running there, or (``wait``) a wait until it ends. Nothing is locked for None, and where the
    system or the file system has no such locks, unless (``sure``) that is an OSError."""
    try:
        import fcntl
    except ImportError:
        fcntl = None
    if folder is None or fcntl is None:
        if sure:
            raise OSError("no locks here")
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"another {what}{_holder(number)} is running in {folder}: wait for it, or choose another --out") from None
        except OSError:
            if sure:
                raise
        _held.add(number)
        yield
    finally:
        _held.discard(number)
        os.close(number)


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child, such as a data worker: the lock is its parent's, and ends with it."""
    for number in _held:
        os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _holder(number: int) -> str:
    """Which process holds the lock, where Linux says so."""
    wanted = os.fstat(number).st_ino
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and int(words[5].split(":")[2]) == wanted:
                return f" (pid {words[4]})"
    return ""
