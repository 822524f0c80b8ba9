"""One engine's life as the loadout sees it: signals of an engine that was let go of are heard no more."""

from __future__ import annotations

import logging
from typing import Any

from PySide6.QtCore import QObject, Signal, Slot

log = logging.getLogger("weft")
WAIT_MS = 5000


class EngineSession(QObject):
    """Wraps one EngineWorker. After `drop()` it emits nothing but `gone`, once the worker's thread has ended."""

    ready = Signal(object)
    loaded = Signal(object)
    tokens = Signal(int, str, int)
    row_tokens = Signal(int, int, str, int)
    progress = Signal(int, object)
    done = Signal(int, object)
    failed = Signal(int, object)
    log = Signal(str, str)
    responsive = Signal(bool)
    exited = Signal(object)
    gone = Signal(object)

    def __init__(self, worker: Any, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.worker = worker
        self._dropped = False
        worker.ready.connect(self._ready)
        worker.loaded.connect(self._loaded)
        worker.tokens.connect(self._tokens)
        worker.row_tokens.connect(self._row_tokens)
        worker.progress.connect(self._progress)
        worker.done.connect(self._done)
        worker.failed.connect(self._failed)
        worker.log.connect(self._log)
        worker.responsive.connect(self._responsive)
        worker.exited.connect(self._exited)
        worker.finished.connect(self._finished)

    def start(self) -> None:
        self.worker.start()

    def drop(self) -> None:
        """Let go: the engine is killed, nobody waits for it."""
        self._dropped = True
        self.worker.kill()
        if not self.worker.isRunning():
            self.gone.emit(self)

    def wait(self) -> None:
        """Block until the worker's thread has ended. Only for closing the window."""
        if not self.worker.wait(WAIT_MS):
            log.error("Engine %d did not end within %d s", self.worker.client.pid, WAIT_MS // 1000)

    @Slot(object)
    def _ready(self, event: object) -> None:
        if not self._dropped:
            self.ready.emit(event)

    @Slot(object)
    def _loaded(self, event: object) -> None:
        if not self._dropped:
            self.loaded.emit(event)

    @Slot(int, str, int)
    def _tokens(self, command: int, text: str, count: int) -> None:
        if not self._dropped:
            self.tokens.emit(command, text, count)

    @Slot(int, int, str, int)
    def _row_tokens(self, command: int, row: int, text: str, count: int) -> None:
        if not self._dropped:
            self.row_tokens.emit(command, row, text, count)

    @Slot(int, object)
    def _progress(self, command: int, event: object) -> None:
        if not self._dropped:
            self.progress.emit(command, event)

    @Slot(int, object)
    def _done(self, command: int, result: object) -> None:
        if not self._dropped:
            self.done.emit(command, result)

    @Slot(int, object)
    def _failed(self, command: int, error: object) -> None:
        if not self._dropped:
            self.failed.emit(command, error)

    @Slot(str, str)
    def _log(self, level: str, text: str) -> None:
        if not self._dropped:
            self.log.emit(level, text)

    @Slot(bool)
    def _responsive(self, answers: bool) -> None:
        if not self._dropped:
            self.responsive.emit(answers)

    @Slot(object)
    def _exited(self, end: object) -> None:
        if not self._dropped:
            self.exited.emit(end)

    @Slot()
    def _finished(self) -> None:
        self.gone.emit(self)
