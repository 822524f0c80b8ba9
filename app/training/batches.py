"""Which examples are learnt together: the split, and the order of an epoch. Plain Python, a pure function of its arguments.

A step is the examples that one update of the weights sees; packing never changes which these are. So a packed run learns
what an unpacked one learns, only faster.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

from app.training.data_config import DataConfig
from app.training.encode import Encoded

Pack = tuple[int, ...]  # examples that share one row of a batch
Batch = tuple[Pack, ...]  # rows that are computed at once
Step = tuple[Batch, ...]  # batches of one update

_WINDOW = 50  # batches among which examples are sorted by length when they are padded


def split(data: Encoded, config: DataConfig) -> tuple[list[int], list[int]]:
    """Indices of the examples (or pairs) to train on, and of those held out.

    Equal rows are always on one side. With held-out files, these are the held-out side. At least one example stays for
    training; at least one is held out where a share is asked for and there are two different ones.
    """
    items = data.pairs or data.examples
    if config.held_out_files:
        held = [n for n, item in enumerate(items) if item.held]
        known = {items[n].group for n in held}
        train = [n for n, item in enumerate(items) if not item.held and item.group not in known]
        return train, held
    groups: dict[bytes, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.group, []).append(number)
    order = list(groups.values())
    random.Random(f"split {config.seed}").shuffle(order)
    wanted = round(len(items) * config.held_out)
    if config.held_out > 0:
        wanted = max(1, wanted)
    held = []
    while order[1:] and len(held) < wanted:
        held += order.pop()
    return sorted(n for group in order for n in group), sorted(held)


def plan_epoch(
    lengths: Sequence[int], config: DataConfig, *, epoch: int, rows: int, accumulation: int = 1, packing: bool
) -> list[Step]:
    """The steps of one epoch.

    Args:
        lengths: tokens of each example. rows: examples that are computed at once when they are not packed; packed, rows of
            `config.max_length` tokens that are computed at once. accumulation: `rows * accumulation` examples make a step.

    Returns:
        Steps, each with every example of its own once. The same for the same arguments, on every machine.
    """
    rng = random.Random(f"epoch {config.seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    size = rows * accumulation
    if not packing or config.packing == "off":
        return _padded(order, lengths, rows, size, rng)
    steps: list[Step] = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        if config.packing == "sequential":
            packs = _next_fit(chosen, lengths, config.max_length)
        else:
            packs = _best_fit(chosen, lengths, config.max_length)
        packs.sort(key=lambda pack: -sum(lengths[n] for n in pack))  # rows of like length together: little padding
        steps.append(tuple(tuple(packs[at : at + rows]) for at in range(0, len(packs), rows)))
    return steps


def _padded(order: list[int], lengths: Sequence[int], rows: int, size: int, rng: random.Random) -> list[Step]:
    """Batches of examples of like length, in random order."""
    batches: list[Batch] = []
    last: list[Batch] = []
    window = rows * _WINDOW
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda n: -lengths[n])
        made = [tuple((n,) for n in near[at : at + rows]) for at in range(0, len(near), rows)]
        if made and len(made[-1]) < rows:
            last.append(made.pop())  # the incomplete one stays at the end
        batches += made
    rng.shuffle(batches)
    batches += last
    many = max(1, size // rows)
    return [tuple(batches[at : at + many]) for at in range(0, len(batches), many)]


def _next_fit(order: Sequence[int], lengths: Sequence[int], room: int) -> list[Pack]:
    packs: list[list[int]] = []
    left = 0
    for number in order:
        if lengths[number] > left or not packs:
            packs.append([])
            left = room
        packs[-1].append(number)
        left -= lengths[number]
    return [tuple(pack) for pack in packs]


def _best_fit(order: Sequence[int], lengths: Sequence[int], room: int) -> list[Pack]:
    """Best-fit decreasing: the longest first, each into the fullest pack that still has room."""
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    for number in sorted(order, key=lambda n: -lengths[n]):
        length = lengths[number]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            packs.append([number])
            pack, left = len(packs) - 1, room - length
        else:
            found = rooms[at]
            pack = by_room[found].pop()
            if not by_room[found]:
                del by_room[found], rooms[at]
            packs[pack].append(number)
            left = found - length
        if left > 0:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(pack)
    return [tuple(pack) for pack in packs]


def longest_batch(steps: Sequence[Step], lengths: Sequence[int]) -> Batch:
    """The batch that takes the most memory: rows times the longest row."""
    return max((batch for step in steps for batch in step), key=lambda batch: tokens_of(batch, lengths))


def tokens_of(batch: Batch, lengths: Sequence[int]) -> int:
    """Tokens of a batch as it is computed, padding included."""
    return len(batch) * max(sum(lengths[n] for n in pack) for pack in batch)
