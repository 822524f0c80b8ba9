"""A file while it is being fetched: `<name>.part` with a journal of what has arrived, beside its target.

The part file is written at any offset (sparse where the file system can); the journal `<name>.part.journal` is
append-only: a header line that says what is being fetched, then a line per stretch that arrived. It is written
after the bytes, so that whatever it claims lies in the file: a kill loses at most what came since the last line.
A computer that loses its power may keep the claim and lose the bytes, so claims say in which run of the system they
were made, and which of them the disk has confirmed: after a restart of the system only these count.
The journal is locked while somebody fetches, so that two processes never write into one part file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import msgspec

from app.core.disk import sync_folder
from app.core.errors import ErrorKind, WeftError
from app.hub.journal import ENDINGS, PartHeader, beside, merged, read_journal
from app.hub.positional import PositionalFile, boot_mark, try_lock


class Locked(Exception):
    """Another process is fetching this file now."""


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
            found = read_journal(self.journal_path.read_bytes(), self.path.stat().st_size)
        except OSError:
            return False
        if found is None or not self.header.continues(found[0]):
            return False
        self.spans = found[1]
        # The empty line first, so that the next one does not join a torn one.
        header = b"" if found[0] == self.header else msgspec.json.encode(self.header) + b"\n"
        os.write(self._journal, b"\n" + header + b"boot %s\n" % boot_mark().encode())
        return True

    def _begin(self) -> None:
        os.ftruncate(self._journal, 0)  # first, so that no claim outlives the bytes it is about
        self.spans = []
        self.path.unlink(missing_ok=True)
        self.path.touch()
        os.write(self._journal, msgspec.json.encode(self.header) + b"\nboot %s\n" % boot_mark().encode())

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
        self.spans = merged([*self.spans, (start, end)])

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
        """Have what arrived reach the disk, and note which claims that confirms. Raises WeftError as `write` does."""
        assert self._file is not None
        try:
            noted = os.fstat(self._journal).st_size  # before: what is claimed meanwhile may miss this flush
            self._file.sync()
            os.write(self._journal, b"synced %d\n" % noted)
            os.fsync(self._journal)
        except OSError as error:
            raise write_error(error, self.path) from error

    def finish(self, *, keep_old: bool = False) -> Path | None:
        """Flush to the disk and give the file its final name. The journal goes last, so that a cut between is harmless.

        Args:
            keep_old: move what has that name away first, instead of replacing it. Returns where to.
        """
        self.sync()
        try:
            assert self._file is not None
            self._file.close()
            old = move_away(self.target) if keep_old else None
            self.path.replace(self.target)
            sync_folder(self.target.parent)
            self._drop_journal()
            self.aside_path.unlink(missing_ok=True)  # an earlier try that was damaged: proven worthless by now
            return old
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
        found = read_journal(beside(target, ".part.journal").read_bytes(), beside(target, ".part").stat().st_size)
    except OSError:
        return 0
    return sum(end - start for start, end in found[1]) if found is not None else 0


def remove_parts(target: Path) -> bool:
    """Delete what an abandoned download left beside its target. False, and nothing is deleted, when somebody fetches it now.

    Raises:
        WeftError: PERMISSION.
    """
    paths = [beside(target, ending) for ending in ENDINGS]
    journal = beside(target, ".part.journal")
    try:
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(journal, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            try:
                if not try_lock(lock):
                    return False
            finally:
                if os.name == "nt":  # an open file cannot be deleted there
                    os.close(lock)
            try:
                _unlink(paths)
            finally:
                if os.name != "nt":
                    os.close(lock)
        _unlink(paths)
    except OSError as error:
        raise write_error(error, journal) from error
    return True


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def move_away(target: Path) -> Path | None:
    """Give what lies at `target` another name that nothing takes for a model. Returns it; None when nothing lies there."""
    for number in range(1, 1000):
        place = beside(target, f".old{number if number > 1 else ''}")
        if place.exists():
            continue
        try:
            target.rename(place)
        except FileNotFoundError:
            return None
        return place
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))



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
