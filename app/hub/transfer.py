"""One file from the hub to its final name: parallel ranges, resumed, hashed while it arrives, verified before it appears."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from pathlib import Path

import urllib3

from app.core.errors import ErrorKind, WeftError
from app.hub.checksum import PIECE, Checksum, is_file
from app.hub.files import RemoteFile
from app.hub.journal import PartHeader
from app.hub.limits import RateLimit
from app.hub.part import Locked, PartFile
from app.hub.patience import Patience
from app.hub.progressing import Progressing
from app.hub.source import HttpSource, HttpTrouble, Opened, connection_trouble
from app.hub.trouble import stopped, trouble_error

STRETCH = 32 * 1024 * 1024  # bytes that one connection fetches before it takes the next stretch
CLAIM = 1024 * 1024  # bytes of a connection after which what arrived is noted in the journal, at the latest
CLAIM_SOON = 256 * 1024, 0.01  # bytes after which it is where so many seconds have passed: a kill loses what is not
CLAIM_SECONDS = 2.0  # on a slow line
SYNC = 64 * 1024 * 1024  # bytes after which the disk is made to follow, so that the end does not wait for gigabytes
SYNC_SECONDS = 30.0  # also on a slow line: that much a power failure may cost
SPARE = 64 * 1024 * 1024  # bytes that a disk keeps free
LAG = 64 * 1024 * 1024  # bytes that the hash may be behind before a person is told that it is being checked
CHANGES = 3  # times that a file may change on the hub while it is fetched
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _StartOver(Exception):
    """What arrived cannot be continued."""


class Transfer:
    """Fetches one file. Use once.

    Args:
        source: where bytes come from. file: which. target: the final path; `<target>.part` is used on the way.
        connections: how many ranges at once, at most. limit: shared by all transfers.
        keep_old: what has the target's name is somebody's own: it is moved away, not replaced; `old` says where to.
        cancelled: set it (and call `interrupt`) to stop; what arrived stays in the part file.
    """

    def __init__(
        self,
        source: HttpSource,
        file: RemoteFile,
        target: Path,
        *,
        connections: int = 4,
        limit: RateLimit | None = None,
        progress: Progressing | None = None,
        cancelled: threading.Event | None = None,
        keep_old: bool = False,
    ) -> None:
        self.old: Path | None = None
        self._keep_old = keep_old
        self._source, self._file, self._target = source, file, target
        self._connections = connections
        self._limit = limit or RateLimit()
        self._progress = progress or Progressing()
        self._cancelled = cancelled or threading.Event()
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)  # something arrived, or a thread ended
        self._failure: BaseException | None = None
        self._running = 0
        self._todo: list[tuple[int, int]] = []
        self._open: set[urllib3.BaseHTTPResponse] = set()
        self._store_etag = ""
        self._ranges = True
        self._restarts = 0  # from the first byte, because the server ignores ranges
        self._generation = 0  # rises with every stretch that arrived: patience begins anew
        self._patience = Patience(
            self._progress,
            self._cancelled,
            self._stopping,
            lambda trouble: trouble_error(trouble, file, source.endpoint),
        )

    def run(self) -> Path:
        """Fetch, verify, and give the file its name. Returns the target.

        Raises:
            WeftError: CANCELLED; NETWORK with what to do; DISK_FULL, PERMISSION; CORRUPT when what the hub sends
                does not match the hub's own checksum, twice.
        """
        damaged = changes = 0
        while True:
            part = self._part()
            if part is None:
                return self._target
            try:
                if self._fetch_and_check(part):
                    self.old = part.finish(keep_old=self._keep_old)
                    return self._target
                damaged += 1
                self._progress.lost(part.arrived)
                aside = part.set_aside()
                if damaged == 2:
                    raise WeftError(
                        ErrorKind.CORRUPT,
                        f"{self._file.path} arrived damaged twice: its checksum is not the one the hub names.",
                        f"It was set aside as {aside.name}. Try again later, or over another connection.",
                    )
                if shutil.disk_usage(aside.parent).free < self._file.size + SPARE:
                    aside.unlink(missing_ok=True)  # no room for both, and it is proven worthless
                self._store_etag = ""
            except _StartOver:
                changes += self._ranges
                self._progress.lost(part.arrived)
                part.start_over()
                self._store_etag = ""
            finally:
                part.close()
            if changes > CHANGES:
                raise WeftError(
                    ErrorKind.NETWORK,
                    f"{self._file.path} keeps changing on the hub.",
                    "Somebody is uploading it now: try again later.",
                )

    def interrupt(self) -> None:
        """After `cancelled` was set: have connections that wait for bytes return at once. From any thread."""
        with self._lock:
            opened = list(self._open)
            self._news.notify_all()
        for response in opened:
            with contextlib.suppress(Exception):  # it may end by itself at this moment
                response.shutdown()  # type: ignore[attr-defined]  (urllib3.HTTPResponse has it)

    def _part(self) -> PartFile | None:
        """The part file; None when another process completed the file while we waited for it."""
        header, waited = self._header(), False
        while True:
            try:
                part = PartFile(self._target, header)
            except Locked:
                waited = True
                self._progress.waiting(0, "Another download is fetching this file already.")
                if self._cancelled.wait(0.3):
                    raise stopped() from None
                continue
            if waited:
                self._progress.waiting(0, "")
            # Whether we waited or not: since the caller looked, somebody may have completed it.
            try:
                whole = is_file(self._target, self._file, self._cancelled, self._progress.checking)
            except BaseException:
                part.close()
                raise
            if whole:
                part.discard()
                self._progress.kept(self._file.size)
                return None
            return part

    def _header(self) -> PartHeader:
        located = self._patience.tried(lambda: self._source.locate(self._file, again=True))
        if located.size >= 0 and located.size != self._file.size:
            raise WeftError(
                ErrorKind.NETWORK,
                f"{self._file.path} is {located.size:,} bytes on the hub, not the {self._file.size:,} that its list says.",
                "Get the file list again.",
            )
        if self._file.sha256 and _SHA256.fullmatch(located.etag) and located.etag != self._file.sha256:
            raise WeftError(
                ErrorKind.NETWORK,
                f"{self._file.path} is another file on the hub than its list says.",
                "Somebody changed it meanwhile. Get the file list again.",
            )
        url = self._file.url(self._source.endpoint)
        return PartHeader(
            url=url, size=self._file.size, etag=located.etag, sha256=self._file.sha256, git_oid=self._file.git_oid
        )

    # Fetching --------------------------------------------------------------------------------------

    def _fetch_and_check(self, part: PartFile) -> bool:
        """Fetch what is missing and compare the hash. False when it does not match."""
        self._failure, self._running = None, 0
        if not self._ranges and part.missing() and part.arrived:
            raise _StartOver
        self._progress.kept(part.arrived)
        pieces = _stretches if self._ranges else _whole
        self._todo = [piece for gap in part.missing() for piece in pieces(*gap)]
        wanted = min(self._connections, len(self._todo)) if self._ranges else min(1, len(self._todo))
        threads = [threading.Thread(target=self._work, args=(part,), name=f"fetch-{n}") for n in range(wanted)]
        with self._lock:
            self._running = len(threads)
        over = threading.Event()
        if self._file.size > SYNC // 4:
            threads.append(threading.Thread(target=self._keep_syncing, args=(part, over), name="sync"))
        for thread in threads:
            thread.start()
        try:
            matches = self._hash(part)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            raise
        finally:
            over.set()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        if self._cancelled.is_set():
            raise stopped()
        return matches

    def _work(self, part: PartFile) -> None:
        """A connection: takes stretches until none is left."""
        try:
            while not self._stopping():
                with self._lock:
                    if not self._todo:
                        return
                    start, end = self._todo.pop(0)
                self._stretch(part, start, end)
        except BaseException as error:  # noqa: BLE001  (handed to the thread that called run(), which raises it)
            with self._lock:
                self._failure = self._failure or error
            self.interrupt()  # the others would find out after their next bytes, or never
        finally:
            with self._lock:
                self._running -= 1
                self._news.notify_all()

    def _keep_syncing(self, part: PartFile, over: threading.Event) -> None:
        """Have the disk follow, so that the last flush is short, and a power failure costs little.

        What the disk reports here it may not report again: it counts.
        """
        synced, last = part.arrived, time.monotonic()
        while not over.wait(0.1):
            with self._lock:
                arrived = part.arrived
            late = arrived > synced and time.monotonic() - last > SYNC_SECONDS
            if arrived - synced < SYNC and not late:
                continue
            synced, last = arrived, time.monotonic()
            try:
                part.sync()
            except WeftError as error:
                with self._lock:
                    self._failure = self._failure or error
                return

    def _stretch(self, part: PartFile, start: int, end: int) -> None:
        """Fetch [start, end), going on after cuts from where they came."""
        tries, generation = 0, self._generation
        while start < end and not self._stopping():
            self._patience.wait_for_turn()
            if self._stopping():
                return
            try:
                opened = self._source.open(self._file, start, end, self._store_etag)
                self._same_version(opened)
                start = self._receive(part, opened, start, end)
                if start < min(end, opened.end) and not self._stopping():
                    raise HttpTrouble(0, "The connection was cut.", code="cut", retry=True)
            except HttpTrouble as trouble:
                if trouble.status in (412, 416):
                    raise _StartOver from trouble
                if trouble.status == 200:
                    self._ranges = False
                    raise _StartOver from trouble
                with self._lock:
                    start = part.arrived_up_to(start)
                    tries = 1 if generation != self._generation else tries + 1
                    generation = self._generation
                if start < end and not self._ranges and not self._stopping():
                    self._restarts += 1
                    self._patience.before_another_try(trouble, self._restarts)
                    raise _StartOver from trouble
                if start < end and not self._stopping():
                    self._patience.before_another_try(trouble, tries)

    def _same_version(self, opened: Opened) -> None:
        """Connections that open at once know no ETag yet: the first one's holds for all."""
        with self._lock:
            self._store_etag = self._store_etag or opened.etag
            same = not opened.etag or opened.etag == self._store_etag
        if not same:
            opened.response.close()
            raise _StartOver

    def _receive(self, part: PartFile, opened: Opened, start: int, end: int) -> int:
        """Write what a response brings; returns how far it came."""
        response, position, claimed, last = opened.response, start, start, time.monotonic()
        end = min(end, opened.end)
        with self._lock:
            self._open.add(response)
        try:
            while position < end and not self._stopping():
                data = response.read(min(self._limit.piece, end - position), decode_content=False)
                if not data:
                    break
                part.write(position, data)
                position += len(data)
                self._progress.arrived(len(data))
                now = time.monotonic()
                came, passed = position - claimed, now - last
                if came >= CLAIM or passed >= CLAIM_SECONDS or (came >= CLAIM_SOON[0] and passed >= CLAIM_SOON[1]):
                    self._claim(part, claimed, position)
                    claimed, last = position, now
                self._limit.wait_for(len(data), self._cancelled)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if self._stopping():
                return position
            raise connection_trouble(error) from error
        finally:
            with self._lock:
                self._open.discard(response)
            if position > claimed:
                self._claim(part, claimed, position)
            if position == end == opened.end and getattr(response, "length_remaining", None) == 0:
                response.drain_conn()
                response.release_conn()  # the next stretch goes over the same connection
            else:
                response.close()
        return position

    def _claim(self, part: PartFile, start: int, end: int) -> None:
        with self._lock:
            part.claim(start, end)
            self._generation += 1
            self._news.notify_all()

    def _stopping(self) -> bool:
        return self._failure is not None or self._cancelled.is_set()

    # Checking --------------------------------------------------------------------------------------

    def _hash(self, part: PartFile) -> bool:
        """Follow the arriving bytes with the hash; at the end say whether it is the hub's."""
        size, checksum, position = self._file.size, Checksum(self._file), 0
        while position < size:
            with self._lock:
                while part.frontier <= position and self._running and not self._stopping():
                    self._news.wait(0.5)
                frontier, received = part.frontier, not self._running
                if frontier <= position or self._stopping():
                    return False  # the connections ended early: run() finds out why
            while position < frontier and not self._stopping():
                if received and size - position > LAG:
                    self._progress.hashing(size - position)
                piece = part.read(position, min(PIECE, frontier - position))
                checksum.update(piece)
                position += len(piece)
        return checksum.matches


def _stretches(start: int, end: int) -> list[tuple[int, int]]:
    return [(at, min(at + STRETCH, end)) for at in range(start, end, STRETCH)]


def _whole(start: int, end: int) -> list[tuple[int, int]]:
    return [(start, end)]
