"""Asks before a link leaves Weft, and shows where it really leads."""

from __future__ import annotations

from PySide6.QtCore import Qt, QUrl
from PySide6.QtGui import QDesktopServices, QGuiApplication
from PySide6.QtWidgets import QMessageBox, QPushButton, QWidget

from app.views.chat.parse import safe_link


def shown_target(target: str) -> str:
    """The address in full; a host in other letters also as the network sees it, because letters can be made to look alike."""
    url = QUrl(target)
    ace = bytes(QUrl.toAce(url.host()).data()).decode() if url.host() else ""
    shown = target if len(target) <= 500 else target[:480] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{shown}\n(host: {ace})" if ace and ace != url.host().lower() else shown


class LinkDialog(QMessageBox):
    """Open, copy, or leave it."""

    def __init__(self, target: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._target = safe_link(target)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setWindowTitle("Open link")
        self.setIcon(QMessageBox.Icon.NoIcon)
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setText(f"Open this link in your browser?\n\n{shown_target(target)}")
        self.setTextInteractionFlags(
            Qt.TextInteractionFlag.TextSelectableByMouse | Qt.TextInteractionFlag.TextSelectableByKeyboard
        )
        self.open_button: QPushButton = self.addButton("Open", QMessageBox.ButtonRole.AcceptRole)
        self.copy_button: QPushButton = self.addButton("Copy address", QMessageBox.ButtonRole.ActionRole)
        cancel = self.addButton(QMessageBox.StandardButton.Cancel)
        self.setDefaultButton(cancel)
        self.open_button.clicked.connect(self._open)
        self.copy_button.clicked.connect(self._copy)

    def _open(self) -> None:
        if self._target:
            QDesktopServices.openUrl(QUrl(self._target))

    def _copy(self) -> None:
        QGuiApplication.clipboard().setText(self._target)
