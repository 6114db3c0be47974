"""Progress: a bar on a terminal and in a notebook; in a file or a pipe a line now and then, without carriage returns."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

EVERY = 15.0  # seconds between lines


class Lines(tqdm):
    """tqdm's own words, a line each."""

    @staticmethod
    def status_printer(file) -> Callable[[str], None]:
        def line(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return line


def progress_bar(*args, **options) -> tqdm:
    """``tqdm(*args, **options)`` for where stderr goes. A terminal's bar vanishes where ``leave=False`` says so; lines stay."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(*args, **options)
    shape = "{desc}: {n_fmt}/{total_fmt} {unit} in {elapsed}, {remaining} left{postfix}"
    return Lines(*args, **options | {"leave": True, "mininterval": EVERY, "maxinterval": EVERY, "bar_format": shape})
