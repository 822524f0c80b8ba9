"""Speeds: smoothed for people, and a limit shared fairly among several downloads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

SMOOTH = 4.0  # seconds; older speed counts for less than a third
STALE = 3.0  # seconds without a byte, then nothing is said of the time left


class Speed:
    """Bytes a second, smoothed, from counts that come at any pace."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = 0.0
        self._count = -1
        self._moved = 0.0
        self._began = 0.0
        self.now = 0.0

    def add(self, count: int) -> None:
        """`count` bytes have come in all."""
        now = self._clock()
        if self._count < 0 or count < self._count:
            self._at, self._count, self._moved = now, count, now
            return
        passed = now - self._at
        if passed < 0.2:
            return
        fresh = (count - self._count) / passed
        if self.now == 0:
            self._began = self._at
        # The mean of all at first: else a beginning that is faster than the rest is promised for long.
        share = max(1 - math.exp(-passed / SMOOTH), passed / (now - self._began))
        self.now += share * (fresh - self.now)
        if count > self._count:
            self._moved = now
        elif now - self._moved > STALE * 4:
            self.now = 0.0
        self._at, self._count = now, count

    def left(self, remaining: int) -> float | None:
        """Seconds for so many bytes; None while unknown."""
        if self.now < 1 or remaining <= 0 or self._clock() - self._moved > STALE:
            return None
        return remaining / self.now


def shares(limit: float, speeds: Sequence[float]) -> list[float]:
    """How to divide a limit: what a slow download does not use is given to the others.

    Args:
        limit: bytes a second for all, 0 unlimited. speeds: of each, measured lately; 0 for one that has just begun.
    """
    if not limit or not speeds:
        return [0.0] * len(speeds)
    fair = limit / len(speeds)
    # One that stays well below its share is held back by its server: it keeps a quarter more than it uses.
    wanted = [speed * 1.25 if 0 < speed < 0.75 * fair else math.inf for speed in speeds]
    result = [0.0] * len(speeds)
    rest, open_places = limit, sorted(range(len(speeds)), key=lambda place: wanted[place])
    for done, place in enumerate(open_places):
        result[place] = max(1024.0, min(wanted[place], rest / (len(open_places) - done)))
        rest = max(0.0, rest - result[place])
    return result
