"""A file while it is being fetched: `<name>.part` with a journal of what has arrived, beside its target.

The part file has the final size from the start of the first write (sparse where the file system can) and is
written at any offset; the journal `<name>.part.journal` is append-only: a header line that says what is being
fetched, then a line per stretch that arrived. It is written after the bytes, so that whatever it claims lies in
the file: a kill loses at most what came since the last line.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError


class PartHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is being fetched. Any difference means that what lies there is of another file.

    Attributes:
        url: the hub's address of the file, without any signature. size: bytes.
        etag: of the whole file, without quotes. Never spliced across a change of it.
        sha256: hex, when the hub knows it (LFS), else "". git_oid: hex of the git blob, for plain files.
    """

    url: str
    size: int
    etag: str
    sha256: str = ""
    git_oid: str = ""


class PartFile:
    """A part file and its journal, opened for continuing.

    Args:
        target: the final path. header: what is to be fetched.

    Raises:
        WeftError: PERMISSION or DISK_FULL when the files cannot be made.
    """

    def __init__(self, target: Path, header: PartHeader) -> None:
        self.target = target
        self.header = header
        self.path = target.with_name(target.name + ".part")
        self.journal_path = target.with_name(target.name + ".part.journal")
        self.spans: list[tuple[int, int]] = []  # arrived, sorted, merged, half open
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self._read_journal():
                self._begin()
            self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            self._journal = self.journal_path.open("ab", buffering=0)
        except OSError as error:
            raise write_error(error, self.path) from error

    def _read_journal(self) -> bool:
        """Take up what lies there. False when there is nothing, or it is of another file."""
        try:
            header_line, *lines = self.journal_path.read_bytes().split(b"\n")
            stored = msgspec.json.decode(header_line, type=PartHeader)
            length = self.path.stat().st_size
        except (OSError, msgspec.DecodeError):
            return False
        if stored != self.header:
            return False
        for line in lines:
            try:
                start, end = (int(word) for word in line.split())
            except ValueError:
                continue  # the last line may be torn; it claims nothing then
            if 0 <= start < end <= min(length, self.header.size):
                self._merge(start, end)
        return True

    def _begin(self) -> None:
        self.journal_path.unlink(missing_ok=True)  # first, so that no claim outlives the bytes it is about
        self.path.unlink(missing_ok=True)
        with self.path.open("wb"):
            pass
        self.journal_path.write_bytes(msgspec.json.encode(self.header) + b"\n")

    @property
    def arrived(self) -> int:
        """Bytes that lie in the file."""
        return sum(end - start for start, end in self.spans)

    @property
    def frontier(self) -> int:
        """Bytes from the start without a gap."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    def missing(self) -> list[tuple[int, int]]:
        """The stretches still to be fetched, half open, in order."""
        gaps: list[tuple[int, int]] = []
        position = 0
        for start, end in self.spans:
            if start > position:
                gaps.append((position, start))
            position = end
        if position < self.header.size:
            gaps.append((position, self.header.size))
        return gaps

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write bytes at an offset. Thread-safe; claims nothing until `claim`.

        Raises:
            WeftError: DISK_FULL or PERMISSION.
        """
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise write_error(error, self.path) from error

    def claim(self, start: int, end: int) -> None:
        """Note in the journal that a stretch has arrived. Call from one thread at a time."""
        try:
            self._journal.write(b"%d %d\n" % (start, end))
        except OSError as error:
            raise write_error(error, self.journal_path) from error
        self._merge(start, end)

    def _merge(self, start: int, end: int) -> None:
        kept = [(s, e) for s, e in self.spans if e < start or s > end]
        touching = [(s, e) for s, e in self.spans if not (e < start or s > end)]
        kept.append((min([start, *(s for s, _ in touching)]), max([end, *(e for _, e in touching)])))
        self.spans = sorted(kept)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes that have arrived, for hashing."""
        return os.pread(self._file, count, offset)

    def start_over(self) -> None:
        """Forget everything that arrived."""
        self.close()
        self.spans = []
        self._begin()
        self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        self._journal = self.journal_path.open("ab", buffering=0)

    def finish(self) -> None:
        """Flush to the disk and give the file its final name. The journal goes last, so that a cut between is harmless."""
        try:
            os.fsync(self._file)
            self.close()
            self.path.replace(self.target)
            sync_folder(self.target.parent)
            self.journal_path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, self.target) from error

    def set_aside(self) -> Path:
        """Move what arrived away under a name that nothing takes for a model; returns the new path."""
        self.close()
        aside = self.target.with_name(self.target.name + ".damaged")
        self.path.replace(aside)
        self.journal_path.unlink(missing_ok=True)
        return aside

    def discard(self) -> None:
        """Delete what arrived."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files, keeping what arrived. May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._journal.close()


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(error: OSError, path: Path) -> WeftError:
    """An operating-system error while writing, in words."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return WeftError(
            ErrorKind.DISK_FULL,
            f"The disk is full: {path} could not be written.",
            "Free some space or choose another folder, then resume: what has arrived is kept.",
        )
    return WeftError(
        ErrorKind.PERMISSION,
        f"{path} could not be written: {error.strerror}.",
        "Check the folder's permissions, or choose another one.",
    )
