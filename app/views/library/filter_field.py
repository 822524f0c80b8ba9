"""The field that filters a page of the library as one types."""

from __future__ import annotations

from PySide6.QtCore import QTimer, Signal, Slot
from PySide6.QtWidgets import QLineEdit, QWidget

from app.views.icons import icon

PAUSE_MS = 80


class FilterField(QLineEdit):
    """A field with a glass.

    Signals:
        settled(str): what to filter by, after a short pause in typing.
    """

    settled = Signal(str)

    def __init__(self, text: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setPlaceholderText(text)
        self.setAccessibleName(text)
        self.setClearButtonEnabled(True)
        self.setMinimumWidth(140)
        self.setMaximumWidth(360)
        self.addAction(icon("search", "muted"), QLineEdit.ActionPosition.LeadingPosition)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(PAUSE_MS)
        self._later.timeout.connect(self.settle)
        self.textChanged.connect(self._later.start)

    @Slot()
    def settle(self) -> None:
        """Filter now."""
        self._later.stop()
        self.settled.emit(self.text())
