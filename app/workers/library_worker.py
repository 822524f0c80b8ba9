"""Keeps the library's index up to date in a thread of its own, and watches the folders for changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from PySide6.QtCore import QFileSystemWatcher, QObject, QThread, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.roots import Root
from app.store.library import LibraryStore
from app.store.refresh import refresh

MAX_WATCHED = 2000  # folders; an inotify watch each
SETTLE_MS = 500  # changes come in bursts: wait this long after the first
POLL_MS = 60_000  # how often to look where watching does not reach
MAX_PROBLEMS = 20  # told of per scan
_CHANGED_SECONDS = 0.2
_WATCHED_AT_ONCE = 25
_WORK_SECONDS, _REST_SECONDS = 0.004, 0.001


class LibraryWorker(QThread):
    """Scans at start, when asked, and when a folder changes; unchanged files are not read again.

    Signals:
        changed: the index holds something else now; at most five times a second while it scans.
        scanning: a scan began (True) or ended (False).
        problem: a WeftError about a folder or the database, told once until it goes away.

    `refresh`, `set_roots` and `stop` may be called from any thread. Call `stop` before the database closes.
    """

    changed = Signal()
    scanning = Signal(bool)
    problem = Signal(object)
    _requested = Signal()

    def __init__(self, library: LibraryStore, roots: Iterable[Root] = (), parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("library")
        self._library = library
        self._lock = threading.Lock()
        self._roots = list(roots)
        self._stopped = threading.Event()
        self._restart = threading.Event()  # the scan at work is out of date: end it

    def refresh(self) -> None:
        """Look at the disk again."""
        self._requested.emit()

    def set_roots(self, roots: Iterable[Root]) -> None:
        """Index these roots from now on, and forget what lies under others."""
        with self._lock:
            self._roots = list(roots)
        self._restart.set()
        self._requested.emit()

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._stopped.set()
        self.quit()
        self.wait()

    def run(self) -> None:
        """The thread: an event loop for the watcher; scans run inside its slots."""
        watcher = _Watcher(self)  # made here, so that it lives in this thread
        self._requested.connect(watcher.scan_soon)
        watcher.scan()
        if not self._stopped.is_set():
            self.exec()
        self._requested.disconnect(watcher.scan_soon)
        watcher.close()
        self._library.release()

    # For the watcher, in the thread --------------------------------------------------------------

    def current_roots(self) -> list[Root]:
        """The roots as last set; a scan that begins with them is up to date."""
        with self._lock:
            self._restart.clear()
            return list(self._roots)

    @property
    def interrupted(self) -> bool:
        """Whether the scan at work is to end."""
        return self._stopped.is_set() or self._restart.is_set()

    @property
    def library(self) -> LibraryStore:
        return self._library


class _Watcher(QObject):
    """Lives in the worker's thread: decides when to scan, and scans."""

    def __init__(self, worker: LibraryWorker) -> None:
        super().__init__()
        self._worker = worker
        self._files = QFileSystemWatcher(self)
        self._files.directoryChanged.connect(self.scan_after_change)
        self._files.fileChanged.connect(self.scan_after_change)
        self._settle = QTimer(self, singleShot=True)
        self._settle.timeout.connect(self.scan)
        self._poll = QTimer(self, interval=POLL_MS)
        self._poll.timeout.connect(self.scan)
        self._told: set[str] = set()
        self._seconds = 0.0  # that the last scan took
        self._last_change = 0.0
        self._pending_change = False
        self._rested = 0.0

    @Slot()
    def scan_soon(self) -> None:
        """Asked for: at once, but one scan for many requests."""
        self._settle.start(0)

    @Slot(str)
    def scan_after_change(self, _path: str) -> None:
        """After a burst of changes; a large library is not scanned without pause while files keep changing."""
        if not self._settle.isActive():
            self._settle.start(max(SETTLE_MS, int(4000 * self._seconds)))

    @Slot()
    def scan(self) -> None:
        """Bring the index up to date."""
        worker = self._worker
        problems: list[WeftError] = []
        folders: list[str] = []
        began = time.monotonic()
        self._rested = began
        worker.scanning.emit(True)
        try:
            refresh(
                worker.library,
                worker.current_roots(),
                problem=problems.append,
                cancelled=self._pause,
                changed=self._changed,
                folders=folders.extend,
            )
        except WeftError as error:  # the database: full, read-only, busy
            problems.append(error)
        except Exception as error:  # noqa: BLE001  (a slot's exception would vanish with the thread's event loop)
            problems.append(
                WeftError(
                    ErrorKind.INTERNAL,
                    f"The library could not be read: {type(error).__name__}: {error}.",
                    "Refresh it. If it happens again, report it with the log.",
                )
            )
        self._seconds = time.monotonic() - began
        if self._pending_change:
            self._changed(at_once=True)
        worker.scanning.emit(False)
        self._tell(problems)
        if not worker.interrupted:
            self._watch(folders)

    def close(self) -> None:
        self._settle.stop()
        self._poll.stop()

    def _pause(self) -> bool:
        """Asked between files: rest a little, so that the window's thread gets the interpreter without waiting."""
        now = time.monotonic()
        if now - self._rested > _WORK_SECONDS:
            time.sleep(_REST_SECONDS)
            self._rested = time.monotonic()
        return self._worker.interrupted

    def _changed(self, at_once: bool = False) -> None:
        now = time.monotonic()
        self._pending_change = not at_once and now - self._last_change < _CHANGED_SECONDS
        if not self._pending_change:
            self._last_change = now
            self._worker.changed.emit()

    def _tell(self, problems: list[WeftError]) -> None:
        messages = {problem.message for problem in problems}
        new = {problem.message: problem for problem in problems if problem.message not in self._told}
        for problem in list(new.values())[:MAX_PROBLEMS]:
            self._worker.problem.emit(problem)
        self._told = messages

    def _watch(self, folders: list[str]) -> None:
        """Watch what the scan looked into, outer folders first, and files that are not complete yet.

        Where watching does not reach (too many folders, the system's limit, a root that is not there yet), poll.
        """
        roots = [root.path for root in self._worker.current_roots()]
        wanted = sorted(dict.fromkeys(folders), key=lambda path: path.count("/") + path.count("\\"))
        incomplete = self._worker.library.incomplete_files(limit=100)
        watched = set(self._files.directories()) | set(self._files.files())
        keep = set(wanted[:MAX_WATCHED]) | {path for path in incomplete if Path(path).exists()}
        refused: list[str] = []
        # Qt holds Python's lock during each call: a few folders at a time, or the window waits for all of them.
        for paths, change in ((watched - keep, self._files.removePaths), (keep - watched, self._files.addPaths)):
            rest = list(paths)
            while rest and not self._worker.interrupted:
                refused += change(rest[:_WATCHED_AT_ONCE])
                del rest[:_WATCHED_AT_ONCE]
                time.sleep(_REST_SECONDS)
        if refused or len(wanted) > MAX_WATCHED or any(root not in folders for root in roots):
            self._poll.start()
        else:
            self._poll.stop()
