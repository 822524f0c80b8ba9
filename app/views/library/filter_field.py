"""The field that filters a page of the library as one types."""

from __future__ import annotations

from PySide6.QtCore import QTimer, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.views.search_field import SearchField

PAUSE_MS = 80


class FilterField(SearchField):
    """Waits until one stops typing.

    Signals:
        settled(str): what to filter by, after a short pause in typing.
    """

    settled = Signal(str)

    def __init__(self, text: str, parent: QWidget | None = None) -> None:
        super().__init__(text, parent)
        self.setMinimumWidth(140)
        self.setMaximumWidth(360)
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
