"""The strip above a code block: its language and a copy button."""

from __future__ import annotations

from PySide6.QtCore import Qt, QTimer, Signal, Slot
from PySide6.QtGui import QPalette
from PySide6.QtWidgets import QHBoxLayout, QLabel, QToolButton, QWidget

from app.views.chat.pen import CodeBlock
from app.views.chat.style import ChatStyle


class CodeHeader(QWidget):
    """Lies over the space that the document leaves free above a code block.

    Signals:
        copy_requested: the code block's source, exactly as the model wrote it.
    """

    copy_requested = Signal(str)

    def __init__(self, style: ChatStyle, language: str, parent: QWidget) -> None:
        super().__init__(parent)
        self.code = CodeBlock(id=0, language=language, text="", position=0)
        row = QHBoxLayout(self)
        row.setContentsMargins(11, 0, 4, 0)
        label = QLabel(language or "text", self)
        label.setTextFormat(Qt.TextFormat.PlainText)
        palette = QPalette(self.palette())
        for role in (QPalette.ColorRole.WindowText, QPalette.ColorRole.ButtonText, QPalette.ColorRole.Text):
            palette.setColor(role, style.muted)
        self.setPalette(palette)
        font = label.font()
        font.setPointSizeF(font.pointSizeF() * 0.88)
        label.setFont(font)
        self._button = QToolButton(self)
        self._button.setText("Copy")
        self._button.setFont(font)
        self._button.setAutoRaise(True)
        self._button.setCursor(Qt.CursorShape.PointingHandCursor)
        self._button.setToolTip("Copy this code")
        self._button.setAccessibleName(f"Copy the {language or 'text'} code")
        self._button.clicked.connect(self._copy)
        self.setCursor(Qt.CursorShape.ArrowCursor)
        row.addWidget(label)
        row.addStretch(1)
        row.addWidget(self._button)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.timeout.connect(self._copied_long_ago)

    @Slot()
    def _copy(self) -> None:
        self.copy_requested.emit(self.code.text)
        self._button.setText("Copied")
        self._timer.start(1500)

    @Slot()
    def _copied_long_ago(self) -> None:
        self._button.setText("Copy")
