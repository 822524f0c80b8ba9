"""The line above the first message that the model still sees."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtGui import QPainter, QPaintEvent
from PySide6.QtWidgets import QLabel, QWidget

from app.views.chat.style import GRID, ChatStyle

MARKER = 40  # its height, and the room below it


class SeenMarker(QLabel):
    """Words in the middle of a line."""

    def __init__(self, style: ChatStyle, parent: QWidget) -> None:
        super().__init__("The model no longer sees the messages above", parent)
        self._style = style
        self.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.setProperty("tone", "muted")
        font = self.font()
        font.setPointSizeF(font.pointSizeF() * 0.9)
        self.setFont(font)

    def paintEvent(self, event: QPaintEvent) -> None:
        half = self.fontMetrics().horizontalAdvance(self.text()) // 2 + 2 * GRID
        middle, y = self.width() // 2, (MARKER - GRID) // 2
        painter = QPainter(self)
        painter.fillRect(0, y, max(0, middle - half), 1, self._style.border)
        painter.fillRect(middle + half, y, max(0, self.width() - middle - half), 1, self._style.border)
        painter.end()
        super().paintEvent(event)
