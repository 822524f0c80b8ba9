"""Lines of JSON over a pipe: cutting a byte stream into bounded lines, and encoding without ever failing on text."""

from __future__ import annotations

from typing import Any

import msgspec

from app.engine.protocol import MAX_LINE

CHUNK = 64 * 1024  # bytes read at once; a pipe on Linux holds as much

_encoder = msgspec.json.Encoder()


class LineTooLong(ValueError):
    """The other side sent more bytes without a line break than a line may have."""


class LineSplitter:
    """Cuts a byte stream into lines and never holds more than `limit` bytes and one chunk."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their line breaks; blank ones are left out.

        Raises:
            LineTooLong: when a line, complete or not, has more than `limit` bytes.
        """
        end = data.rfind(b"\n")
        if end < 0:
            if len(self._rest) + len(data) > self._limit:
                self._rest.clear()
                raise LineTooLong(f"a line of more than {self._limit:,} bytes")
            self._rest += data
            return []
        complete = bytes(self._rest) + data[:end] if self._rest else data[:end]
        self._rest = bytearray(data[end + 1 :])
        lines = [line for line in complete.split(b"\n") if line.strip()]
        if any(len(line) > self._limit for line in lines):
            raise LineTooLong(f"a line of more than {self._limit:,} bytes")
        return lines


def encode(message: msgspec.Struct) -> bytes:
    """One message as a line, with its line break. Lone surrogates, which JSON cannot carry, become U+FFFD."""
    try:
        return _encoder.encode(message) + b"\n"
    except UnicodeEncodeError:
        return _encoder.encode(_printable(msgspec.to_builtins(message))) + b"\n"


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value
