"""A field that finds something: a glass before the text, a cross behind it."""

from __future__ import annotations

from PySide6.QtWidgets import QLineEdit, QWidget

from app.views.icons import icon


class SearchField(QLineEdit):
    """Says in grey, and to screen readers, what it finds."""

    def __init__(self, text: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setPlaceholderText(text)
        self.setAccessibleName(text)
        self.setClearButtonEnabled(True)
        self.addAction(icon("search", "muted"), QLineEdit.ActionPosition.LeadingPosition)
