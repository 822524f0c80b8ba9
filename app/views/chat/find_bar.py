"""Find in the conversation: Ctrl+F."""

from __future__ import annotations

from PySide6.QtCore import QEvent, QObject, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QFrame, QLineEdit, QWidget

from app.views.widgets import icon_button, label, row


class FindBar(QFrame):
    """A field with a counter and arrows.

    Signals:
        searched: another text.
        stepped: +1 to the next match, -1 to the one before.
        closed: the bar was closed.
    """

    searched = Signal(str)
    stepped = Signal(int)
    closed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("popup")
        self.field = QLineEdit()
        self.field.setPlaceholderText("Find in this conversation")
        self.field.setAccessibleName("Find in this conversation")
        self.field.setClearButtonEnabled(True)
        self.field.setFixedWidth(240)
        self.field.installEventFilter(self)
        self.field.textChanged.connect(self._changed)
        self._count = label("", tone="muted")
        self._count.setMinimumWidth(64)
        self._count.setAlignment(Qt.AlignmentFlag.AlignCenter)
        back = icon_button("chevron-up", "Previous match", shortcut="Shift+Enter")
        on = icon_button("chevron-down", "Next match", shortcut="Enter")
        close = icon_button("close", "Close", shortcut="Esc")
        back.clicked.connect(self._back)
        on.clicked.connect(self._on)
        close.clicked.connect(self.close_bar)
        row(self.field, self._count, back, on, close, margins=(8, 8, 8, 8), spacing=4, parent=self)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(120)
        self._timer.timeout.connect(self._search)
        self.hide()

    def open_bar(self) -> None:
        """Show it with its text selected."""
        self.show()
        self.raise_()
        self.field.setFocus(Qt.FocusReason.ShortcutFocusReason)
        self.field.selectAll()
        if self.field.text():
            self._search()

    @Slot()
    def close_bar(self) -> None:
        self._timer.stop()
        self.hide()
        self.closed.emit()

    def set_count(self, at: int, count: int) -> None:
        """Which of how many matches is shown."""
        text = "" if not self.field.text() else "no matches" if not count else f"{at} of {count}"
        self._count.setText(text)
        self._count.setAccessibleName(text)

    @property
    def count_text(self) -> str:
        return self._count.text()

    @Slot()
    def _changed(self) -> None:
        self._timer.start()

    @Slot()
    def _search(self) -> None:
        self.searched.emit(self.field.text())

    @Slot()
    def _back(self) -> None:
        self.stepped.emit(-1)

    @Slot()
    def _on(self) -> None:
        self.stepped.emit(1)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if watched is self.field and isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
                if self._timer.isActive():
                    self._timer.stop()
                    self._search()
                else:
                    self.stepped.emit(-1 if event.modifiers() & Qt.KeyboardModifier.ShiftModifier else 1)
                return True
            if event.key() == Qt.Key.Key_Escape:
                self.close_bar()
                return True
        return False
