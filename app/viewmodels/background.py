"""Small pieces of blocking work (reading a header, probing memory) off the window's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from PySide6.QtCore import QObject, QRunnable, QThreadPool, Signal, Slot

from app.core.errors import ErrorKind, WeftError

CLOSE_MS = 3000
log = logging.getLogger("weft")


class _Bridge(QObject):
    done = Signal(object, object, object, object)  # key, result, error, the list with the function


class _Work(QRunnable):
    def __init__(self, bridge: _Bridge, key: object, runs: list[Callable[[], Any]]) -> None:
        super().__init__()
        self._bridge, self._key, self._runs = bridge, key, runs

    def run(self) -> None:
        try:
            result, error = self._runs[0](), None
        except WeftError as known:
            result, error = None, known
        except Exception as unknown:
            log.exception("Background work failed")
            result, error = (
                None,
                WeftError(ErrorKind.INTERNAL, f"{type(unknown).__name__}: {unknown}", "The window's log says more."),
            )
        self._bridge.done.emit(self._key, result, error, self._runs)


class Background(QObject):
    """Runs functions in a thread of its own pool; results come back in this object's thread.

    Signals:
        done(key, result, WeftError or None)
    """

    done = Signal(object, object, object)

    def __init__(self, parent: QObject | None = None, threads: int = 1) -> None:
        super().__init__(parent)
        self._pool = QThreadPool(self)
        self._pool.setMaxThreadCount(threads)
        self._bridge = _Bridge(self)
        self._bridge.done.connect(self._deliver)

    def run(self, key: object, work: Callable[[], Any]) -> None:
        # In a list that is emptied in this thread: with the function goes what it refers to, often a widget, which must not be
        # freed in the pool's.
        self._pool.start(_Work(self._bridge, key, [work]))

    def skip_waiting(self) -> None:
        """Forget what has not begun."""
        self._pool.clear()

    def finish(self) -> None:
        """Wait for what was asked: for work whose result must not be lost when the window goes."""
        if not self._pool.waitForDone(CLOSE_MS):
            log.error("Background work did not end within %d s", CLOSE_MS // 1000)

    def close(self) -> None:
        self._pool.clear()
        if not self._pool.waitForDone(CLOSE_MS):
            log.error("Background work did not end within %d s", CLOSE_MS // 1000)

    @Slot(object, object, object, object)
    def _deliver(self, key: object, result: object, error: object, runs: list[Callable[[], Any]]) -> None:
        runs.clear()
        self.done.emit(key, result, error)
