"""Buttons whose text is shortened where it does not fit, instead of widening what they stand in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import QSize, Qt
from PySide6.QtGui import QResizeEvent
from PySide6.QtWidgets import QAbstractButton, QCheckBox, QPushButton, QSizePolicy, QWidget

_LEAST = 48  # pixels that are left of a text at least
_Button = QAbstractButton if TYPE_CHECKING else object  # one C++ object has one C++ class


class _Elided(_Button):
    """To be mixed into a kind of button.

    Attributes:
        full: the whole text; shown as far as it fits, which `text()` tells.
        most: pixels that it asks for at most.
    """

    full = ""
    _around = 0
    most = 1 << 20

    def set_full(self, text: str) -> None:
        """Set the text, to be shown as it is (no mnemonics)."""
        self.full = text
        self.ensurePolished()
        self.setText(text.replace("&", "&&"))
        self._around = super().sizeHint().width() - self._width_of(text)  # a box, padding
        self._fit()
        self.updateGeometry()

    def sizeHint(self) -> QSize:
        hint = super().sizeHint()
        return QSize(min(self.most, self._around + self._width_of(self.full) + 2), hint.height())

    def minimumSizeHint(self) -> QSize:
        hint = super().sizeHint()
        return QSize(min(self.sizeHint().width(), self._around + _LEAST), hint.height())

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._fit()

    def _width_of(self, text: str) -> int:
        return self.fontMetrics().horizontalAdvance(text)

    def _fit(self) -> None:
        room = self.width() - self._around
        shown = self.fontMetrics().elidedText(self.full, Qt.TextElideMode.ElideRight, room).replace("&", "&&")
        if shown != self.text():
            self.setText(shown)


class ElidedCheckBox(_Elided, QCheckBox):
    """A check box. Where `fills`, it takes the room that is left."""

    def __init__(self, text: str, most: int = 1 << 20, *, fills: bool = False, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.most = most
        self.setSizePolicy(
            QSizePolicy.Policy.Ignored if fills else QSizePolicy.Policy.Preferred, self.sizePolicy().verticalPolicy()
        )
        self.set_full(text)


class ElidedLink(_Elided, QPushButton):
    """A button that looks like a link."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("kind", "link")
        self.setSizePolicy(QSizePolicy.Policy.Preferred, self.sizePolicy().verticalPolicy())
