"""The desk where requests are handed in: sends them to the engine and tells their ends under the ids that were given out."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.viewmodels.loadout_requests import Request, Requests


class RequestDesk(QObject):
    """Requests from when they are asked to when they end.

    Signals:
        begun, tokens, row_tokens, progress, finished, failed: as the loadout's.
        rested: the engine ended one; told before `finished` or `failed`.
    """

    begun = Signal(int)
    tokens = Signal(int, str, int)
    row_tokens = Signal(int, int, str, int)
    progress = Signal(int, object)
    finished = Signal(int, object)
    failed = Signal(int, object)
    rested = Signal()
    _later = Signal(int, object)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._requests = Requests()
        self._later.connect(self.failed)

    @property
    def busy(self) -> bool:
        """Whether the engine works on any."""
        return self._requests.busy

    # Handing in -----------------------------------------------------------------------------------

    def new_id(self) -> int:
        return self._requests.new_id()

    def wait(self, ours: int, request: Request) -> None:
        """It waits for the model, or for the stack."""
        self._requests.queued[ours] = request

    def send(self, worker: Any, ours: int, request: Request) -> None:
        """Hand it to the engine."""
        try:
            engine_id = worker.send(request)
        except WeftError as error:
            self.fail_later(ours, error)
            return
        self._requests.begin(engine_id, ours)
        self.begun.emit(ours)

    def send_waiting(self, worker: Any) -> None:
        """Hand everything that waits to the engine, in order."""
        for ours, request in self._requests.take_queued().items():
            self.send(worker, ours, request)

    # Ending ---------------------------------------------------------------------------------------

    def fail_later(self, request: int, error: WeftError) -> None:
        """Tell that it failed, never from within a call: the caller of generate() does not know the id yet."""
        QTimer.singleShot(0, self, lambda: self._later.emit(request, error))

    def give_up(self, request: int, error: WeftError) -> bool:
        """End one that waits. False when it does not."""
        if self._requests.queued.pop(request, None) is None:
            return False
        self.fail_later(request, error)
        return True

    def give_up_waiting(self, error: WeftError) -> None:
        """End everything that waits."""
        for request in self._requests.take_queued():
            self.fail_later(request, error)

    def cancel(self, request: int, worker: Any) -> None:
        """Stop one, whether it waits or the engine works on it."""
        if self.give_up(request, WeftError(ErrorKind.CANCELLED, "Cancelled.")):
            return
        if (engine_id := self._requests.engine_id(request)) and worker is not None:
            worker.cancel(engine_id)

    def take_lost(self, error: WeftError, *, queued: bool) -> dict[int, WeftError]:
        """See `Requests.take_lost`; telling is the caller's."""
        return self._requests.take_lost(error, queued=queued)

    # What the engine says ---------------------------------------------------------------------------

    @Slot(int, str, int)
    def tokens_came(self, engine_id: int, text: str, count: int) -> None:
        if ours := self._requests.running(engine_id):
            self.tokens.emit(ours, text, count)

    @Slot(int, int, str, int)
    def row_tokens_came(self, engine_id: int, row: int, text: str, count: int) -> None:
        if ours := self._requests.running(engine_id):
            self.row_tokens.emit(ours, row, text, count)

    def progress_came(self, engine_id: int, event: Progress) -> None:
        if ours := self._requests.running(engine_id):
            self.progress.emit(ours, event)

    def done(self, engine_id: int, result: object) -> None:
        if ours := self._requests.end(engine_id):
            self.rested.emit()
            self.finished.emit(ours, result)

    def refused(self, engine_id: int, error: WeftError, *, dead: bool) -> None:
        """The engine failed at it. dead: it ended with the engine, whose end is told next."""
        if dead and self._requests.running(engine_id):
            # Told together with the engine's end, so that nobody hears of it while the state is still BUSY.
            self._requests.keep_last_words(engine_id, error)
        elif ours := self._requests.end(engine_id):
            self.rested.emit()
            self.failed.emit(ours, error)
