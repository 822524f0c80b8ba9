"""Short tasks whose answer is shown at once and kept nowhere, run by a child that stays while questions come. No jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.engine import protocol

if TYPE_CHECKING:
    from app.engine.client import EngineClient
    from app.workers.engine_worker import EngineWorker

CLOSE_MS = 5000
IDLE_MS = 30_000


class TaskLane(QObject):
    """Asks one question at a time: a newer one takes the place of the one before.

    Args:
        make_client: makes the child, not started; may raise WeftError.

    Signals:
        answered(key, result dict), failed(key, WeftError): of the latest question.
    """

    answered = Signal(object, object)
    failed = Signal(object, object)

    def __init__(self, make_client: Callable[[], EngineClient], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._make_client = make_client
        self._worker: EngineWorker | None = None
        self._ending: list[EngineWorker] = []
        self._command = 0
        self._key: object = None
        self._idle = QTimer(self)
        self._idle.setSingleShot(True)
        self._idle.setInterval(IDLE_MS)
        self._idle.timeout.connect(self.stop)

    def ask(self, key: object, task: str, parameters: msgspec.Struct) -> None:
        """Run a task. `key` comes back with the answer."""
        self.forget()
        self._idle.stop()
        try:
            self._command = self._lane().send(
                protocol.RunTask(task=task, parameters=msgspec.json.encode(parameters).decode())
            )
            self._key = key
        except WeftError as error:
            self._worker = None
            self.failed.emit(key, error)

    def forget(self) -> None:
        """The answer that is awaited is no longer wanted."""
        if self._command and self._worker is not None:
            self._worker.cancel(self._command)
        self._command = 0

    @Slot()
    def stop(self) -> None:
        """End the child; the next question starts another."""
        worker, self._worker = self._worker, None
        self._command = 0
        if worker is not None:
            self._ending.append(worker)
            worker.kill()

    def close(self) -> None:
        """For the window's end."""
        self.stop()
        for worker in self._ending:
            worker.wait(CLOSE_MS)

    def _lane(self) -> EngineWorker:
        if self._worker is None:
            from app.workers.engine_worker import EngineWorker

            worker = EngineWorker(self._make_client(), self)
            worker.done.connect(self._done)
            worker.failed.connect(self._failed)
            worker.exited.connect(self._exited)
            worker.finished.connect(self._gone)
            self._worker = worker
            worker.start()
        return self._worker

    def _is_mine(self, command: int) -> bool:
        mine = self.sender() is self._worker and command == self._command and command != 0
        if mine:
            self._command = 0
            self._idle.start()
        return mine

    @Slot(int, object)
    def _done(self, command: int, result: object) -> None:
        if self._is_mine(command) and isinstance(result, protocol.TaskResult):
            self.answered.emit(self._key, json.loads(result.json))

    @Slot(int, object)
    def _failed(self, command: int, error: WeftError) -> None:
        if self._is_mine(command) and error.kind is not ErrorKind.CANCELLED:
            self.failed.emit(self._key, error)

    @Slot(object)
    def _exited(self, end: object) -> None:
        if self.sender() is not self._worker:
            return
        waits = self._command != 0
        self._worker, self._command = None, 0
        if waits:
            error = getattr(end, "error", None)
            lost = WeftError(ErrorKind.CRASHED, "The process that measures ended unexpectedly.", "Try again.")
            self.failed.emit(self._key, error if isinstance(error, WeftError) else lost)

    @Slot()
    def _gone(self) -> None:
        worker = cast("EngineWorker", self.sender())
        if worker in self._ending:
            self._ending.remove(worker)
        worker.deleteLater()
