"""Finding in a conversation: counts matches in the text as it is shown, a few milliseconds at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from PySide6.QtCore import QObject, QTimer, Signal, Slot
from PySide6.QtGui import QTextCursor, QTextDocument

from app.viewmodels.chat_reasoning import split_reasoning
from app.views.chat.blocks import BlockSplitter
from app.views.chat.style import ChatStyle
from app.views.chat.writer import DocumentWriter

SLICE = 0.008
MOST = 10_000  # matches counted
_MARKUP = re.compile(r"[*_`~\\#>|\[\]()\s]+")


def matches_in(document: QTextDocument, text: str, most: int = MOST) -> list[QTextCursor]:
    """Where a text stands in a document, whatever its case."""
    found: list[QTextCursor] = []
    cursor = QTextCursor(document)
    while len(found) < most:
        cursor = document.find(text, cursor)
        if cursor.isNull():
            break
        found.append(QTextCursor(cursor))
    return found


class Finder(QObject):
    """Looks through messages in order.

    Signals:
        changed: the matches found so far, or which one is shown, changed.
        shown: a message's id and which of its matches is to be shown.
    """

    changed = Signal()
    shown = Signal(int, int)

    def __init__(self, style: Callable[[], ChatStyle], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._style = style
        self._text = ""
        self._messages: list[tuple[int, str, bool]] = []
        self._next = 0
        self._matches: list[tuple[int, int]] = []
        self._at = -1
        self._timer = QTimer(self)
        self._timer.setInterval(0)
        self._timer.timeout.connect(self._work)

    @property
    def text(self) -> str:
        return self._text

    @property
    def at(self) -> int:
        """Which match is shown, from 1; 0 for none."""
        return self._at + 1

    @property
    def count(self) -> int:
        return len(self._matches)

    @property
    def working(self) -> bool:
        return self._timer.isActive()

    def search(self, text: str, messages: list[tuple[int, str, bool]]) -> None:
        """Look for `text` in messages, given as (id, source, whether it is Markdown)."""
        self._text = text
        self._messages = messages if text else []
        self._next = 0
        self._matches = []
        self._at = -1
        self._timer.stop()
        if self._messages:
            self._timer.start()
            self._work()
        self.changed.emit()

    def step(self, step: int) -> None:
        """Go to the next or the previous match, round the end."""
        if self._matches:
            self._at = (self._at + step) % len(self._matches)
            self.shown.emit(*self._matches[self._at])
            self.changed.emit()

    def stop(self) -> None:
        self._timer.stop()
        self._text, self._matches, self._messages, self._at = "", [], [], -1

    @Slot()
    def _work(self) -> None:
        deadline = time.perf_counter() + SLICE
        before = len(self._matches)
        while self._next < len(self._messages) and len(self._matches) < MOST:
            id, source, markdown = self._messages[self._next]
            self._next += 1
            self._matches += [(id, nth) for nth in range(self._count(source, markdown))]
            if time.perf_counter() > deadline:
                break
        else:
            self._timer.stop()
        if len(self._matches) != before:
            if self._at < 0:
                self._at = 0
                self.shown.emit(*self._matches[0])
            self.changed.emit()

    def _count(self, source: str, markdown: bool) -> int:
        answer = split_reasoning(source).answer if markdown else source
        # A quick look that never misses: markup may stand inside the words, so it is left out of both.
        if _MARKUP.sub("", self._text).casefold() not in _MARKUP.sub("", answer).casefold():
            return 0
        splitter = BlockSplitter(markup=markdown)
        splitter.feed(answer)
        splitter.finish()
        document = QTextDocument()
        document.setUndoRedoEnabled(False)
        writer = DocumentWriter(document, self._style())
        for block in splitter.take():
            writer.write(block)
        return len(matches_in(document, self._text))
