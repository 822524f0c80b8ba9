"""StopScanner: ends a stream of text before a stop string appears in it."""

from __future__ import annotations

from collections.abc import Iterable


class StopScanner:
    """Passes text on until a stop string begins, even one that arrives cut over several pieces.

    Text that may yet turn out to be the beginning of a stop string is held back, never more of it than
    the longest stop string is long.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(s for s in strings if s)
        self._held = ""
        self.matched = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece.

        Returns:
            The text that is safe to show, and whether a stop string was found. After that nothing more comes out.
        """
        if self.matched:
            return "", True
        if not self._strings:
            return text, False
        text = self._held + text
        found = [(at, s) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            # The earliest match ends the text; of two that begin at one place the longer is the one named.
            at, self.matched = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[:at], True
        keep = self._unfinished(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the stream ends without the stop string."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(len(s) for s in self._strings) - 1)
        for size in range(longest, 0, -1):
            end = text[-size:]
            if any(s.startswith(end) for s in self._strings):
                return size
        return 0
