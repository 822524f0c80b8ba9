"""Threads at the parent's ends of a child's pipes. They sleep in the kernel, and they always come back.

A plain blocking read ends only when the last holder of the other end is gone, which may be a grandchild
that outlives the child. So on POSIX each thread sleeps in poll() on its pipe and on a small pipe of its
own, by which it is told that the child is dead: it then takes what is still there and ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from app.engine.wire import CHUNK

if sys.platform != "win32":
    import select

_DRAIN_SECONDS = 1.0  # after the child's death: somebody else may still be writing into its pipe


class _Bell:
    """Wakes a thread that sleeps in poll(). Closing it is ringing it, once."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        self._lock = threading.Lock()

    def ring(self) -> None:
        with self._lock:
            if self._write >= 0:
                os.close(self._write)
                self._write = -1

    def close(self) -> None:
        self.ring()
        os.close(self.fd)


class PipeReader(threading.Thread):
    """Hands everything from a pipe to `take`, in this thread, until its end or until `finish()`."""

    def __init__(self, fd: int, take: Callable[[bytes], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._fd = fd
        self._take = take
        self._bell = _Bell()

    def finish(self) -> None:
        """The child is dead: take what is left in the pipe and end. Waits for that, at most a few seconds."""
        self._bell.ring()
        self.join(3 * _DRAIN_SECONDS)

    def run(self) -> None:
        """The thread."""
        try:
            if sys.platform == "win32":
                self._run_blocking()
            else:
                self._run_polling()
        finally:
            self._bell.close()

    def _run_blocking(self) -> None:
        while data := os.read(self._fd, CHUNK):
            self._take(data)

    def _run_polling(self) -> None:
        assert sys.platform != "win32"
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._bell.fd, select.POLLIN)
        deadline = 0.0
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._bell.fd in ready and not deadline:
                deadline = time.monotonic() + _DRAIN_SECONDS
            if self._fd not in ready or (deadline and time.monotonic() > deadline):
                return
            data = os.read(self._fd, CHUNK)
            if not data:
                return
            self._take(data)


class PipeWriter(threading.Thread):
    """Writes what it is given, in order, so that a full pipe blocks this thread and nobody else."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._fd = fd
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._bell = _Bell()

    def put(self, data: bytes) -> None:
        """Have `data` written. Returns at once."""
        self._queue.put(data)

    def finish(self) -> None:
        """Stop, whatever is still to be written."""
        self._queue.put(None)
        self._bell.ring()
        self.join(1.0)

    def run(self) -> None:
        """The thread."""
        try:
            if sys.platform != "win32":
                os.set_blocking(self._fd, False)
            # A broken pipe is the child's death; who waits for the child says so.
            with contextlib.suppress(BrokenPipeError, OSError):
                while (data := self._queue.get()) is not None and self._write(memoryview(data)):
                    pass
        finally:
            self._bell.close()

    def _write(self, data: memoryview) -> bool:
        if sys.platform == "win32":
            while data:
                data = data[os.write(self._fd, data) :]
            return True
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        poller.register(self._bell.fd, select.POLLIN)
        while data:
            if self._bell.fd in {fd for fd, _ in poller.poll()}:
                return False
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self._fd, data) :]
        return True
