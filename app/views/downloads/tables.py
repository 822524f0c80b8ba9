"""What the window's tables share: fixed row heights, painting, columns that give way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PySide6.QtCore import QEvent, QModelIndex, QPersistentModelIndex, QRect, QRectF, QSize, Qt, Signal
from PySide6.QtGui import QBrush, QKeyEvent, QPainter, QPen, QResizeEvent
from PySide6.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableView,
    QWidget,
)

from app.store.downloads import DownloadState
from app.viewmodels import download_table, hub_tables
from app.viewmodels.download_table import STATE_WORDS, DownloadRole, file_text
from app.viewmodels.downloads import Row
from app.viewmodels.hub_tables import FileRow
from app.views.icons import icon
from app.views.theme import theme

ROW = 36
QUEUE_ROW = 48
Index = QModelIndex | QPersistentModelIndex


class _Cell(QStyledItemDelegate):
    """Paints one cell; subclasses say in which colour, and what stands before the text."""

    height = ROW
    muted: frozenset[int] = frozenset()
    middle: frozenset[int] = frozenset()  # columns whose text is shortened in the middle

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(80, self.height)

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        look = theme()
        box: QRect = option.rect  # type: ignore[attr-defined]
        selected = bool(option.state & QStyle.StateFlag.State_Selected)  # type: ignore[attr-defined]
        painter.save()
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        if selected:
            painter.fillRect(box, look.color("selection"))
        inner = self.before(painter, option, index, box.adjusted(8, 0, -8, 0))
        role = self.role(index)
        painter.setPen(look.color("on_selection" if selected and role in ("text", "muted") else role))
        mode = Qt.TextElideMode.ElideMiddle if index.column() in self.middle else Qt.TextElideMode.ElideRight
        alignment = Qt.AlignmentFlag(int(index.data(Qt.ItemDataRole.TextAlignmentRole) or 0x81))
        text = painter.fontMetrics().elidedText(str(index.data() or "").replace("\n", " "), mode, inner.width())
        painter.drawText(inner, alignment, text)
        self.focus_ring(painter, option, index, box)
        painter.restore()

    def role(self, index: Index) -> str:
        """The palette's colour of the text."""
        return "muted" if index.column() in self.muted else "text"

    def before(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, inner: QRect) -> QRect:
        """Draw what stands before (or below) the text; returns what is left for it."""
        return inner

    def focus_ring(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, box: QRect) -> None:
        view = option.widget  # type: ignore[attr-defined]
        if not (isinstance(view, QTableView) and view.hasFocus() and view.currentIndex().row() == index.row()):
            return
        painter.setPen(QPen(QBrush(theme().color("focus")), 2))
        painter.drawLine(box.left(), box.top() + 1, box.right() + 1, box.top() + 1)
        painter.drawLine(box.left(), box.bottom(), box.right() + 1, box.bottom())


class ResultCell(_Cell):
    muted = frozenset({hub_tables.KIND, hub_tables.DOWNLOADS, hub_tables.LIKES, hub_tables.UPDATED})
    middle = frozenset({hub_tables.REPO})


class FileCell(_Cell):
    muted = frozenset({hub_tables.QUANTIZATION, hub_tables.NOTE})
    middle = frozenset({hub_tables.FILE})

    def role(self, index: Index) -> str:
        row: FileRow = index.data(hub_tables.RowRole)
        if index.column() == hub_tables.NOTE and row.here and not row.problem:
            return "positive"
        if index.column() == hub_tables.FITS and row.fitting is not None and row.fitting.tone != "plain":
            return row.fitting.tone
        if index.column() == hub_tables.NOTE and row.problem:
            return "warning"
        return super().role(index)

    def before(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, inner: QRect) -> QRect:
        if index.column() != hub_tables.FILE:
            return inner
        row: FileRow = index.data(hub_tables.RowRole)
        box = QRectF(inner.x() + 0.5, inner.y() + (inner.height() - 16) / 2 + 0.5, 15, 15)
        look = theme()
        painter.setPen(QPen(look.color("accent" if row.checked else "control"), 1))
        painter.setBrush(look.color("accent") if row.checked else look.color("base"))
        painter.drawRoundedRect(box, 4, 4)
        if row.checked:
            icon("check", "on_accent").paint(painter, box.toRect())
        return inner.adjusted(26, 0, 0, 0)

    def editorEvent(self, event: QEvent, model: object, option: QStyleOptionViewItem, index: Index) -> bool:
        # The whole cell is the target, not only the 16 pixels of the box.
        if event.type() != QEvent.Type.MouseButtonRelease or index.column() != hub_tables.FILE:
            return event.type() == QEvent.Type.MouseButtonDblClick
        return _toggle(index)


