"""The list of formats: under headings, no longer than the eye takes in, the rest by scrolling."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QSize, Qt
from PySide6.QtGui import QStandardItem, QStandardItemModel
from PySide6.QtWidgets import QWidget

from app.viewmodels.export_choices import ExportChoice
from app.views.option_fields import QuietCombo

_SHOWN = 14


class FormatCombo(QuietCombo):
    """Choices by their keys. Headings, which stand where there is more than one group, cannot be chosen."""

    def __init__(self, choices: Sequence[ExportChoice], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setAccessibleName("Format")
        self.setMaxVisibleItems(_SHOWN)
        self.setStyleSheet("QComboBox { combobox-popup: 0; }")  # a list that scrolls, not a menu as high as the screen
        rows = QStandardItemModel(self)
        groups = list(dict.fromkeys(choice.group for choice in choices))
        for group in groups:
            if len(groups) > 1:
                rows.appendRow(self._heading(group))
            for choice in choices:
                if choice.group == group:
                    item = QStandardItem(choice.title)
                    item.setData(choice.key, Qt.ItemDataRole.UserRole)
                    item.setToolTip(choice.help)
                    rows.appendRow(item)
        height = self.fontMetrics().height() + 8
        for place in range(rows.rowCount()):
            rows.item(place).setSizeHint(QSize(0, height))
        self.setModel(rows)

    def _heading(self, text: str) -> QStandardItem:
        item = QStandardItem(text)
        font = self.font()
        font.setBold(True)
        item.setFont(font)
        item.setFlags(Qt.ItemFlag.NoItemFlags)
        return item
