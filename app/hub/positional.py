"""Reading and writing a file at offsets from several threads, locks that the system frees when their owner dies, and which
run of the system this is."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class PositionalFile:
    """An open file. Where the system cannot write at an offset (Windows), a lock and a seek serve.

    Args:
        path: must exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self._lock = threading.Lock()
        self._seeks = not hasattr(os, "pwrite")

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write all of `data` at an offset. Raises OSError."""
        view = memoryview(data)
        if self._seeks:
            with self._lock:
                os.lseek(self._file, offset, os.SEEK_SET)
                while view:
                    view = view[os.write(self._file, view) :]
            return
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes at an offset. Raises OSError."""
        if self._seeks:
            with self._lock:
                os.lseek(self._file, offset, os.SEEK_SET)
                return os.read(self._file, count)
        return os.pread(self._file, count, offset)

    def sync(self) -> None:
        """Have the content reach the disk. Raises OSError."""
        os.fsync(self._file)

    def close(self) -> None:
        """May be called again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, without waiting. The lock goes with the descriptor, also when its owner is killed."""
    if os.name == "nt":
        import msvcrt

        try:
            os.lseek(descriptor, 1 << 40, os.SEEK_SET)  # a byte that nobody reads: Windows locks are not advisory
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_END)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks (some network drives): go on as without
    return True


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for a moment, against other threads and processes that do the same. Where there are no locks, go on as without.

    Raises:
        OSError: the folder cannot be opened.
    """
    if os.name != "nt":
        import fcntl

        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            with contextlib.suppress(OSError):  # some network drives have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
        return
    path = folder / ".weft-download.lock"
    handle, patience = os.open(path, os.O_RDWR | os.O_CREAT), time.monotonic() + 10
    try:
        while not try_lock(handle) and time.monotonic() < patience:
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # another holds it open: that one deletes it
            path.unlink()


def boot_mark() -> str:
    """Names the present run of the system: Linux's own name for it, elsewhere when it began, in seconds since the epoch."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return f"{time.time() - time.monotonic():.0f}"


def same_boot(mark: str) -> bool:
    """Whether the system has not been restarted since it had this mark. In doubt, it has."""
    now = boot_mark()
    if mark == now:
        return True
    try:
        return abs(float(mark) - float(now)) < 5.0  # clocks are set a little, and no system restarts within seconds
    except ValueError:
        return False
