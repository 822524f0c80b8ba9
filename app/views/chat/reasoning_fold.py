"""What a model thought before it answered: folded, with the time that it took."""

from __future__ import annotations

import time

import msgspec
from PySide6.QtCore import QRect, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QPainter, QPaintEvent
from PySide6.QtWidgets import QToolButton, QWidget

from app.views.chat.markdown_view import MarkdownView
from app.views.chat.style import GRID, ChatStyle
from app.views.icons import icon

HEADER = 32


class ReasoningFold(QWidget):
    """A header that opens and closes the reasoning.

    Signals:
        height_changed: it needs another height.
        link_activated: see MarkdownView.
    """

    height_changed = Signal()
    link_activated = Signal(str)

    def __init__(self, style: ChatStyle, parent: QWidget) -> None:
        super().__init__(parent)
        self._style = msgspec.structs.replace(style, text=style.muted)
        self._text = ""
        self._view: MarkdownView | None = None
        self._since = self._took = 0.0
        self._header = QToolButton(self)
        self._header.setCheckable(True)
        self._header.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self._header.setObjectName("foldHeader")
        self._header.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self._header.toggled.connect(self._toggled)
        self._timer = QTimer(self)
        self._timer.setInterval(1000)
        self._timer.timeout.connect(self._tick)
        self._toggled(False)

    @property
    def title(self) -> str:
        return self._header.text()

    @property
    def view(self) -> MarkdownView | None:
        """The text, once it has been opened."""
        return self._view

    def set_open(self, opened: bool) -> None:
        self._header.setChecked(opened)

    def set_reasoning(self, text: str, *, thinking: bool, seconds: float) -> None:
        """Show this text; while `thinking`, the header counts the seconds."""
        grown = text.startswith(self._text)
        added, self._text = text[len(self._text) :] if grown else text, text
        if self._view is not None and added:
            if thinking and grown:
                self._view.feed(added)
            else:
                self._view.begin_stream(text) if thinking else self._view.set_markdown(text)
        if thinking:
            self._since = self._since or time.monotonic()
            if not self._timer.isActive():
                self._timer.start()
            self._tick()
        else:
            self._timer.stop()
            if self._view is not None:
                self._view.finish()
            if not seconds and self._since:
                seconds = self._took = self._took or time.monotonic() - self._since
            self._set_title(f"Thought for {_duration(seconds)}" if seconds else "Thoughts")

    @Slot()
    def _tick(self) -> None:
        self._set_title(f"Thinking\N{HORIZONTAL ELLIPSIS} {_duration(time.monotonic() - self._since)}")

    def _set_title(self, title: str) -> None:
        self._header.setText(title)
        self._header.setAccessibleName(title)
        self._header.resize(self._header.fontMetrics().horizontalAdvance(self._header.text()) + 36, HEADER - 4)

    @Slot(bool)
    def _toggled(self, opened: bool) -> None:
        self._header.setIcon(icon("chevron-down" if opened else "chevron-right", "muted"))
        if opened and self._view is None:
            self._view = MarkdownView(self._style, parent=self)
            self._view.height_changed.connect(self.height_changed)
            self._view.link_activated.connect(self.link_activated)
            self._view.height_for(max(40, self.width() - 3 * GRID))
            if self._timer.isActive():
                self._view.begin_stream(self._text)
            else:
                self._view.set_markdown(self._text)
        if self._view is not None:
            self._view.setVisible(opened)
        self.height_changed.emit()

    def height_for(self, width: int) -> int:
        """Pixels needed at this width; places what is inside."""
        self._header.move(0, 0)
        self._header.resize(self._header.fontMetrics().horizontalAdvance(self._header.text()) + 36, HEADER - 4)
        if self._view is None or not self._header.isChecked():
            return HEADER
        inner = width - 3 * GRID
        height = self._view.height_for(inner)
        self._view.setGeometry(QRect(3 * GRID, HEADER, inner, height))
        return HEADER + height + GRID

    def paintEvent(self, event: QPaintEvent) -> None:
        if self._header.isChecked():
            painter = QPainter(self)
            painter.fillRect(QRect(GRID, HEADER, 2, self.height() - HEADER - GRID), self._style.border)


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
