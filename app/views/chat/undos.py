"""Deletions that Ctrl+Z takes back, the last one first."""

from __future__ import annotations

from collections.abc import Callable

KEPT = 20


class Undos:
    """Each deletion with what was typed when it was made: what is typed afterwards is undone first."""

    def __init__(self) -> None:
        self._entries: list[tuple[Callable[[], None], str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, undo: Callable[[], None], typed: str) -> Callable[[], None]:
        """Remember a deletion. Returns what takes it back, at most once whether here or from elsewhere."""

        def once() -> None:
            self._entries[:] = [entry for entry in self._entries if entry[0] is not once]
            undo()

        self._entries.append((once, typed))
        del self._entries[:-KEPT]
        return once

    def undo(self) -> None:
        """Take back the last deletion."""
        if self._entries:
            self._entries[-1][0]()

    def typed_since(self, typed: str) -> bool:
        """Whether this is not what was typed when the last deletion was made."""
        return bool(self._entries) and typed != self._entries[-1][1]
