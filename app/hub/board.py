"""The figures of a running download: each file's own, and where they come together for whoever is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from app.hub.files import DownloadNews, RemoteFile
from app.hub.progressing import Progressing


class Entry(Progressing):
    """One file's figures; called by its transfer's threads."""

    def __init__(self, board: Board, file: RemoteFile) -> None:
        self._board, self.file = board, file
        self.done = 0
        self.is_complete = False

    def begin(self) -> None:
        self._board.current = self
        self._board.phase = "Downloading"

    def phase(self, words: str) -> None:
        self._board.current = self
        self._board.phase = words

    def complete(self) -> None:
        self.done, self.is_complete = self.file.size, True

    def reset(self) -> None:
        self.done = 0
        self._board.phase = "Downloading"

    def arrived(self, count: int) -> None:
        with self._board.lock:
            self.done += count
            self._board.fetched += count

    def kept(self, count: int) -> None:
        self.done = count  # all that is there from before

    def lost(self, count: int) -> None:
        # `kept` says anew what of it remains.
        with self._board.lock:
            self.done = 0

    def checking(self, done: int) -> None:
        self.done = done

    def hashing(self, behind: int) -> None:
        self.phase("Comparing the checksum")

    def waiting(self, seconds: float, why: str) -> None:
        self._board.waiting = why
        self._board.until = time.monotonic() + seconds if why and seconds else 0.0


class Board:
    """Where all the figures come together."""

    def __init__(self, files: Sequence[RemoteFile]) -> None:
        self.lock = threading.Lock()
        self._entries = {file.path: Entry(self, file) for file in files}
        self.total = sum(file.size for file in files)
        self.fetched = 0
        self.current: Entry | None = None
        self.phase = "Downloading"
        self.waiting = ""
        self.until = 0.0

    def entry(self, file: RemoteFile) -> Entry:
        return self._entries[file.path]

    def news(self) -> DownloadNews:
        """The figures now."""
        with self.lock:
            entries = list(self._entries.values())
            current = self.current
            return DownloadNews(
                done=min(self.total, sum(entry.done for entry in entries)),
                total=self.total,
                fetched=self.fetched,
                file=current.file.path if current is not None else "",
                file_done=current.done if current is not None else 0,
                file_total=current.file.size if current is not None else 0,
                files_done=sum(entry.is_complete for entry in entries),
                files_total=len(entries),
                phase=self.phase,
                waiting=self.waiting,
                waiting_seconds=max(0.0, self.until - time.monotonic()) if self.until else 0.0,
            )
