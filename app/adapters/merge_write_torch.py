"""Writing a merged stream into weight files: several threads, each with one piece in hand."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from app.adapters.merge_shards import Shard
from app.adapters.merge_staging import Staging, write_error
from app.adapters.merge_stream_torch import Merge
from app.adapters.merge_tensor_torch import MergedTensor, Prepared
from app.core.errors import ErrorKind, WeftError

_COPY = 32 * 1024 * 1024  # bytes that the kernel copies at a time, between looks at Cancel
_BUFFER = 1024 * 1024
_SYNC = 192 * 1024 * 1024  # bytes after which what was written is sent to the disk
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class Control:
    """What another thread may say to a merge that runs: pause, go on, stop."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self.stopped = False

    def pause(self, paused: bool) -> None:
        if paused and not self.stopped:
            self._go.clear()
        else:
            self._go.set()

    @property
    def paused(self) -> bool:
        return not self._go.is_set()

    def stop(self) -> None:
        self.stopped = True
        self._go.set()

    def check(self) -> None:
        """Wait while paused.

        Raises:
            WeftError: CANCELLED.
        """
        self._go.wait()
        if self.stopped:
            raise WeftError(ErrorKind.CANCELLED, "The merge was cancelled.")


class Unit(NamedTuple):
    """A piece of work: rows of a tensor to compute, or bytes (`prepared` None) to copy."""

    number: int
    tensor: MergedTensor
    prepared: Prepared | None
    start: int
    end: int
    descriptor: int
    offset: int


