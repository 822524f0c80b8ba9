"""A file while it is being fetched: `<name>.part` with a journal of what has arrived, beside its target.

The part file is written at any offset (sparse where the file system can); the journal `<name>.part.journal` is
append-only: a header line that says what is being fetched, then a line per stretch that arrived. It is written
after the bytes, so that whatever it claims lies in the file: a kill loses at most what came since the last line.
The journal is locked while somebody fetches, so that two processes never write into one part file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.hub.positional import PositionalFile, try_lock

LONGEST_NAME = 255  # bytes; what every file system in use takes


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


class Locked(Exception):
    """Another process is fetching this file now."""


def beside(target: Path, ending: str) -> Path:
    """The path of something that belongs to `target`: its name with an ending, cut where that would be too long."""
    name = target.name + ending
    if len(os.fsencode(name)) > LONGEST_NAME:
        mark = "~" + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12] + ending
        room = LONGEST_NAME - len(mark)
        name = os.fsencode(target.name)[:room].decode(errors="ignore") + mark
    return target.with_name(name)


class PartFile:
    """A part file and its journal, opened for continuing.

    Args:
        target: the final path. header: what is to be fetched.

    Raises:
        WeftError: PERMISSION or DISK_FULL when the files cannot be made.
        Locked: another process holds it.
    """

    def __init__(self, target: Path, header: PartHeader) -> None:
        self.target = target
        self.header = header
        self.path = beside(target, ".part")
        self.journal_path = beside(target, ".part.journal")
        self.aside_path = beside(target, ".damaged")
        self.spans: list[tuple[int, int]] = []  # arrived, sorted, merged, half open
        self._file: PositionalFile | None = None
        self._journal = -1
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = self._lock_journal()
            if not self._read_journal():
                self._begin()
            self._file = PositionalFile(self.path)
        except OSError as error:
            self.close()
            raise write_error(error, self.path) from error
        except Locked:
            self.close()
            raise

    def _lock_journal(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        while True:
            journal = os.open(self.journal_path, flags, 0o644)
            if not try_lock(journal):
                os.close(journal)
                raise Locked
            # Its last owner may have finished, and removed it, between our opening and locking it.
            with contextlib.suppress(OSError):
                here, there = os.fstat(journal), self.journal_path.stat()
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    return journal
            os.close(journal)

    def _read_journal(self) -> bool:
        """Take up what lies there. False when there is nothing, or it is of another file."""
        try:
            header_line, *lines = self.journal_path.read_bytes().split(b"\n")
            stored = msgspec.json.decode(header_line, type=PartHeader)
            length = self.path.stat().st_size
        except (OSError, msgspec.MsgspecError, ValueError):
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
        os.write(self._journal, b"\n")  # so that the next line does not join a torn one
        return True

    def _begin(self) -> None:
        os.ftruncate(self._journal, 0)  # first, so that no claim outlives the bytes it is about
        self.spans = []
        self.path.unlink(missing_ok=True)
        self.path.touch()
        os.write(self._journal, msgspec.json.encode(self.header) + b"\n")

    @property
    def arrived(self) -> int:
        """Bytes that lie in the file."""
        return sum(end - start for start, end in self.spans)

    @property
    def frontier(self) -> int:
        """Bytes from the start without a gap."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    def arrived_up_to(self, start: int) -> int:
        """The end of the stretch that has arrived from `start` on; `start` itself when nothing has."""
        return next((end for begin, end in self.spans if begin <= start < end), start)

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
        assert self._file is not None
        try:
            self._file.write(offset, data)
        except OSError as error:
            raise write_error(error, self.path) from error

    def claim(self, start: int, end: int) -> None:
        """Note in the journal that a stretch has arrived. Call from one thread at a time."""
        try:
            os.write(self._journal, b"%d %d\n" % (start, end))
        except OSError as error:
            raise write_error(error, self.journal_path) from error
        self._merge(start, end)

    def _merge(self, start: int, end: int) -> None:
        kept = [(s, e) for s, e in self.spans if e < start or s > end]
        touching = [(s, e) for s, e in self.spans if not (e < start or s > end)]
        kept.append((min([start, *(s for s, _ in touching)]), max([end, *(e for _, e in touching)])))
        self.spans = sorted(kept)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes that have arrived, for hashing. Raises WeftError CORRUPT when the disk cannot give them back."""
        assert self._file is not None
        try:
            piece = self._file.read(offset, count)
        except OSError as error:
            raise WeftError(
                ErrorKind.CORRUPT,
                f"{self.path} cannot be read back: {error.strerror}.",
                "Check the disk, or choose a folder on another one.",
            ) from error
        if not piece:
            raise WeftError(
                ErrorKind.CORRUPT,
                f"{self.path} became shorter while it was being fetched.",
                "Check whether another program or a full disk did that, then resume.",
            )
        return piece

    def start_over(self) -> None:
        """Forget everything that arrived. Raises WeftError as the constructor does."""
        try:
            if self._file is not None:
                self._file.close()
            self._begin()
            self._file = PositionalFile(self.path)
        except OSError as error:
            raise write_error(error, self.path) from error

    def sync(self) -> None:
        """Have what arrived reach the disk. Raises WeftError as `write` does."""
        assert self._file is not None
        try:
            self._file.sync()
        except OSError as error:
            raise write_error(error, self.path) from error

    def finish(self) -> None:
        """Flush to the disk and give the file its final name. The journal goes last, so that a cut between is harmless."""
        self.sync()
        try:
            assert self._file is not None
            self._file.close()
            self.path.replace(self.target)
            sync_folder(self.target.parent)
            self._drop_journal()
            self.aside_path.unlink(missing_ok=True)  # an earlier try that was damaged: proven worthless by now
        except OSError as error:
            raise write_error(error, self.target) from error
        finally:
            self.close()

    def set_aside(self) -> Path:
        """Move what arrived away under a name that nothing takes for a model, and begin anew; returns where it lies."""
        try:
            if self._file is not None:
                self._file.close()
            self.path.replace(self.aside_path)
            self._begin()
            self._file = PositionalFile(self.path)
        except OSError as error:
            raise write_error(error, self.path) from error
        return self.aside_path

    def discard(self) -> None:
        """Delete what arrived. It is closed then."""
        try:
            if self._file is not None:
                self._file.close()
            self.path.unlink(missing_ok=True)
            self._drop_journal()
        except OSError as error:
            raise write_error(error, self.path) from error
        finally:
            self.close()

    def _drop_journal(self) -> None:
        if os.name == "nt":  # an open file cannot be deleted there
            os.close(self._journal)
            self._journal = -1
        self.journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files, keeping what arrived. May be called again."""
        if self._file is not None:
            self._file.close()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


