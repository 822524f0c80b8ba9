"""How tall messages are, and so where each one stands: measured where a message was laid out, guessed where it never was."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence


class Heights:
    """Of messages one below the other, in pixels, by their place in the list.

    Args:
        gap: between two of them.

    Attributes:
        tops: where each begins, as of the last `stack`.
    """

    def __init__(self, gap: int) -> None:
        self._gap = gap
        self._ids: list[int] = []
        self._heights: list[int] = []
        self._measured: list[bool] = []
        self.tops: list[int] = []

    def __getitem__(self, index: int) -> int:
        return self._heights[index]

    def replace(self, ids: Sequence[int], guess: Callable[[int], int]) -> None:
        """Other messages: what is known of one by its id stays known; `guess` tells the height at an index otherwise."""
        old = {id: (h, m) for id, h, m in zip(self._ids, self._heights, self._measured, strict=True)}
        known = [old.get(id) for id in ids]
        self._ids = list(ids)
        self._heights = [k[0] if k else guess(index) for index, k in enumerate(known)]
        self._measured = [bool(k and k[1]) for k in known]

    def is_measured(self, index: int) -> bool:
        """Whether the height is that of the message as it now is."""
        return self._measured[index]

    def forget(self, index: int) -> None:
        """The message changed: its height holds until it is measured again."""
        self._measured[index] = False

    def forget_all(self) -> None:
        """All are laid out anew."""
        self._measured = [False] * len(self._heights)

    def set(self, index: int, height: int) -> bool:
        """A message was measured. Returns whether it has another height than before."""
        changed = self._heights[index] != height
        self._heights[index], self._measured[index] = height, True
        return changed

    def stack(self, top: int) -> int:
        """Stand them one below the other, the first at `top`. Returns where the gap below the last ends."""
        self.tops = []
        for height in self._heights:
            self.tops.append(top)
            top += height + self._gap
        return top

    def at(self, y: int) -> int:
        """Index of the message that stands there, or of the first."""
        return max(0, bisect.bisect_right(self.tops, y) - 1)

    def between(self, start: int, end: int) -> tuple[int, int]:
        """Indexes of the first and the last message that stand there; (0, -1) when there is none at all."""
        if not self._heights:
            return 0, -1
        first = self.at(start)
        last = max(first, bisect.bisect_left(self.tops, end) - 1)
        return first, min(last, len(self._heights) - 1)