class Writer:
    """Writes the weight files of one merge.

    Args:
        done: numbers of tensors that are complete already.
        progress: told how many bytes are written.
    """

    def __init__(
        self, merge: Merge, shards: Sequence[Shard], staging: Staging, done: frozenset[int], control: Control,
        progress: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._merge, self._shards, self._staging, self._control = merge, shards, staging, control
        self._progress = progress
        self._done = done
        self._lock = threading.Lock()  # of everything below
        self._open: dict[int, int] = {}  # tensor to how many of its units are being worked on
        self._issued: set[int] = set()  # tensors of which no more units come
        self._noted = len(done)
        self._failure: BaseException | None = None
        self._files: list[int] = []
        self._write_locks: dict[int, threading.Lock] = {}
        self._wake = threading.Condition()
        self._unsynced = 0
        self._ended = False
        self.written = self.resumed = sum(merge.tensors[i].bytes for i in done)

    def run(self, threads: int) -> None:
        """Write all that is not there yet.

        Raises:
            WeftError: DISK_FULL, PERMISSION, CORRUPT, CANCELLED.
        """
        self._progress(self.written)
        try:
            self._open_files()
            self._units = self._issue()
            syncer = threading.Thread(target=self._sync_while_writing, name="merge-sync")
            workers = [threading.Thread(target=self._work, name=f"merge-{i}") for i in range(max(1, threads))]
            for thread in (syncer, *workers):
                thread.start()
            for thread in workers:
                thread.join()
            with self._wake:
                self._ended = True
                self._wake.notify()
            syncer.join()
            if self._failure is not None:
                raise self._failure
            for descriptor in self._files:
                os.fsync(descriptor)
        except OSError as error:
            raise write_error(self._staging.folder, error) from error
        finally:
            for descriptor in self._files:
                os.close(descriptor)
            self._files.clear()

    def _open_files(self) -> None:
        for shard in self._shards:
            path = self._staging.folder / shard.name
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            self._files.append(descriptor)
            self._write_locks[descriptor] = threading.Lock()
            reserve(descriptor, shard.size)
            self._write(descriptor, memoryview(shard.header), 0)

    # Units --------------------------------------------------------------------------------------

    def _issue(self) -> Iterator[Unit]:
        for shard, descriptor in zip(self._shards, self._files, strict=True):
            for number, offset in zip(shard.members, shard.offsets, strict=True):
                if number in self._done:
                    continue
                tensor = self._merge.tensors[number]
                if tensor.copied and self._merge.files.fd(tensor.source) >= 0:
                    for start in range(0, tensor.bytes, _COPY):
                        end = min(start + _COPY, tensor.bytes)
                        yield Unit(number, tensor, None, start, end, descriptor, offset + start)
                elif tensor.bytes:
                    prepared = tensor.prepared()
                    for start, end in prepared.pieces:
                        place = offset + start * tensor.row_bytes
                        yield Unit(number, tensor, prepared, start, end, descriptor, place)
                self._issued.add(number)
                self._note_if_complete(number)

    def _next(self) -> Unit | None:
        with self._lock:
            if self._failure is not None:
                return None
            unit = next(self._units, None)
            if unit is not None:
                self._open[unit.number] = self._open.get(unit.number, 0) + 1
            return unit

    def _note_if_complete(self, number: int) -> None:
        if number in self._issued and not self._open.get(number):
            self._issued.discard(number)
            self._staging.note(number)
            self._noted += 1

    def _work(self) -> None:
        buffer = bytearray(_BUFFER)
        try:
            while True:
                self._control.check()
                unit = self._next()
                if unit is None:
                    return
                length = self._copy(unit, buffer) if unit.prepared is None else 0
                if unit.prepared is not None:
                    length = (unit.end - unit.start) * unit.tensor.row_bytes
                    if len(buffer) < length:
                        buffer = bytearray(length)
                    piece = memoryview(buffer)[:length]
                    unit.prepared.fill(unit.start, unit.end, piece)
                    self._write(unit.descriptor, piece, unit.offset)
                self._finished(unit, length)
        except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
            with self._lock:
                self._failure = self._failure or error

    def _finished(self, unit: Unit, length: int) -> None:
        with self._lock:
            self.written += length
            self._open[unit.number] -= 1
            self._note_if_complete(unit.number)
            written = self.written
            self._unsynced += length
            due = self._unsynced >= _SYNC
        self._progress(written)
        if due:
            with self._wake:
                self._wake.notify()

    # Bytes --------------------------------------------------------------------------------------

    def _write(self, descriptor: int, data: memoryview, offset: int) -> None:
        if hasattr(os, "pwrite"):
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
            return
        with self._write_locks[descriptor]:
            os.lseek(descriptor, offset, os.SEEK_SET)
            while data:
                data = data[os.write(descriptor, data) :]

    def _copy(self, unit: Unit, buffer: bytearray) -> int:
        """Copy bytes of the base as they are; the kernel does it where it can."""
        source, start, offset = unit.tensor.source, unit.start, unit.offset
        descriptor = self._merge.files.fd(source)
        left = unit.end - unit.start
        while left and hasattr(os, "copy_file_range"):
            try:
                count = os.copy_file_range(descriptor, unit.descriptor, left, source.offset + start, offset)
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    break
                raise
            if count == 0:
                break  # the loop below tells a file that has become shorter from one that the kernel cannot copy
            start, offset, left = start + count, offset + count, left - count
        view = memoryview(buffer)
        while left:
            piece = view[: min(left, len(view))]
            self._merge.files.read(source, start, piece)
            self._write(unit.descriptor, piece, offset)
            start, offset, left = start + len(piece), offset + len(piece), left - len(piece)
        return unit.end - unit.start

    def _sync_while_writing(self) -> None:
        """Send to the disk what was written, while more is computed: the journal then also counts after a power cut."""
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._ended or self._unsynced >= _SYNC)
                    if self._ended:
                        return
                with self._lock:
                    count, self._unsynced = self._noted, 0
                for descriptor in self._files:
                    getattr(os, "fdatasync", os.fsync)(descriptor)
                self._staging.note_synced(count)
        except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits)
            with self._lock:
                self._failure = self._failure or error


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its place on the disk where the file system can promise one."""
    if os.fstat(descriptor).st_size == size:
        return
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
