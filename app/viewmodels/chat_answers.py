"""The answer that is being written: takes what the loadout sends, and saves it within half a second.

An answer goes into the message for which it was asked, whichever conversation is in view. A kill of the window loses no
more than what came since the last save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.conversation import AnswerStatistics
from app.core.errors import ErrorKind, WeftError
from app.engine.protocol import Generated
from app.store.chats import ChatStore
from app.viewmodels.chat_generation import Generation

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout

SAVE_MS = 500  # how much of an answer a kill of the window may lose, at most
_CRASHES = (ErrorKind.CRASHED, ErrorKind.UNRESPONSIVE, ErrorKind.PROTOCOL, ErrorKind.OUT_OF_MEMORY)


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer ended. error: why it broke off, if it did."""

    message: int
    content: str
    complete: bool
    statistics: AnswerStatistics
    error: WeftError | None


class AnswerWriter(QObject):
    """Writes one answer at a time into the store.

    Signals:
        streamed(conversation, message, text): the next batch. begun: the first one came.
        ended(Ending): the answer is over, and in the store, or in `unwritten` when that failed.
        failed(WeftError): something could not be saved; it is tried again.

    Attributes:
        generation: the answer being written. unwritten: those that are over and could not be saved yet, by message.
    """

    streamed = Signal(int, int, str)
    begun = Signal()
    ended = Signal(object)
    failed = Signal(object)

    def __init__(self, store: ChatStore, loadout: Loadout, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._store = store
        self._loadout = loadout
        self.generation: Generation | None = None
        self.unwritten: dict[int, Ending] = {}
        self._save_failed = False
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(SAVE_MS)
        self._timer.timeout.connect(self.save)
        loadout.begun.connect(self._begun)
        loadout.tokens.connect(self._tokens)
        loadout.finished.connect(self._finished)
        loadout.failed.connect(self._failed)

    @property
    def conversation(self) -> int:
        """Where the answer goes, 0 while none is written."""
        return self.generation.conversation if self.generation else 0

    @property
    def received(self) -> bool:
        """Whether the answer has begun to come."""
        return self.generation is not None and self.generation.received

    def text(self, message: int) -> str | None:
        """The text so far of the message that is being written; None of any other."""
        if self.generation is not None and self.generation.message == message:
            return self.generation.text
        return None

    def begin(self, generation: Generation) -> None:
        """Write this answer from now on."""
        self.unwritten.pop(generation.message, None)  # what it said is part of the generation
        self.generation = generation

    def stop(self) -> bool:
        """Stop the answer. False when there is none, or it is being stopped already."""
        if self.generation is None or self.generation.cancelled:
            return False
        self.generation.cancelled = True
        self._loadout.cancel(self.generation.id)
        return True

    def shutdown(self) -> None:
        """The window closes: stop, and save what came."""
        if self.generation is not None:
            self.stop()
            self._end(None, "cancelled", None)
        self.save()

    @Slot()
    def save(self) -> None:
        """Put what came since the last time into the store, and what could not be put there before."""
        for ending in list(self.unwritten.values()):
            self._write(ending)
        generation = self.generation
        if generation is None or not generation.unsaved:
            return
        unsaved = generation.take_unsaved()
        try:
            self._store.append(generation.message, unsaved)
            self._save_failed = False
        except WeftError as error:
            generation.give_back(unsaved)
            self._try_later(error)

    def _write(self, ending: Ending) -> None:
        try:
            self._store.update(
                ending.message, content=ending.content, complete=ending.complete, statistics=ending.statistics
            )
            self.unwritten.pop(ending.message, None)
            self._save_failed = False
        except WeftError as error:
            self.unwritten[ending.message] = ending
            self._try_later(error)

    def _try_later(self, error: WeftError) -> None:
        """The text is kept in memory; why is said once."""
        self._timer.start()
        if not self._save_failed:
            self._save_failed = True
            self.failed.emit(error)

    # What the loadout says --------------------------------------------------------------------------

    @Slot(int)
    def _begun(self, id: int) -> None:
        if self.generation is not None and id == self.generation.id:
            self.generation.begun()

    @Slot(int, str, int)
    def _tokens(self, id: int, text: str, count: int) -> None:
        generation = self.generation
        if generation is None or id != generation.id:
            return
        first = not generation.received
        generation.take(text, count)
        if first:
            self.begun.emit()
        if not self._timer.isActive():
            self._timer.start()
        self.streamed.emit(generation.conversation, generation.message, text)

    @Slot(int, object)
    def _finished(self, id: int, result: object) -> None:
        if self.generation is not None and id == self.generation.id:
            outcome = result if isinstance(result, Generated) else None
            self._end(outcome, outcome.finish_reason if outcome else "stop", None)

    @Slot(int, object)
    def _failed(self, id: int, error: object) -> None:
        generation = self.generation
        if generation is None or id != generation.id:
            return
        assert isinstance(error, WeftError)
        if generation.cancelled or error.kind is ErrorKind.CANCELLED:
            self._end(None, "cancelled", None)
        else:
            self._end(None, "crashed" if error.kind in _CRASHES else "failed", error)

    def _end(self, result: Generated | None, reason: str, error: WeftError | None) -> None:
        generation = self.generation
        assert generation is not None
        self._timer.stop()
        ending = Ending(
            message=generation.message,
            content=generation.text,
            complete=error is None,
            statistics=generation.statistics(result, reason),
            error=error,
        )
        self.generation = None
        self._write(ending)
        self.ended.emit(ending)
