"""A disk that fails: counts a process's file operations below a folder, and at one of them kills it, tears a file, cuts the power, is full,
or lets a signal come. For a process that was forked for it: what it patches stays patched.

Power: what a file held at its last fsync survives; of what was written since, anything may be there. Names change in order, as in a
journal: all up to a folder's last fsync survive, and of the later ones the first few.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import signal
from pathlib import Path

MODES = ("kill", "torn", "power", "full", "signal")
ENDED = 86  # exit status of a process that a Disk ended


class Names:
    """A folder's names: path -> number of a file, or None of a folder. Operations as :class:`Disk` notes them."""

    def __init__(self, names: dict[str, int | None]):
        self.at = dict(names)

    def below(self, path: str) -> list[str]:
        return [name for name in self.at if name == path or name.startswith(path + "/")]

    def apply(self, kind: str, *args) -> None:
        if kind in ("create", "mkdir"):
            self.at[args[0]] = args[1] if kind == "create" else None
        elif kind == "remove":
            for name in self.below(args[0]):
                del self.at[name]
        elif kind == "link":
            self.at[args[1]] = self.at.get(args[0])
        elif kind == "rename":
            moved = {args[1] + name[len(args[0]) :]: self.at.pop(name) for name in self.below(args[0])}
            for name in self.below(args[1]):
                del self.at[name]
            self.at |= moved
        elif kind == "exchange":
            a, b = args
            swapped = {b + name[len(a) :]: self.at.pop(name) for name in self.below(a)}
            self.at |= {a + name[len(b) :]: self.at.pop(name) for name in self.below(b)} | swapped