class QueueCell(_Cell):
    height = QUEUE_ROW
    muted = frozenset({download_table.SPEED, download_table.LEFT})
    middle = frozenset({download_table.NAME})

    def role(self, index: Index) -> str:
        row: Row = index.data(DownloadRole)
        if index.column() == download_table.PROGRESS:
            if row.state is DownloadState.FAILED:
                return "negative"
            if row.waits or (row.news is not None and row.news.waiting):
                return "warning"
            return "muted"
        return super().role(index)

    def before(self, painter: QPainter, option: QStyleOptionViewItem, index: Index, inner: QRect) -> QRect:
        row: Row = index.data(DownloadRole)
        if index.column() == download_table.NAME:
            _, mark, tone = STATE_WORDS[row.state]
            icon(mark, tone).paint(painter, QRect(inner.x(), inner.y() + (inner.height() - 18) // 2, 18, 18))
            return self._second_line(painter, option, row, inner.adjusted(28, 0, 0, 0))
        if index.column() == download_table.PROGRESS and row.state is not DownloadState.DONE:
            track = QRectF(inner.x(), inner.bottom() - 14, inner.width(), 4)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(theme().color("border"))
            painter.drawRoundedRect(track, 2, 2)
            if row.fraction > 0:
                painter.setBrush(theme().color("accent" if row.worker is not None else "control"))
                painter.drawRoundedRect(QRectF(track.x(), track.y(), max(4.0, track.width() * row.fraction), 4), 2, 2)
            return inner.adjusted(0, 0, 0, -14)
        return inner

    def _second_line(self, painter: QPainter, option: QStyleOptionViewItem, row: Row, inner: QRect) -> QRect:
        """The file at work, below the name; returns the name's own room."""
        text = file_text(row)
        if not text:
            return inner
        half = inner.height() // 2
        selected = bool(option.state & QStyle.StateFlag.State_Selected)  # type: ignore[attr-defined]
        painter.setPen(theme().color("on_selection" if selected else "muted"))
        below = inner.adjusted(0, half - 1, 0, -5)
        text = painter.fontMetrics().elidedText(text, Qt.TextElideMode.ElideMiddle, below.width())
        painter.drawText(below, Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter, text)
        return inner.adjusted(0, 5, 0, 1 - half)


class Table(QTableView):
    """A table of fixed row heights whose first column takes the room that the others leave.

    Args:
        widths: of the other columns, by number. gives_way: columns that go when it is narrow, in this order.
        stretch: the column that takes the rest, and the least that it must have.

    Signals:
        opened(index): Enter or a double click. removed: Delete. toggled(index): the space bar.
    """

    opened = Signal(QModelIndex)
    removed = Signal()

    def __init__(
        self,
        name: str,
        cell: _Cell,
        widths: Mapping[int, int],
        gives_way: Sequence[int] = (),
        *,
        stretch: int = 0,
        least: int = 220,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._widths, self._gives_way, self._stretch, self._least = dict(widths), tuple(gives_way), stretch, least
        cell.setParent(self)
        self.setAccessibleName(name)
        self.setItemDelegate(cell)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        rows = self.verticalHeader()
        rows.hide()
        rows.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        rows.setMinimumSectionSize(cell.height)
        rows.setDefaultSectionSize(cell.height)
        self.verticalScrollBar().setSingleStep(cell.height)
        self.doubleClicked.connect(self.opened)

    def set_model(self, model: object) -> None:
        self.setModel(model)  # type: ignore[arg-type]
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

    def resizeEvent(self, event: QResizeEvent) -> None:
        self._fit_columns()
        super().resizeEvent(event)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key, index = Qt.Key(event.key()), self.currentIndex()
        if key in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and index.isValid():
            self.opened.emit(index)
        elif key == Qt.Key.Key_Delete:
            self.removed.emit()
        elif key == Qt.Key.Key_Space and index.isValid() and _toggle(index.siblingAtColumn(0)):
            return
        else:
            super().keyPressEvent(event)


def _toggle(index: Index) -> bool:
    """Check or uncheck a cell; false when it is none that can be."""
    state = index.data(Qt.ItemDataRole.CheckStateRole)
    if state is None:
        return False
    other = Qt.CheckState.Unchecked if Qt.CheckState(state) == Qt.CheckState.Checked else Qt.CheckState.Checked
    model = index.model()
    return model.setData(QModelIndex(index), other, Qt.ItemDataRole.CheckStateRole)  # type: ignore[union-attr]