def arrived_bytes(target: Path) -> int:
    """How much of a file lies in its part file, by its journal; 0 when there is none. Opens nothing for writing."""
    try:
        header_line, *lines = beside(target, ".part.journal").read_bytes().split(b"\n")
        msgspec.json.decode(header_line, type=PartHeader)
        length = beside(target, ".part").stat().st_size
    except (OSError, msgspec.MsgspecError, ValueError):
        return 0
    total, reached = 0, 0
    spans: list[tuple[int, int]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            start, end = (int(word) for word in line.split())
            if 0 <= start < end <= length:
                spans.append((start, end))
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def remove_parts(target: Path) -> None:
    """Delete what an abandoned download left beside its target. Raises WeftError PERMISSION."""
    for ending in (".part", ".part.journal", ".damaged"):
        path = beside(target, ending)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems have no such thing
            raise
    finally:
        os.close(handle)


def write_error(error: OSError, path: Path) -> WeftError:
    """An operating-system error while writing, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        limit = " This drive cannot hold a file of that size." if error.errno == errno.EFBIG else ""
        return WeftError(
            ErrorKind.DISK_FULL,
            f"The disk is full: {path} could not be written.{limit}",
            "Free some space or choose another folder, then resume: what has arrived is kept.",
        )
    if error.errno == errno.ENAMETOOLONG:
        return WeftError(
            ErrorKind.BAD_INPUT,
            f"The name {path.name[:80]}… is too long for this drive.",
            "Choose a folder with a shorter path, or on another drive.",
        )
    return WeftError(
        ErrorKind.PERMISSION,
        f"{path} could not be written: {error.strerror}.",
        "Check the folder's permissions, or choose another one.",
    )