class Disk:
    """Watches ``root``. ``install()`` in the process that is to fail at its operation ``at`` (from 1; 0: never) by ``mode``; ``seed`` draws
    what a power cut leaves."""

    def __init__(self, root: Path, mode: str = "kill", at: int = 0, seed: int = 0):
        self.root, self.mode, self.target, self.count, self.seed = root.resolve(), mode, at, 0, seed
        self.tear: Path | None = None  # the file that was opened for writing last
        self.log: list[tuple] = []
        self.committed, self.quiet, self.owner = 0, False, 0
        self.contents: dict[int, bytes] = {}  # at its last fsync
        self.gone: dict[int, bytes] = {}  # of a file that has no name any more
        names: dict[str, int | None] = {}
        for number, path in enumerate(sorted(self.root.rglob("*"))):
            names[str(path.relative_to(self.root))] = number if path.is_file() else None
            if path.is_file():
                self.contents[number] = path.read_bytes()
        self.next, self.start, self.now = len(names), dict(names), Names(names)

    # what is patched ----------------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        import torch

        import fastpeft.files
        from fastpeft.train import state

        self.owner = os.getpid()
        real = {name: getattr(os, name) for name in ("open", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "fsync")}
        self.real_open = builtins.open

        def opened(file, mode="r", *args, **kwargs):
            if isinstance(file, str | bytes | os.PathLike) and set(mode) & set("wax+"):
                self.write(file)
            return self.real_open(file, mode, *args, **kwargs)

        def os_open(path, flags, *args, **kwargs):
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and kwargs.get("dir_fd") is None:
                self.write(path)
            return real["open"](path, flags, *args, **kwargs)

        def patched(name: str, kind: str, paths: int):
            def call(*args, **kwargs):
                where = [self.inside(path, kwargs.get("dir_fd")) for path in args[:paths]]
                if self.quiet or None in where:
                    return real[name](*args, **kwargs)
                return self.change(kind, where, lambda: real[name](*args, **kwargs))

            return call

        def fsync(number):
            held = os.readlink(f"/proc/self/fd/{number}")
            path = "." if held == str(self.root) else self.inside(held)
            if path is None or self.quiet:
                return real["fsync"](number)
            self.operation("fsync", path, may_fail=True)
            real["fsync"](number)
            if (self.root / path).is_dir():
                self.committed = len(self.log)
                return
            if path not in self.now.at:  # of a writer outside Python, such as tokenizers'
                self.create(path)
            self.contents[self.now.at[path]] = self.read(path)

        exchange = fastpeft.files._exchange

        def exchanged(draft, folder):
            where = [self.inside(draft), self.inside(folder)]
            return self.change("exchange", where, lambda: exchange(draft, folder)) if None not in where else exchange(draft, folder)

        def saved(function, at: int):
            def call(*args, **kwargs):
                if isinstance(args[at], str | os.PathLike):
                    self.write(args[at])
                return function(*args, **kwargs)

            return call

        builtins.open = io.open = opened
        os.open, os.fsync = os_open, fsync
        os.replace, os.rename = patched("replace", "rename", 2), patched("rename", "rename", 2)
        os.unlink, os.remove, os.rmdir = (patched(name, "remove", 1) for name in ("unlink", "remove", "rmdir"))
        os.mkdir, os.link = patched("mkdir", "mkdir", 1), patched("link", "link", 2)
        fastpeft.files._exchange = exchanged
        fastpeft.files.save_file = saved(fastpeft.files.save_file, 1)
        state.torch.save = torch.save = saved(torch.save, 1)

    # operations ---------------------------------------------------------------------------------------------------------------------

    def inside(self, path, dir_fd: int | None = None) -> str | None:
        """The path below the root; None for any other, and in a data worker."""
        if os.getpid() != self.owner or isinstance(path, int):
            return None
        path = os.fsdecode(path)
        base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        path = os.path.normpath(os.path.join(base, path))
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return os.path.relpath(path, self.root) if path.startswith(f"{self.root}/") else None

    def write(self, path) -> None:
        """A file is opened to be written."""
        if self.quiet or (name := self.inside(path)) is None:
            return
        self.operation("write", name, may_fail=True)
        self.tear = self.root / name
        if name not in self.now.at:
            self.create(name)

    def create(self, name: str) -> None:
        self.note("create", name, self.next)
        self.next += 1

    def change(self, kind: str, where: list[str], do):
        self.operation(kind, where[0], may_fail=kind != "remove")
        lost = where[-1] if kind in ("rename", "remove") else None
        dying = {file: self.read(name) for name in self.now.below(lost) if (file := self.now.at[name]) is not None} if lost else {}
        done = do()
        if done is not False:
            self.gone |= dying
            self.note(kind, *where)
        return done

    def note(self, *operation) -> None:
        self.log.append(operation)
        self.now.apply(*operation)

    def read(self, name: str) -> bytes:
        self.quiet = True
        try:
            with self.real_open(self.root / name, "rb") as file:
                return file.read()
        except OSError:
            return b""
        finally:
            self.quiet = False

    def operation(self, kind: str, name: str, may_fail: bool) -> None:
        """One more; what comes of the one that is chosen."""
        self.count += 1
        if self.mode == "torn":
            if self.count == self.target + 1 and self.tear is not None and self.tear.is_file():
                os.truncate(self.tear, self.tear.stat().st_size // 2)
                os._exit(ENDED)
            if self.count == self.target + 1:
                os._exit(ENDED)
            self.tear = None
        elif self.count == self.target:
            if self.mode == "kill":
                os._exit(ENDED)
            elif self.mode == "power":
                self.cut_power()
            elif self.mode == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.mode == "full" and may_fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / name))

    def cut_power(self) -> None:
        """Leave the root as it may be after the power came back, and end."""
        draw = random.Random(self.seed)
        kept = Names(self.start)
        for operation in self.log[: draw.randint(self.committed, len(self.log))]:
            kept.apply(*operation)
        live = {file: self.read(name) for name, file in self.now.at.items() if file is not None}
        self.quiet = True
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for name, file in sorted(kept.at.items()):
            path = self.root / name
            if file is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            content = live.get(file, self.gone.get(file, b""))
            synced = self.contents.get(file)
            if synced and content.startswith(synced):  # added to since, such as a log
                tail = content[len(synced) :]
                content = synced + draw.choice([tail, tail[: len(tail) // 2], b"", b"\0" * len(tail)])
            elif content != synced:
                half = content[: len(content) // 2]
                content = draw.choice([content, half, b"", b"\0" * len(content), half + b"\0" * (len(content) - len(half)), synced or b""])
            path.write_bytes(content)
        os._exit(ENDED)
