"""One file from the hub to its final name: parallel ranges, resumed, hashed while it arrives, verified before it appears."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import urllib3

from app.core.errors import ErrorKind, WeftError
from app.hub.limits import RateLimit, retry_delay
from app.hub.part import PartFile, PartHeader
from app.hub.source import HttpSource, HttpTrouble, Located, RemoteFile, connection_trouble

STRETCH = 32 * 1024 * 1024  # bytes that one connection fetches before it takes the next stretch
CLAIM = 1024 * 1024  # bytes after which what arrived is noted in the journal, at the latest
CLAIM_SECONDS = 0.5
HASH_PIECE = 4 * 1024 * 1024
TRIES = 8  # without a byte in between
CHANGES = 3  # times that a file may change on the hub while it is fetched


class Progressing:
    """What a transfer tells while it runs; called from its threads. The default says nothing."""

    def arrived(self, count: int) -> None:
        """`count` bytes came from the network."""

    def kept(self, count: int) -> None:
        """`count` bytes were already there from before."""

    def lost(self, count: int) -> None:
        """`count` bytes that had been counted must be fetched again."""

    def waiting(self, seconds: float, why: str) -> None:
        """Nothing comes for a while, and why, in words; 0 seconds when it goes on."""


class _StartOver(Exception):
    """What arrived is of another version of the file."""


class Transfer:
    """Fetches one file. Use once.

    Args:
        source: where bytes come from. file: which. target: the final path; `<target>.part` is used on the way.
        connections: how many ranges at once, at most. limit: shared by all transfers.
        cancelled: set it to stop; what arrived stays in the part file.
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
    ) -> None:
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
        self._store_etag = ""
        self._ranges = True
        self._tries = 0

    def run(self) -> Path:
        """Fetch, verify, and give the file its name. Returns the target.

        Raises:
            WeftError: CANCELLED; NETWORK with what to do; DISK_FULL, PERMISSION; CORRUPT when what the hub sends
                does not match the hub's own checksum, twice.
        """
        for attempt in range(1, CHANGES + 3):
            part = PartFile(self._target, self._header())
            try:
                if self._fetch_and_check(part):
                    part.finish()
                    return self._target
                if attempt == 1:
                    self._progress.lost(part.arrived)
                    part.set_aside()
                    continue
                aside = part.set_aside()
                raise WeftError(
                    ErrorKind.CORRUPT,
                    f"{self._file.path} arrived damaged twice: its checksum is not the one the hub names.",
                    f"It was set aside as {aside.name}. Try again later, or over another connection.",
                )
            except _StartOver:
                self._progress.lost(part.arrived)
                part.discard()
                self._store_etag = ""
            finally:
                part.close()
        raise WeftError(
            ErrorKind.NETWORK,
            f"{self._file.path} keeps changing on the hub.",
            "Somebody is uploading it now: try again later.",
        )

    def _header(self) -> PartHeader:
        located = self._with_tries(lambda: self._source.locate(self._file, again=True))
        if located.size >= 0 and located.size != self._file.size:
            raise WeftError(
                ErrorKind.NETWORK,
                f"{self._file.path} is {located.size} bytes on the hub, not the {self._file.size} that its list says.",
                "Get the file list again.",
            )
        url = self._file.url(self._source.endpoint)
        return PartHeader(
            url=url, size=self._file.size, etag=located.etag, sha256=self._file.sha256, git_oid=self._file.git_oid
        )

    # Fetching --------------------------------------------------------------------------------------

    def _fetch_and_check(self, part: PartFile) -> bool:
        """Fetch what is missing and compare the hash. False when it does not match."""
        self._progress.kept(part.arrived)
        self._failure, self._running, self._tries = None, 0, 0
        self._todo = [piece for gap in part.missing() for piece in _stretches(*gap)]
        wanted = min(self._connections, max(1, len(self._todo))) if self._ranges else 1
        threads = [threading.Thread(target=self._work, args=(part,), name=f"fetch-{n}") for n in range(wanted)]
        with self._lock:
            self._running = len(threads)
        for thread in threads:
            thread.start()
        try:
            matches = self._hash(part)
        finally:
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        if self._cancelled.is_set():
            raise WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")
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
        finally:
            with self._lock:
                self._running -= 1
                self._news.notify_all()

    def _stretch(self, part: PartFile, start: int, end: int) -> None:
        """Fetch [start, end), going on after cuts from where they came."""
        while start < end and not self._stopping():
            try:
                response, tag = self._source.open(self._file, start, end, self._store_etag)
                with self._lock:
                    self._store_etag = self._store_etag or tag
                try:
                    start = self._receive(part, response, start, end)
                finally:
                    response.close()
                if start < end and not self._stopping():
                    raise HttpTrouble(0, "The connection was cut.", code="cut", retry=True)
            except HttpTrouble as trouble:
                if trouble.status == 412 or trouble.status == 416:
                    raise _StartOver from trouble
                if trouble.status == 200:
                    self._ranges = False
                    raise _StartOver from trouble
                start = max(start, self._arrived_up_to(part, start))
                self._pause(trouble)

    def _receive(self, part: PartFile, response: urllib3.BaseHTTPResponse, start: int, end: int) -> int:
        """Write what a response brings; returns how far it came."""
        position = claimed = start
        last = time.monotonic()
        try:
            while position < end and not self._stopping():
                data = response.read(min(self._limit.piece, end - position), decode_content=False)
                if not data:
                    break
                part.write(position, data)
                position += len(data)
                self._progress.arrived(len(data))
                now = time.monotonic()
                if position - claimed >= CLAIM or now - last >= CLAIM_SECONDS:
                    self._claim(part, claimed, position)
                    claimed, last = position, now
                self._limit.wait_for(len(data), self._cancelled)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
                raise
            raise connection_trouble(error) from error
        finally:
            if position > claimed:
                self._claim(part, claimed, position)
        return position

    def _claim(self, part: PartFile, start: int, end: int) -> None:
        with self._lock:
            part.claim(start, end)
            self._tries = 0
            self._news.notify_all()

    def _arrived_up_to(self, part: PartFile, start: int) -> int:
        with self._lock:
            return next((e for s, e in part.spans if s <= start < e), start)

    # Trouble ---------------------------------------------------------------------------------------

    def _stopping(self) -> bool:
        return self._failure is not None or self._cancelled.is_set()

    def _with_tries(self, action: Callable[[], Located]) -> Located:
        while True:
            try:
                return action()
            except HttpTrouble as trouble:
                self._pause(trouble)

    def _pause(self, trouble: HttpTrouble) -> None:
        """Wait before the next try; raises when there is to be none."""
        if not trouble.retry:
            raise trouble_error(trouble, self._file) from trouble
        with self._lock:
            self._tries += 1
            tries = self._tries
        if tries > TRIES:
            raise trouble_error(trouble, self._file) from trouble
        seconds = retry_delay(tries, trouble.retry_after)
        why = "The hub asks to slow down." if trouble.status == 429 else trouble.words
        self._progress.waiting(seconds, why)
        if self._cancelled.wait(seconds):
            raise WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")
        self._progress.waiting(0, "")

    # Checking --------------------------------------------------------------------------------------

    def _hash(self, part: PartFile) -> bool:
        """Follow the arriving bytes with the hash; at the end say whether it is the hub's."""
        size = self._file.size
        if self._file.sha256:
            digest, wanted = hashlib.sha256(), self._file.sha256
        else:
            # Git's blob hash: nothing secret rests on it, it is what the hub knows of a plain file.
            digest, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), self._file.git_oid
        position = 0
        while position < size:
            with self._lock:
                while part.frontier <= position and self._running and self._failure is None:
                    self._news.wait(0.5)
                frontier = part.frontier
                if frontier <= position:
                    return False  # the connections ended early: run() finds out why
            while position < frontier:
                piece = part.read(position, min(HASH_PIECE, frontier - position))
                digest.update(piece)
                position += len(piece)
        return not wanted or digest.hexdigest() == wanted


