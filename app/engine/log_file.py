"""An engine's log: what it writes to stderr, kept bounded on disk, its last lines at hand for a crash report."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import BinaryIO

LIMIT = 5 * 1024 * 1024  # bytes on disk, both generations together
_TAIL = 16 * 1024  # bytes remembered


class LogFile:
    """Appends to `path`; when it is half of `limit` it becomes `<path>.1` and a new one begins.

    A log that cannot be written (disk full, read-only) never disturbs the engine: `problem` then says why,
    and the last lines are still remembered.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path = path
        self.problem = ""
        self._half = limit // 2
        self._tail = bytearray()
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._size = 0
        self._open()

    def write(self, data: bytes) -> None:
        """Append bytes as they came from the engine."""
        with self._lock:
            self._tail += data[-_TAIL:]
            del self._tail[:-_TAIL]
            if self._file is None:
                return
            try:
                if self._size + len(data) > self._half and self._size:
                    self._file.close()
                    self._file = None
                    self.path.replace(self.path.with_name(self.path.name + ".1"))
                    self._open()
                if self._file is not None:
                    self._file.write(data)
                    self._size += len(data)
            except OSError as error:
                self._give_up(error)

    def note(self, text: str) -> None:
        """Append a line of ours, with the time; not part of what `tail` remembers."""
        line = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode()
        with self._lock:
            tail = bytes(self._tail)
        self.write(line)
        with self._lock:
            self._tail = bytearray(tail)

    def tail(self, lines: int = 40) -> str:
        """The last lines that the engine wrote."""
        with self._lock:
            text = self._tail.decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """Close the file; `tail` still works."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._size = self._file.tell()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.problem = f"The log {self.path} cannot be written: {error.strerror}."
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
