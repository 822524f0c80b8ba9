"""A thread that owns one running download: its child process, its figures, its end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import msgspec
from PySide6.QtCore import QObject, QThread, Signal

from app.core.errors import ErrorKind, WeftError
from app.engine import protocol
from app.engine.client import EngineClient, EngineExit, error_of
from app.engine.failures import one_line
from app.hub.files import DownloadNews, DownloadResult
from app.store.downloads import Download, DownloadStore

_STORED_EVERY = 2.0  # seconds between writes of the progress into the store
_RESTARTS = 3  # of a child that died without saying why, with nothing fetched in between
_PAUSE = 1.0


class DownloadWorker(QThread):
    """Runs one download to its end. `start()` it after connecting.

    Args:
        make_client: makes the child, not started. token: gives the hub's token; may be slow, so it is asked in this thread.
        rate: bytes a second, 0 unlimited.

    Attributes:
        latest: how it is getting on; replaced a few times a second, read it from any thread at any pace.

    Signals:
        ended(DownloadResult or None, WeftError or None): once, last. CANCELLED after `stop`.
    """

    ended = Signal(object, object)

    def __init__(
        self,
        download: Download,
        store: DownloadStore,
        *,
        make_client: Callable[[], EngineClient],
        token: Callable[[str], str],
        proxy: str = "",
        rate: float = 0.0,
        connections: int = 4,
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName(f"download {download.id}")
        self.download = download
        self.latest: DownloadNews | None = None
        self._store = store
        self._make_client = make_client
        self._token = token
        self._proxy = proxy
        self._rate = rate
        self._connections = connections
        self._lock = threading.Lock()
        self._client: EngineClient | None = None
        self._command = 0
        self._came = 0  # bytes that the present child has fetched
        self._stopping = threading.Event()

    # From any thread

    def set_rate(self, rate: float) -> None:
        """Another limit, at once. Bytes a second, 0 unlimited."""
        with self._lock:
            if rate == self._rate:
                return
            self._rate = rate
            client, command = self._client, self._command
        if client is not None and command:
            try:
                client.send(protocol.Adjust(target=command, parameters=msgspec.json.encode({"rate": rate}).decode()))
            except WeftError:
                return  # it has just ended; the next child is told from the start

    def stop(self) -> None:
        """End within a few seconds; what arrived is kept. `ended` follows."""
        with self._lock:
            self._stopping.set()
            client, command = self._client, self._command
        if client is not None:
            client.cancel(command)

    # This thread

    def run(self) -> None:
        """The thread's own work; call `start()`, not this."""
        result: DownloadResult | None = None
        error: WeftError | None = None
        try:
            result = self._fetch()
        except WeftError as known:
            error = known
        except Exception as unknown:  # noqa: BLE001  (a defect of ours must reach the window, not end a thread in silence)
            error = WeftError(
                ErrorKind.INTERNAL, f"The download failed: {one_line(unknown)}", "Please report this, with Weft's log."
            )
        with contextlib.suppress(WeftError):
            if self.latest is not None:
                self._store.update(self.download.id, done=self.latest.done)
        self._store.release()
        if self._stopping.is_set() and result is None:
            error = WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")
        self.ended.emit(result, error)

    def _fetch(self) -> DownloadResult:
        token = self._token(self.download.endpoint)
        restarts = 0
        while True:
            client = self._make_client()
            self._came = 0
            try:
                return self._run_child(client, token)
            except WeftError as error:
                restarts = 0 if self._came else restarts + 1
                if error.kind not in (ErrorKind.CRASHED, ErrorKind.OUT_OF_MEMORY) or restarts > _RESTARTS:
                    raise
            finally:
                with self._lock:
                    self._client, self._command = None, 0
                client.shutdown()
            if self._stopping.wait(_PAUSE):
                raise WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")

    def _run_child(self, client: EngineClient, token: str) -> DownloadResult:
        client.start()
        with self._lock:
            if self._stopping.is_set():
                raise WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")
            self._client = client
            self._command = command = client.send(protocol.RunTask(task="download", parameters=self._parameters(token)))
        stored = time.monotonic()
        while True:
            event = client.next_event()
            if isinstance(event, EngineExit):
                raise event.error
            if isinstance(event, protocol.Failed) and event.id in (0, command):
                raise error_of(event)
            if isinstance(event, protocol.News) and event.id == command:
                self.latest = msgspec.json.decode(event.json, type=DownloadNews)
                self._came = self.latest.fetched
                if time.monotonic() - stored >= _STORED_EVERY:
                    stored = time.monotonic()
                    with contextlib.suppress(WeftError):  # a figure that cannot be noted is no reason to stop
                        self._store.update(self.download.id, done=self.latest.done)
            if isinstance(event, protocol.Done) and event.id == command:
                assert isinstance(event.result, protocol.TaskResult)
                return msgspec.json.decode(event.result.json, type=DownloadResult)

    def _parameters(self, token: str) -> str:
        download = self.download
        return msgspec.json.encode(
            {
                "endpoint": download.endpoint,
                "repo": download.repo,
                "revision": download.revision,
                "commit": download.commit,
                "files": download.files,
                "folder": download.folder,
                "here": download.here,
                "rate": self._rate,
                "connections": self._connections,
                "proxy": self._proxy,
                "token": token,
            }
        ).decode()
