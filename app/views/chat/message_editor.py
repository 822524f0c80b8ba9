"""Editing a message in place."""

from __future__ import annotations

from PySide6.QtCore import QRect, Qt, Signal, Slot
from PySide6.QtGui import QKeyEvent, QTextCursor
from PySide6.QtWidgets import QPlainTextEdit, QWidget

from app.views.chat.style import GRID
from app.views.widgets import button, label

_BUTTONS = 40


class _Edit(QPlainTextEdit):
    accepted = Signal()
    rejected = Signal()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        control = bool(event.modifiers() & Qt.KeyboardModifier.ControlModifier)
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and control:
            self.accepted.emit()
        elif event.key() == Qt.Key.Key_Escape:
            self.rejected.emit()
        else:
            super().keyPressEvent(event)


class MessageEditor(QWidget):
    """A text field with two buttons. Ctrl+Enter accepts, Esc gives up.

    Signals:
        finished: whether the change is wanted.
        height_changed: the text grew or shrank.
    """

    finished = Signal(bool)
    height_changed = Signal()

    def __init__(self, text: str, *, user: bool, parent: QWidget) -> None:
        super().__init__(parent)
        self._edit = _Edit(self)
        self._edit.setPlainText(text)
        self._edit.setAccessibleName("Edit your message" if user else "Edit the answer")
        self._edit.setTabChangesFocus(True)
        self._edit.document().setDocumentMargin(8)
        self._hint = label(
            "Your message is sent again as another version." if user else "The answer is kept as another version.",
            tone="muted",
            parent=self,
        )
        self._accept = button("Send" if user else "Save", kind="primary", parent=self)
        self._reject = button("Cancel", parent=self)
        self._accept.clicked.connect(self._accepted)
        self._reject.clicked.connect(self._rejected)
        self._edit.accepted.connect(self._accepted)
        self._edit.rejected.connect(self._rejected)
        self._edit.textChanged.connect(self._changed)
        self.setTabOrder(self._edit, self._accept)
        self.setTabOrder(self._accept, self._reject)

    @property
    def text(self) -> str:
        return self._edit.toPlainText()

    def focus(self) -> None:
        self._edit.setFocus()
        self._edit.moveCursor(QTextCursor.MoveOperation.End)

    @Slot()
    def _changed(self) -> None:
        self._accept.setEnabled(bool(self.text.strip()))
        self.height_changed.emit()

    @Slot()
    def _accepted(self) -> None:
        if self.text.strip():
            self.finished.emit(True)

    @Slot()
    def _rejected(self) -> None:
        self.finished.emit(False)

    def height_for(self, width: int) -> int:
        """Places everything at this width and returns the height that it takes."""
        self._edit.resize(width, max(40, self._edit.height()))
        lines = min(20, max(2, round(self._edit.document().size().height())))
        height = lines * self._edit.fontMetrics().lineSpacing() + 24
        self._edit.setGeometry(0, 0, width, height)
        x = width
        for made in (self._accept, self._reject):
            size = made.sizeHint()
            x -= size.width()
            made.setGeometry(QRect(x, height + GRID, size.width(), size.height()))
            x -= GRID
        self._hint.setGeometry(0, height + GRID, max(0, x), self._accept.sizeHint().height())
        return height + GRID + _BUTTONS