def trouble_error(trouble: HttpTrouble, file: RemoteFile) -> WeftError:
    """What the hub answered, in words that say what to do next."""
    page = f"{file.repo}"
    if trouble.code == "GatedRepo":
        if trouble.status == 401:
            return WeftError(
                ErrorKind.PERMISSION,
                f"{page} is gated, and no token is set.",
                "Accept its licence on its page, make a read token in your hub account, and enter it in Settings.",
            )
        return WeftError(
            ErrorKind.PERMISSION,
            f"{page} is gated: {trouble.words}",
            "Open its page on the hub with your account and accept its licence, or ask its authors for access.",
        )
    if trouble.status in (401, 403):
        return WeftError(
            ErrorKind.PERMISSION, f"The hub refuses {file.path}: {trouble.words}", "Check the token in Settings."
        )
    if trouble.status in (404, 410):
        return WeftError(
            ErrorKind.NOT_FOUND, f"{file.path} is not (or no longer) in {page}.", "Get the file list again."
        )
    if trouble.status == 429:
        return WeftError(
            ErrorKind.NETWORK,
            "The hub keeps asking to slow down.",
            "Resume later; a token in Settings raises the limit.",
        )
    if trouble.code == "tls":
        return WeftError(
            ErrorKind.NETWORK, trouble.words, "Check the date of this computer and the certificates of your proxy."
        )
    if trouble.code == "proxy":
        return WeftError(ErrorKind.NETWORK, trouble.words, "Check the proxy in Settings.")
    return WeftError(
        ErrorKind.NETWORK,
        f"{file.path}: {trouble.words}",
        "Check the connection, then resume: what has arrived is kept.",
    )


def _stretches(start: int, end: int) -> list[tuple[int, int]]:
    return [(at, min(at + STRETCH, end)) for at in range(start, end, STRETCH)]
