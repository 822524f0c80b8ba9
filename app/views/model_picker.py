"""Ctrl+L: a filterable popup of all models. Up and down choose, Enter picks, Esc closes."""

from __future__ import annotations

from PySide6.QtCore import QModelIndex, QPersistentModelIndex, QPoint, QRect, QSize, Qt, Signal, Slot
from PySide6.QtGui import QPainter
from PySide6.QtWidgets import QStyle, QStyledItemDelegate, QStyleOptionViewItem, QWidget

from app.core.library import ModelEntry
from app.viewmodels.library_table import EntryRole, FittingRole, MarkedRole
from app.viewmodels.model_table import ModelTable, format_title
from app.viewmodels.units import readable_bytes, readable_count
from app.views.list_popup import ListPopup
from app.views.search_field import SearchField
from app.views.theme import theme
from app.views.widgets import button

ROW = 48


class _Delegate(QStyledItemDelegate):
    def sizeHint(self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex) -> QSize:
        return QSize(200, ROW)

    def paint(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        entry: ModelEntry | None = index.data(EntryRole)
        if entry is None:
            return
        look = theme()
        box: QRect = option.rect  # type: ignore[attr-defined]
        painter.save()
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        if option.state & QStyle.StateFlag.State_Selected:  # type: ignore[attr-defined]
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(look.color("selection"))
            painter.drawRoundedRect(box.adjusted(0, 1, 0, -1), 6, 6)
        inner = box.adjusted(12, 6, -12, -6)
        left = Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter
        right = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        metrics = painter.fontMetrics()
        top, bottom = QRect(inner), QRect(inner)
        top.setHeight(inner.height() // 2)
        bottom.setTop(top.bottom() + 1)
        note, tone = _note(entry, index)
        width = metrics.horizontalAdvance(note)
        painter.setPen(look.color(tone))
        painter.drawText(top, right, note)
        painter.setPen(look.color("text"))
        painter.drawText(
            top.adjusted(0, 0, -width - 12, 0),
            left,
            metrics.elidedText(entry.name, Qt.TextElideMode.ElideMiddle, top.width() - width - 12),
        )
        painter.setPen(look.color("muted"))
        parts = [
            format_title(entry),
            readable_count(entry.parameters),
            readable_bytes(entry.bytes),
            entry.model_type or entry.architecture,
        ]
        line = " · ".join(part for part in parts if part and part != "–")
        painter.drawText(bottom, left, metrics.elidedText(line, Qt.TextElideMode.ElideRight, bottom.width()))
        painter.restore()


def _note(entry: ModelEntry, index: QModelIndex | QPersistentModelIndex) -> tuple[str, str]:
    if index.data(MarkedRole):
        return "Loaded", "positive"
    if entry.problem:
        return "Cannot be used", "negative"
    fitting = index.data(FittingRole)
    if fitting is None:
        return "", "muted"
    return (
        ("Does not fit", "negative")
        if fitting.tone == "negative"
        else (f"Fits {fitting.word}" if fitting.tone == "positive" else "", "muted")
    )


class ModelPicker(ListPopup):
    """The popup. Emits `picked(ModelEntry)`; `more` asks for the Models page."""

    picked = Signal(object)
    more = Signal()

    def __init__(self, model: ModelTable, parent: QWidget) -> None:
        super().__init__("Choose a model", SearchField("Find a model"), model, _Delegate(), ROW, parent)
        self._model = model
        self.list.setAccessibleName("Models")
        self.card.addWidget(button("All models…", self._more, kind="link", icon_name="models"))
        model.modelReset.connect(self._show_rows)
        model.set_filter("")
        model.refresh()
        self._show_rows()

    def open_below(self, anchor: QWidget) -> None:
        """Show it under `anchor`, inside the screen."""
        window = anchor.window()
        width, height = min(520, window.width() - 32), min(480, window.height() - 120)
        self._open_at(anchor.mapToGlobal(QPoint(0, anchor.height() + 4)), width, height)
        self.show()
        self.field.setFocus()

    @Slot(str)
    def _filter(self, text: str) -> None:
        self._model.set_filter(text)
        self._show_rows()

    @Slot()
    def _show_rows(self) -> None:
        count = self._model.rowCount()
        self._show_list(count > 0)
        self._none.setText(
            "No model has that name." if self.field.text() else "No models found yet. Add a folder on the Models page."
        )
        if count:
            loaded = next((row for row in range(min(count, 50)) if self._model.index(row, 0).data(MarkedRole)), 0)
            self.list.setCurrentIndex(self._model.index(loaded if not self.field.text() else 0, 0))

    def _step(self, step: int) -> None:
        row = max(0, min(self._model.rowCount() - 1, self.list.currentIndex().row() + step))
        self.list.setCurrentIndex(self._model.index(row, 0))

    @Slot(QModelIndex)
    def _take(self, index: QModelIndex) -> None:
        entry = index.data(EntryRole) if index.isValid() else None
        if isinstance(entry, ModelEntry):
            self.accept()
            self.picked.emit(entry)

    def _more(self) -> None:
        self.accept()
        self.more.emit()
