"""A function on several ranks at once: forks of this process, joined by gloo, as torchrun's are."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(world: int, work: Callable[[int], Any], folder: Path) -> list[int]:
    """Fork ``world`` ranks that run ``work(rank)``; their process ids. What it returns, or raises, is in ``folder`` at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            gc.freeze()  # a collection would copy what the processes share
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                found = work(rank)
            except BaseException as error:
                found = (type(error).__name__, str(error), getattr(error, "exit_status", None), traceback.format_exc())
            (folder / f"{rank}.part").write_bytes(pickle.dumps(found))
            os.replace(folder / f"{rank}.part", folder / str(rank))
            os._exit(0)
        pids.append(pid)
    return pids


def finish(pids: list[int], folder: Path, within: float = 60) -> list[Any]:
    """What each rank returned, or (type, message, exit status, traceback) of its error; None of one that was killed. TimeoutError where
    one is left."""
    end, left = time.monotonic() + within, set(pids)
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if left and time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"{len(left)} of {len(pids)} ranks did not end within {within:g} s")
        time.sleep(0.005)
    return [pickle.loads(path.read_bytes()) if (path := folder / str(rank)).exists() else None for rank in range(len(pids))]


def run(world: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)`` returns on each rank. AssertionError with the traceback of one that raises."""
    found = finish(start(world, work, folder), folder)
    for rank, value in enumerate(found):
        assert not (isinstance(value, tuple) and len(value) == 4 and "Traceback" in str(value[3])), f"rank {rank}: {value[3]}"
    return found
