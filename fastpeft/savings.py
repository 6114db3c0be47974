"""Switches of the savings, for comparisons and for finding faults: ``with fastpeft.without("remake"): ...``.

None changes a number beyond rounding; ``TrainConfig(without="remake,labelled")`` switches them off for a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SAVINGS = {
    "remake": "what a norm, an activation or a factor returns is recomputed in backward, not kept for the linear layer after it",
    "labelled": "the last layer computes outputs at labelled positions only, or at the one row of each sample that a head reads; "
    "of an image encoder no layer above the one that is read is computed",
    "absorb": "few questions about many image tokens attend to the tokens themselves, without keys and values",
}
_off: set[str] = set()
_forced: dict[str, bool] = {}


def on(saving: str) -> bool:
    """Whether a saving is switched on."""
    assert saving in SAVINGS, saving
    return saving not in _off


def forced(saving: str) -> bool | None:
    """Whether to use a saving wherever it is exact (True) or nowhere (False); None: where it pays."""
    assert saving in SAVINGS, saving
    return _forced.get(saving)


def state() -> tuple:
    """What is switched off and what is forced, now."""
    return tuple(sorted(_off)), tuple(sorted(_forced.items()))


@contextmanager
def force(saving: str, use: bool) -> Iterator[None]:
    """Inside, a saving that is chosen by its cost ("absorb") is used wherever it is exact, or nowhere."""
    assert saving in SAVINGS, saving
    before = _forced.get(saving)
    _forced[saving] = use
    try:
        yield
    finally:
        if before is None:
            del _forced[saving]
        else:
            _forced[saving] = before


@contextmanager
def without(*savings: str) -> Iterator[None]:
    """Inside, these savings are off: "remake", "labelled", "absorb". Forward and backward both belong inside. ValueError for others."""
    if unknown := sorted(set(savings) - SAVINGS.keys()):
        raise ValueError(f"no saving is called {', '.join(unknown)}; there are {', '.join(SAVINGS)}")
    before = set(_off)
    _off.update(savings)
    try:
        yield
    finally:
        _off.clear()
        _off.update(before)
