"""How much of a prompt an engine has already read."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share.

    Compares slices (at C speed) and halves the stretch in which the first difference lies, so that it costs
    microseconds, not milliseconds, for tens of thousands of tokens.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
