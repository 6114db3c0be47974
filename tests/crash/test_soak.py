"""A long run: memory, files, handles and threads stay flat. An hour, or FASTPEFT_SOAK_MINUTES."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest

MINUTES = float(os.environ.get("FASTPEFT_SOAK_MINUTES", 60))


class Enough(Exception):
    pass


def held() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), "handles": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_an_hour(runs, phantoms, tmp_path):
    out, began, seen = tmp_path / "run", time.monotonic(), []
    options = {"save_every": 10, "num_workers": 1, "feature_cache": False, "async_save": True, "gradient_accumulation": 2}
    trainer = runs.trainer(phantoms, small=runs.DROPOUT, out=out, steps=10**6, **options)
    step = trainer._step

    def timed(*group):
        if trainer.done["step"] % 50 == 49:
            seen.append(held() | {"files": sum(1 for path in out.rglob("*") if path.is_file())})
            if time.monotonic() - began > 60 * MINUTES and len(seen) > 4:
                raise Enough
        return step(*group)

    trainer._step = timed
    with pytest.raises(Enough):
        trainer.fit()
    first, last = seen[1], seen[-1]  # the first fills caches
    print(f"{50 * len(seen)} steps in {MINUTES:g} minutes, after 100: {first}, at the end: {last}")
    assert last["bytes"] - first["bytes"] < 64 << 20 and abs(last["handles"] - first["handles"]) <= 4  # a worker's pipes come and go
    assert abs(last["threads"] - first["threads"]) <= 2 and abs(last["files"] - first["files"]) <= 8, (first, last)
