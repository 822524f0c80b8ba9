"""Ctrl+L: a filterable popup of all models. Up and down choose, Enter picks, Esc closes."""

from __future__ import annotations

from PySide6.QtCore import QEvent, QModelIndex, QObject, QPersistentModelIndex, QPoint, QRect, QSize, Qt, Signal
from PySide6.QtGui import QKeyEvent, QPainter
from PySide6.QtWidgets import (
    QDialog,
    QFrame,
    QLineEdit,
    QListView,
    QPushButton,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QWidget,
)

from app.core.library import ModelEntry
from app.viewmodels.library_table import EntryRole, FittingRole, MarkedRole
from app.viewmodels.model_table import ModelTable, format_title
from app.viewmodels.units import readable_bytes, readable_count
from app.views.icons import icon
from app.views.theme import theme
from app.views.widgets import button, column, cut_corners, label

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


class ModelPicker(QDialog):
    """The popup. Emits `picked(ModelEntry)`; `more` asks for the Models page."""

    picked = Signal(object)
    more = Signal()

    def __init__(self, model: ModelTable, parent: QWidget) -> None:
        super().__init__(parent, Qt.WindowType.Popup | Qt.WindowType.FramelessWindowHint)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setAttribute(Qt.WidgetAttribute.WA_TranslucentBackground)
        self.setAccessibleName("Choose a model")
        self._model = model
        card = QFrame()
        card.setObjectName("popup")
        self.field = QLineEdit()
        self.field.setPlaceholderText("Find a model")
        self.field.setAccessibleName("Find a model")
        self.field.setClearButtonEnabled(True)
        self.field.addAction(icon("search", "muted"), QLineEdit.ActionPosition.LeadingPosition)
        self.field.installEventFilter(self)
        self.list = QListView()
        self.list.setModel(model)
        self.list.setItemDelegate(_Delegate(self.list))
        self.list.setUniformItemSizes(True)
        self.list.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.list.setAccessibleName("Models")
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.clicked.connect(self._pick)
        self._none = label("", tone="muted", wrap=True)
        self._none.setAlignment(Qt.AlignmentFlag.AlignCenter)
        manage: QPushButton = button("All models…", self._more, kind="link", icon_name="models")
        column(self.field, self.list, self._none, manage, margins=(8, 8, 8, 8), parent=card)
        column(card, parent=self)
        self.field.textChanged.connect(self._filter)
        model.modelReset.connect(self._show_rows)
        model.set_filter("")
        model.refresh()
        self._show_rows()

    def open_below(self, anchor: QWidget) -> None:
        """Show it under `anchor`, inside the screen."""
        window = anchor.window()
        width = min(520, window.width() - 32)
        height = min(480, window.height() - 120)
        self.setFixedSize(width, height)
        cut_corners(self)
        self.move(anchor.mapToGlobal(QPoint(0, anchor.height() + 4)))
        self.show()
        self.field.setFocus()

    def _filter(self, text: str) -> None:
        self._model.set_filter(text)
        self._show_rows()

    def _show_rows(self) -> None:
        count = self._model.rowCount()
        self.list.setVisible(count > 0)
        self._none.setVisible(count == 0)
        self._none.setText(
            "No model has that name." if self.field.text() else "No models found yet. Add a folder on the Models page."
        )
        if count:
            loaded = next((row for row in range(min(count, 50)) if self._model.index(row, 0).data(MarkedRole)), 0)
            self.list.setCurrentIndex(self._model.index(loaded if not self.field.text() else 0, 0))

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if watched is self.field and isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            count = self._model.rowCount()
            page = max(1, self.list.height() // ROW - 1)
            steps = {Qt.Key.Key_Down: 1, Qt.Key.Key_Up: -1, Qt.Key.Key_PageDown: page, Qt.Key.Key_PageUp: -page}
            key = Qt.Key(event.key())
            if key in steps and count:
                row = max(0, min(count - 1, self.list.currentIndex().row() + steps[key]))
                self.list.setCurrentIndex(self._model.index(row, 0))
                return True
            if key in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
                self._pick(self.list.currentIndex())
                return True
        return False

    def _pick(self, index: QModelIndex) -> None:
        entry = index.data(EntryRole) if index.isValid() else None
        if isinstance(entry, ModelEntry):
            self.accept()
            self.picked.emit(entry)

    def _more(self) -> None:
        self.accept()
        self.more.emit()
