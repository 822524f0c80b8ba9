"""Code blocks of a message: the strips above them, with a copy button each, and their colours, a slice at a time."""

from __future__ import annotations

import time
from collections import deque
from typing import cast

from PySide6.QtCore import QObject, QRectF, Slot
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QTextBrowser

from app.views.chat.code_block import CodeHeader
from app.views.chat.highlight import CodeHighlighter
from app.views.chat.layout import CODE_HEADER, CODE_PADDING
from app.views.chat.pen import CodeBlock, Pen
from app.views.chat.style import ChatStyle


class Progress:
    """How far a text is written. It is shared, so that the view and its parts need not hold each other.

    Attributes:
        changed: position in the document from which on this slice of work changes it.
        code_grows: whether the last code block is still being written.
    """

    def __init__(self) -> None:
        self.changed = 0
        self.code_grows = False

    def touch(self, position: int) -> None:
        """The document changes from here on."""
        self.changed = min(self.changed, position)


class CodeStrips(QObject):
    """What lies over the code blocks of a text view, which is its parent.

    Attributes:
        headers: the strips, by the code block's id, from top to bottom.
    """

    def __init__(self, view: QTextBrowser) -> None:
        super().__init__(view)
        self.headers: dict[int, CodeHeader] = {}

    @property
    def _view(self) -> QTextBrowser:
        return cast(QTextBrowser, self.parent())

    def reset(self, pen: Pen, style: ChatStyle, progress: Progress) -> None:
        """Another text begins."""
        self._pen, self._style, self._progress = pen, style, progress
        self._colored_due = 0.0
        self._runs: deque[tuple[int, CodeHighlighter]] = deque()
        self._colored: dict[int, int] = {}  # code id: length of the text last coloured
        self._applied: dict[int, dict[int, tuple[tuple[int, int, str], ...]]] = {}
        for header in self.headers.values():
            header.deleteLater()
        self.headers = {}

    @property
    def busy(self) -> bool:
        """Whether colour is still to come."""
        return bool(self._runs)

    def watch(self) -> None:
        """The text has grown: give new code blocks their strips, and changed ones their colours."""
        for code in self._pen.codes:
            if code.id not in self.headers:
                header = CodeHeader(self._style, code.language, self._view.viewport())
                header.copy_requested.connect(self._copy)
                header.code = code
                self.headers[code.id] = header
                header.show()
            if code.highlightable and self._colored.get(code.id) != len(code.text):
                self._color(code)

    def forget(self, codes: int) -> None:
        """The text was cut back to its first code blocks."""
        for gone in [id for id in self.headers if id > codes]:
            self.headers.pop(gone).deleteLater()
            self._colored.pop(gone, None)
            self._applied.pop(gone, None)
        self._runs = deque(entry for entry in self._runs if entry[0] <= codes)

    def _color(self, code: CodeBlock) -> None:
        if any(id == code.id for id, _ in self._runs):
            return  # when that run ends, the next one starts
        now = time.perf_counter()
        if self._progress.code_grows and code is self._pen.codes[-1]:
            if now < self._colored_due:
                return  # it still grows: lexing it all again for each batch would be quadratic
            self._colored_due = now + 0.2 + len(code.text) / 30_000
        self._colored[code.id] = len(code.text)
        applied = self._applied.setdefault(code.id, {})
        run = CodeHighlighter(
            self._view.document(), code.position, code.text, code.language, self._style.syntax(), applied
        )
        self._runs.append((code.id, run))

    def work(self, deadline: float) -> bool:
        """Colour until `deadline` (time.perf_counter). Returns whether more is to come."""
        # Layout is the dear part: colour only where the layout has room left in this slice.
        deadline = max(deadline, time.perf_counter() + 0.001)
        while self._runs:
            self._progress.touch(self._runs[0][1].position)
            if not self._runs[0][1].step(deadline):
                return True
            self._runs.popleft()
            self.watch()
            if time.perf_counter() > deadline:
                break
        return bool(self._runs)

    @Slot(str)
    def _copy(self, text: str) -> None:
        QGuiApplication.clipboard().setText(text)

    def place(self, changed: int = 0) -> None:
        """Put the strips where they belong; of those that end before `changed`, none has moved."""
        offset = self._view.horizontalScrollBar().value()
        for header in reversed(self.headers.values()):
            if header.code.end < changed:
                break
            rect = self.rect(header.code)
            header.setGeometry(
                round(rect.x()) - offset + 1, round(rect.y()) + 1, max(60, round(rect.width()) - 2), CODE_HEADER - 1
            )

    def rect(self, code: CodeBlock) -> QRectF:
        """Where a code block is painted, in document coordinates."""
        document = self._view.document()
        layout = document.documentLayout()
        first, last = document.findBlock(code.position), document.findBlock(code.end)
        top = layout.blockBoundingRect(first).top() - CODE_HEADER - CODE_PADDING
        bottom = layout.blockBoundingRect(last).bottom() + CODE_PADDING
        left = first.blockFormat().leftMargin() - CODE_PADDING - 2
        return QRectF(left, top, document.textWidth() - left, bottom - top)
