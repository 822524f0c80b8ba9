"""The table of models: fixed row heights, columns that give way when the window is narrow."""

from __future__ import annotations

from PySide6.QtCore import QAbstractItemModel, QModelIndex, QPersistentModelIndex, QRect, QSize, Qt, Signal
from PySide6.QtGui import QBrush, QKeyEvent, QPainter, QPen, QResizeEvent
from PySide6.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QLineEdit,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableView,
    QWidget,
)

from app.core.library import AdapterEntry, ModelEntry
from app.viewmodels import model_table
from app.viewmodels.library_table import EntryRole, FittingRole, MarkedRole
from app.views.icons import icon
from app.views.theme import theme

ROW = 36
# Wished widths; the name takes the rest. Columns go in the order of _GIVES_WAY until the name has its minimum.
_WIDTHS = {1: 136, 2: 88, 3: 88, 4: 72, 5: 72, 6: 88, 7: 144, 8: 104}
_GIVES_WAY = (
    model_table.WHERE,
    model_table.ARCHITECTURE,
    model_table.LAST_USED,
    model_table.CONTEXT,
    model_table.PARAMETERS,
    model_table.FORMAT,
)
_NAME_MINIMUM = 200


class RowDelegate(QStyledItemDelegate):
    """Paints one cell: elided text, a dot before what is loaded, a warning before what cannot be used.

    Attributes:
        muted, middle: columns in the weaker colour, and those that are shortened in the middle. fits: the column that has a
            `FittingRole`, -1 for none.
    """

    muted: tuple[int, ...] = (model_table.WHERE, model_table.LAST_USED, model_table.ARCHITECTURE)
    middle: tuple[int, ...] = (model_table.NAME, model_table.WHERE)
    fits = model_table.FITS

    def sizeHint(self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex) -> QSize:
        return QSize(80, ROW)

    def paint(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        look = theme()
        box: QRect = option.rect  # type: ignore[attr-defined]
        selected = bool(option.state & QStyle.StateFlag.State_Selected)  # type: ignore[attr-defined]
        painter.save()
        if selected:
            painter.fillRect(box, look.color("selection"))
        elif option.features & QStyleOptionViewItem.ViewItemFeature.Alternate:  # type: ignore[attr-defined]
            painter.fillRect(box, look.color("alternate"))
        entry: ModelEntry | AdapterEntry | None = index.data(EntryRole)
        column = index.column()
        inner = box.adjusted(8, 0, -8, 0)
        color = "on_selection" if selected else "text"
        if column == model_table.NAME and entry is not None:
            inner = self._mark(painter, inner, index, entry)
            color = "muted" if entry.problem and not selected else color
        elif column == self.fits:
            fitting = index.data(FittingRole)
            if fitting is not None and fitting.tone != "plain" and not selected:
                color = fitting.tone
        elif column in self.muted and not selected:
            color = "muted"
        painter.setPen(look.color(color))
        text = str(index.data() or "")
        mode = Qt.TextElideMode.ElideMiddle if column in self.middle else Qt.TextElideMode.ElideRight
        alignment = Qt.AlignmentFlag(int(index.data(Qt.ItemDataRole.TextAlignmentRole) or 0))
        painter.drawText(inner, alignment, painter.fontMetrics().elidedText(text, mode, inner.width()))
        self._focus_ring(painter, option, index, box)
        painter.restore()

    def _mark(
        self,
        painter: QPainter,
        inner: QRect,
        index: QModelIndex | QPersistentModelIndex,
        entry: ModelEntry | AdapterEntry,
    ) -> QRect:
        if entry.problem:
            icon("warning", "warning").paint(painter, QRect(inner.x(), inner.y() + (ROW - 16) // 2, 16, 16))
            return inner.adjusted(22, 0, 0, 0)
        if index.data(MarkedRole):
            painter.setRenderHint(QPainter.RenderHint.Antialiasing)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme().color("positive"))
            painter.drawEllipse(inner.x(), inner.y() + ROW // 2 - 4, 8, 8)
            return inner.adjusted(16, 0, 0, 0)
        return inner

    def createEditor(
        self, parent: QWidget, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> QWidget:
        editor = QLineEdit(parent)
        editor.setAccessibleName("Name in Weft")
        editor.setPlaceholderText("Empty: the name of the file")
        editor.setMaxLength(200)
        return editor

    def _focus_ring(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex, box: QRect
    ) -> None:
        view = option.widget  # type: ignore[attr-defined]
        if not (isinstance(view, QTableView) and view.hasFocus() and view.currentIndex().row() == index.row()):
            return
        painter.setPen(QPen(QBrush(theme().color("focus")), 2))
        painter.drawLine(box.left(), box.top() + 1, box.right() + 1, box.top() + 1)
        painter.drawLine(box.left(), box.bottom(), box.right() + 1, box.bottom())


class ModelView(QTableView):
    """The table. Enter loads, F2 renames, Delete moves to the trash: the page connects these.

    Attributes:
        widths: wished, by column; the name takes the rest. gives_way: columns that go, in this order, when it is narrow.
    """

    widths: dict[int, int] = _WIDTHS
    gives_way: tuple[int, ...] = _GIVES_WAY

    load_wanted = Signal()
    rename_wanted = Signal()
    trash_wanted = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setAccessibleName("Models")
        self.setItemDelegate(RowDelegate(self))
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setAlternatingRowColors(True)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setSortingEnabled(True)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        rows = self.verticalHeader()
        rows.hide()
        rows.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        rows.setDefaultSectionSize(ROW)
        rows.setMinimumSectionSize(ROW)
        self.verticalScrollBar().setSingleStep(ROW)

    def set_table(self, model: QAbstractItemModel) -> None:
        head = self.horizontalHeader()
        head.setHighlightSections(False)
        head.setSortIndicator(model_table.NAME, Qt.SortOrder.AscendingOrder)
        head.setMinimumSectionSize(56)
        self.setModel(model)
        head.setSectionResizeMode(QHeaderView.ResizeMode.Interactive)
        head.setSectionResizeMode(model_table.NAME, QHeaderView.ResizeMode.Stretch)
        for column, width in self.widths.items():
            self.setColumnWidth(column, width)
        self._fit_columns()

    def _fit_columns(self) -> None:
        if self.model() is None:
            return
        room = self.viewport().width() - _NAME_MINIMUM
        shown = dict(self.widths)
        for column in self.gives_way:
            if sum(shown.values()) <= room:
                break
            shown.pop(column)
        for column in self.widths:
            self.setColumnHidden(column, column not in shown)

    def rename(self, row: int) -> None:
        """Edit a name in place. Enter takes it, Esc does not; the file keeps its own."""
        self.edit(self.model().index(row, model_table.NAME))

    def resizeEvent(self, event: QResizeEvent) -> None:
        self._fit_columns()
        super().resizeEvent(event)

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
        if wanted is not None and event.modifiers() in (
            Qt.KeyboardModifier.NoModifier,
            Qt.KeyboardModifier.KeypadModifier,
        ):
            wanted.emit()
            return
        super().keyPressEvent(event)
