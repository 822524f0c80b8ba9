"""Ctrl+F in a conversation: the bar, the search and the marks, tied together. Built when it is first wanted."""

from __future__ import annotations

from PySide6.QtCore import QObject, Signal, Slot

from app.viewmodels.chat import ChatController
from app.views.chat.find import Finder, matches_in
from app.views.chat.find_bar import FindBar
from app.views.chat.style import GRID
from app.views.chat.transcript import Transcript


class ConversationFind(QObject):
    """Finds text in the messages in view.

    Signals:
        closed: the bar was closed; the keyboard is free.
    """

    closed = Signal()

    def __init__(self, transcript: Transcript, controller: ChatController, parent: QObject) -> None:
        super().__init__(parent)
        self._transcript, self._controller = transcript, controller
        self.bar = FindBar(transcript)
        self.finder = Finder(lambda: transcript.style_in_use, self)
        self.bar.searched.connect(self._search)
        self.bar.stepped.connect(self.finder.step)
        self.bar.closed.connect(self._bar_closed)
        self.finder.changed.connect(self._found)
        self.finder.shown.connect(self._show_match)

    def open(self) -> None:
        self.bar.open_bar()
        self.place()

    def close(self) -> bool:
        """Close the bar. False when it was not open."""
        if not self.bar.isVisible():
            return False
        self.bar.close_bar()
        return True

    def place(self) -> None:
        """Put the bar into the corner of the transcript."""
        self.bar.adjustSize()
        self.bar.move(self._transcript.viewport().width() - self.bar.width() - 2 * GRID, GRID)
        self._transcript.set_covered(self.bar.geometry().bottom() if self.bar.isVisible() else 0)

    @Slot(str)
    def _search(self, text: str) -> None:
        controller = self._controller
        messages = [(m.id, controller.text(m.id), m.role == "assistant") for m in controller.path]
        self._clear_marks()
        self.finder.search(text, messages)

    @Slot()
    def _found(self) -> None:
        self.bar.set_count(self.finder.at, self.finder.count)

    @Slot()
    def _bar_closed(self) -> None:
        self._transcript.set_covered(0)
        self.finder.stop()
        self._clear_marks()
        self.closed.emit()

    def _clear_marks(self) -> None:
        for view in self._transcript.views:
            view.view.setExtraSelections([])

    @Slot(int, int)
    def _show_match(self, message: int, nth: int) -> None:
        self._transcript.show_message(message)
        view = self._transcript.view_of(message)
        if view is None:
            return
        view.view.render_all()
        found = matches_in(view.view.document(), self.finder.text)
        if nth < len(found):
            view.view.mark_matches(found, nth)
            place = view.view.cursorRect(found[nth])
            self._transcript.show_message(message, view.view.y() + place.top(), place.height() + 2 * GRID)
