"""Utf8Stream: bytes that arrive in pieces become text, a character at a time."""

from __future__ import annotations

import codecs


class Utf8Stream:
    """Decodes UTF-8 that is cut anywhere. Bytes that can never be a character become U+FFFD, at once."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The text that is certain so far; an unfinished character waits for its rest."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or ""."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
