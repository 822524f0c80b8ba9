"""Work on long lists in pieces: a repository may hold a hundred thousand files, and the window has other things to do in between.

Such work is a generator that yields after every few thousand items and returns what it found; of short lists it never yields.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

PIECE = 2000  # items: some milliseconds
T = TypeVar("T")
Pieces = Generator[None, None, T]


def whole(work: Pieces[T]) -> T:
    """Do all of it now."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def ordered(items: Sequence[T], key: Callable[[T], object]) -> Pieces[list[T]]:
    """Sort, stably. What is sorted at once, and so holds up every thread, is never more than a piece."""
    runs: list[list[tuple[object, int, T]]] = []
    for start in range(0, len(items), PIECE):
        if start:
            yield
        piece = items[start : start + PIECE]
        runs.append(sorted((key(item), start + number, item) for number, item in enumerate(piece)))  # type: ignore[type-var]
    if len(runs) == 1:
        return [item for _, _, item in runs[0]]
    made: list[T] = []
    for _, _, item in heapq.merge(*runs):
        if not len(made) % PIECE:
            yield
        made.append(item)
    return made
