"""The table of what the library holds: a dot before what is in use, a warning before what cannot be used, names edited in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PySide6.QtCore import QAbstractItemModel, QRect, Qt, Signal
from PySide6.QtGui import QKeyEvent, QPainter
from PySide6.QtWidgets import QAbstractItemView, QLineEdit, QStyleOptionViewItem, QWidget

from app.core.library import AdapterEntry, ModelEntry
from app.viewmodels.library_table import NAME, EntryRole, FittingRole, MarkedRole
from app.views.icons import icon
from app.views.row_table import Index, RowCell, RowTable
from app.views.theme import theme


class EntryCell(RowCell):
    """A cell of a model's or an adapter's row.

    Attributes:
        fits: the column that has a `FittingRole`, -1 for none.
    """

    keeps_tone = False
    fits = -1

    def role(self, index: Index) -> str:
        if index.column() == NAME:
            entry: ModelEntry | AdapterEntry | None = index.data(EntryRole)
            return "muted" if entry is not None and entry.problem else "text"
        if index.column() == self.fits:
            fitting = index.data(FittingRole)
            if fitting is not None and fitting.tone != "plain":
                return fitting.tone
        return super().role(index)

    def before(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, inner: QRect) -> QRect:
        entry: ModelEntry | AdapterEntry | None = index.data(EntryRole)
        if index.column() != NAME or entry is None:
            return inner
        if entry.problem:
            icon("warning", "warning").paint(painter, QRect(inner.x(), inner.y() + (self.height - 16) // 2, 16, 16))
            return inner.adjusted(22, 0, 0, 0)
        if index.data(MarkedRole):
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme().color("positive"))
            painter.drawEllipse(inner.x(), inner.y() + self.height // 2 - 4, 8, 8)
            return inner.adjusted(16, 0, 0, 0)
        return inner

    def createEditor(self, parent: QWidget, option: QStyleOptionViewItem, index: Index) -> QWidget:
        editor = QLineEdit(parent)
        editor.setAccessibleName("Name in Weft")
        editor.setPlaceholderText("Empty: the name of the file")
        editor.setMaxLength(200)
        return editor


class LibraryView(RowTable):
    """Enter uses, F2 renames, Delete moves to the trash: the page connects these. The name takes the room that is left."""

    load_wanted = Signal()
    rename_wanted = Signal()
    trash_wanted = Signal()

    def __init__(
        self,
        name: str,
        cell: EntryCell,
        widths: Mapping[int, int],
        gives_way: Sequence[int],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(name, cell, widths, gives_way, stretch=NAME, parent=parent)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setAlternatingRowColors(True)
        self.setSortingEnabled(True)

    def set_model(self, model: QAbstractItemModel) -> None:
        self.horizontalHeader().setSortIndicator(NAME, Qt.SortOrder.AscendingOrder)
        super().set_model(model)

    def rename(self, row: int) -> None:
        """Edit a name in place. Enter takes it, Esc does not; the file keeps its own."""
        self.edit(self.model().index(row, NAME))

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if self.state() == QAbstractItemView.State.EditingState:  # Enter takes the name that was typed, and no more
            super().keyPressEvent(event)
            return
        wanted = {
            Qt.Key.Key_Return: self.load_wanted,
            Qt.Key.Key_Enter: self.load_wanted,
            Qt.Key.Key_F2: self.rename_wanted,
            Qt.Key.Key_Delete: self.trash_wanted,
        }.get(Qt.Key(event.key()))
        plain = (Qt.KeyboardModifier.NoModifier, Qt.KeyboardModifier.KeypadModifier)
        if wanted is not None and event.modifiers() in plain:
            wanted.emit()
            return
        super().keyPressEvent(event)
