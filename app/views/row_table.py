"""What the window's tables share: rows of one height, painted cells, columns that give way when there is little room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PySide6.QtCore import QAbstractItemModel, QModelIndex, QPersistentModelIndex, QRect, QSize, Qt
from PySide6.QtGui import QBrush, QPainter, QPen, QResizeEvent
from PySide6.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableView,
    QWidget,
)

from app.views.theme import theme

Index = QModelIndex | QPersistentModelIndex


class RowCell(QStyledItemDelegate):
    """Paints one cell; subclasses say in which colour, and what stands before the text.

    Attributes:
        height: of a row. muted, middle: columns in the weaker colour, and those that are shortened in the middle.
        keeps_tone: a selected row keeps colours that mean something, such as a failure's.
    """

    height = 36
    keeps_tone = True
    muted: frozenset[int] = frozenset()
    middle: frozenset[int] = frozenset()

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(80, self.height)

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        look = theme()
        box: QRect = option.rect  # type: ignore[attr-defined]
        selected = is_selected(option)
        painter.save()
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        if selected:
            painter.fillRect(box, look.color("selection"))
        elif option.features & QStyleOptionViewItem.ViewItemFeature.Alternate:  # type: ignore[attr-defined]
            painter.fillRect(box, look.color("alternate"))
        inner = self.before(painter, option, index, box.adjusted(8, 0, -8, 0))
        role = self.role(index)
        if selected and (role in ("text", "muted") or not self.keeps_tone):
            role = "on_selection"
        painter.setPen(look.color(role))
        mode = Qt.TextElideMode.ElideMiddle if index.column() in self.middle else Qt.TextElideMode.ElideRight
        alignment = Qt.AlignmentFlag(int(index.data(Qt.ItemDataRole.TextAlignmentRole) or 0x81))
        text = painter.fontMetrics().elidedText(str(index.data() or "").replace("\n", " "), mode, inner.width())
        painter.drawText(inner, alignment, text)
        self._focus_ring(painter, option, index, box)
        painter.restore()

    def role(self, index: Index) -> str:
        """The palette's colour of the text where the row is not selected."""
        return "muted" if index.column() in self.muted else "text"

    def before(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, inner: QRect) -> QRect:
        """Draw what stands before (or below) the text; returns what is left for it."""
        return inner

    def _focus_ring(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, box: QRect) -> None:
        """Around the current row, while the keyboard is here."""
        view = option.widget  # type: ignore[attr-defined]
        if not (isinstance(view, QTableView) and view.hasFocus() and view.currentIndex().row() == index.row()):
            return
        painter.setPen(QPen(QBrush(theme().color("focus")), 2))
        painter.drawLine(box.left(), box.top() + 1, box.right() + 1, box.top() + 1)
        painter.drawLine(box.left(), box.bottom(), box.right() + 1, box.bottom())


def is_selected(option: QStyleOptionViewItem) -> bool:
    """Whether the row is."""
    return bool(option.state & QStyle.StateFlag.State_Selected)  # type: ignore[attr-defined]


class RowTable(QTableView):
    """A table of rows of one height, where one column takes the room that the others leave.

    Args:
        widths: of the other columns, by number. gives_way: columns that go when it is narrow, in this order.
        stretch: the column that takes the rest, and the least that it must have.
        shares: columns that grow with the table: each is this part of it, and its width at least.
    """

    def __init__(
        self,
        name: str,
        cell: RowCell,
        widths: Mapping[int, int],
        gives_way: Sequence[int] = (),
        *,
        stretch: int = 0,
        least: int = 200,
        shares: Mapping[int, float] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._widths, self._gives_way, self._stretch, self._least = dict(widths), tuple(gives_way), stretch, least
        self._shares, self._given = dict(shares or {}), dict[int, int]()
        cell.setParent(self)
        self.setAccessibleName(name)
        self.setItemDelegate(cell)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        rows = self.verticalHeader()
        rows.hide()
        rows.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        rows.setMinimumSectionSize(cell.height)
        rows.setDefaultSectionSize(cell.height)
        self.verticalScrollBar().setSingleStep(cell.height)

    def set_model(self, model: QAbstractItemModel) -> None:
        """Show this; the columns get their widths."""
        self.setModel(model)
        head = self.horizontalHeader()
        head.setHighlightSections(False)
        head.setMinimumSectionSize(48)
        head.setSectionResizeMode(QHeaderView.ResizeMode.Interactive)
        head.setSectionResizeMode(self._stretch, QHeaderView.ResizeMode.Stretch)
        for column, width in self._widths.items():
            self.setColumnWidth(column, width)
        self._fit_columns()

    def _fit_columns(self) -> None:
        if self.model() is None:
            return
        room, shown = self.viewport().width() - self._least, dict(self._widths)
        for column in self._gives_way:
            if sum(shown.values()) <= room:
                break
            shown.pop(column)
        for column in self._widths:
            self.setColumnHidden(column, column not in shown)
        for column, share in self._shares.items():
            wanted = max(self._widths[column], int(share * self.viewport().width()))
            if self.columnWidth(column) == self._given.get(column, self._widths[column]):  # else a person dragged it
                self.setColumnWidth(column, wanted)
                self._given[column] = wanted

    def resizeEvent(self, event: QResizeEvent) -> None:
        self._fit_columns()
        super().resizeEvent(event)
