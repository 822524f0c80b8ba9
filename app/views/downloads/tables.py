"""The tables of the Downloads window: what the hub has, the files of one repository, the queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PySide6.QtCore import QEvent, QModelIndex, QRect, QRectF, Qt, Signal
from PySide6.QtGui import QKeyEvent, QPainter, QPen
from PySide6.QtWidgets import QStyleOptionViewItem

from app.store.downloads import DownloadState
from app.viewmodels import download_table, hub_tables
from app.viewmodels.download_table import STATE_WORDS, DownloadRole, file_text
from app.viewmodels.downloads import Row
from app.viewmodels.file_rows import FileRow
from app.views.icons import icon
from app.views.row_table import Index, RowCell, RowTable, is_selected
from app.views.theme import theme

QUEUE_ROW = 48


class ResultCell(RowCell):
    muted = frozenset({hub_tables.KIND, hub_tables.DOWNLOADS, hub_tables.LIKES, hub_tables.UPDATED})
    middle = frozenset({hub_tables.REPO})


class FileCell(RowCell):
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


class QueueCell(RowCell):
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
        painter.setPen(theme().color("on_selection" if is_selected(option) else "muted"))
        below = inner.adjusted(0, half - 1, 0, -5)
        text = painter.fontMetrics().elidedText(text, Qt.TextElideMode.ElideMiddle, below.width())
        painter.drawText(below, Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter, text)
        return inner.adjusted(0, 5, 0, 1 - half)


class Table(RowTable):
    """A table of what can be downloaded, or is.

    Signals:
        opened(index): Enter or a double click. removed: Delete.
    """

    opened = Signal(QModelIndex)
    removed = Signal()

    def __init__(
        self, name: str, cell: RowCell, widths: Mapping[int, int], gives_way: Sequence[int] = (), *, least: int = 220
    ) -> None:
        super().__init__(name, cell, widths, gives_way, least=least)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.doubleClicked.connect(self.opened)

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
