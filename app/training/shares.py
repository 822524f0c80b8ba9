"""How the batches of a step are shared out over processes. Plain Python: the same in each process, and no word passes between them.

A step's loss is a sum over its tokens, so that neither order nor grouping changes what is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Batch = tuple[tuple[int, ...], ...]
Group = list[Batch]  # the batches of one step


def deal(parts: Sequence[Batch], world: int, size: Callable[[Batch], float]) -> list[Batch]:
    """Parts cut until each process has as many as the others, as far as there are examples. None becomes larger.

    Short examples that packing puts into one row would else be one process's work, which the others repeat for nothing.

    Args:
        size: how much work a part is. The largest is cut first: between rows, and one row between the examples it holds.

    Returns:
        At least as many parts, the largest first, so that those of one turn are of like size. In one process, the same ones.
    """
    if world == 1:
        return list(parts)
    found = sorted(parts, key=size, reverse=True)
    while len(found) % world:
        at = next((at for at, part in enumerate(found) if sum(len(row) for row in part) > 1), None)
        if at is None:
            break
        found[at : at + 1] = _halves(found[at])
        found.sort(key=size, reverse=True)
    return found


def _halves(part: Batch) -> list[Batch]:
    """A part of several examples in two: every other row, or of one row every other example (both are sorted by length)."""
    if len(part) > 1:
        return [part[::2], part[1::2]]
    row = next(iter(part))
    return [(row[::2],), (row[1::2],)]


def share(batches: Sequence[Batch], accelerator: Any) -> tuple[list[tuple[Batch, float]], int]:
    """This process's batches, filled up with weightless repeats so that all take the same number; and how many processes."""
    if accelerator is None:
        return [(batch, 1.0) for batch in batches], 1
    world, rank = accelerator.num_processes, accelerator.process_index
    places = [turn * world + rank for turn in range(math.ceil(len(batches) / world))]
    return [(batches[place % len(batches)], float(place < len(batches))) for place in places], world


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """A batch in that many pieces of rows, as far as it has rows."""
    size = math.ceil(len(batch) / parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)]
