"""The largest batch that a memory holds, found by few estimates."""

from __future__ import annotations

from collections.abc import Callable


def largest(peak: Callable[[int], float], batch: int, known: int, room: int) -> int:
    """The largest batch whose peak is within ``room``: by doubling and bisection on estimates; 0 where not even one sample is."""
    peaks = {batch: known}

    def fits(n: int) -> bool:
        if n not in peaks:
            peaks[n] = peak(n)
        return peaks[n] <= room

    other = 2 * batch if batch == 1 else max(1, batch // 2)
    fits(other)
    slope = max(1.0, (peaks[batch] - peaks[other]) / (batch - other))
    guess = max(1, min(1 << 20, int(batch + (room - peaks[batch]) / slope)))  # a peak is close to affine in the batch
    low, high = (guess, None) if fits(guess) else (0, guess)
    step = max(1, guess // 64)
    while high is None or low == 0:
        at = low + step if high is None else max(0, high - step)
        if at == 0:
            break
        low, high = (at, high) if fits(at) else (low, at)
        step *= 2
    while high is not None and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
