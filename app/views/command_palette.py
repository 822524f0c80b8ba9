"""Ctrl+K: everything by name. Pages, actions, models and conversations; type a part, Enter does it."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import (
    QAbstractListModel,
    QModelIndex,
    QObject,
    QPersistentModelIndex,
    QPoint,
    QRect,
    QSize,
    Qt,
    Slot,
)
from PySide6.QtGui import QPainter
from PySide6.QtWidgets import QLineEdit, QStyle, QStyledItemDelegate, QStyleOptionViewItem, QWidget

from app.views.icons import icon
from app.views.list_popup import ListPopup
from app.views.page import PaletteCommand
from app.views.theme import theme

ROW = 36
AT_MOST = 200


def match(query: str, title: str, group: str = "") -> int:
    """How well a command fits what was typed: higher is better, 0 is not at all.

    Every word must occur in the title or group; starts of words and of the title count more.
    """
    title, group = title.lower(), group.lower()
    score = 1
    for word in query.lower().split():
        place = title.find(word)
        if place < 0:
            if word not in group:
                return 0
            score += 1
        elif place == 0:
            score += 8
        elif not title[place - 1].isalnum():
            score += 5
        else:
            score += 2
    return score


class _Commands(QAbstractListModel):
    def __init__(self, commands: Sequence[PaletteCommand], parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._all = list(commands)
        self.rows = self._all[:AT_MOST]

    def filter(self, text: str) -> None:
        self.beginResetModel()
        scored = [(match(text, c.title, c.group), i) for i, c in enumerate(self._all)]
        best = sorted(((-score, i) for score, i in scored if score), key=lambda pair: pair)
        self.rows = [self._all[i] for _, i in best[:AT_MOST]]
        self.endResetModel()

    def rowCount(self, parent: QModelIndex | QPersistentModelIndex = QModelIndex()) -> int:
        return 0 if parent.isValid() else len(self.rows)

    def data(self, index: QModelIndex | QPersistentModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        command = self.rows[index.row()]
        if role == Qt.ItemDataRole.DisplayRole:
            return command.title
        if role == Qt.ItemDataRole.UserRole:
            return command
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return f"{command.title}, {command.group}"
        return None

    def flags(self, index: QModelIndex | QPersistentModelIndex) -> Qt.ItemFlag:
        usable = self.rows[index.row()].enabled
        return Qt.ItemFlag.ItemIsSelectable | Qt.ItemFlag.ItemIsEnabled if usable else Qt.ItemFlag.NoItemFlags


class _Delegate(QStyledItemDelegate):
    def sizeHint(self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex) -> QSize:
        return QSize(200, ROW)

    def paint(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        command: PaletteCommand = index.data(Qt.ItemDataRole.UserRole)
        look = theme()
        box: QRect = option.rect.adjusted(8, 0, -8, 0)  # type: ignore[attr-defined]
        painter.save()
        chosen = bool(option.state & QStyle.StateFlag.State_Selected)  # type: ignore[attr-defined]
        if chosen:
            painter.setRenderHint(QPainter.RenderHint.Antialiasing)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(look.color("selection"))
            painter.drawRoundedRect(box.adjusted(0, 1, 0, -1), 6, 6)
        metrics = painter.fontMetrics()
        icon(command.icon or "chevron-right", "muted").paint(painter, QRect(box.x() + 8, box.y() + 8, 20, 20))
        right = f"{command.shortcut}    {command.group}" if command.shortcut else command.group
        width = metrics.horizontalAdvance(right)
        painter.setPen(look.color("muted"))
        flags = Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignRight
        painter.drawText(box.adjusted(0, 0, -8, 0), flags, right)
        painter.setPen(look.color("disabled" if not command.enabled else "on_selection" if chosen else "text"))
        room = box.adjusted(40, 0, -width - 24, 0)
        text = metrics.elidedText(command.title.replace("\n", " "), Qt.TextElideMode.ElideRight, room.width())
        painter.drawText(room, Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignLeft, text)
        painter.restore()


class CommandPalette(ListPopup):
    """A field and a list over the window."""

    def __init__(self, commands: Sequence[PaletteCommand], parent: QWidget) -> None:
        field = QLineEdit()
        field.setPlaceholderText("Type a command, a page, a model or a conversation")
        field.setAccessibleName("Command")
        model = _Commands(commands)
        super().__init__("Command palette", field, model, _Delegate(), ROW, parent)
        model.setParent(self)
        self.model = model
        self.list.setAccessibleName("Commands")
        self.list.activated.connect(self._take)
        self._none.setText("Nothing has that name.")
        self._none.setMinimumHeight(72)
        self._filter("")
        width, height = min(640, parent.width() - 64), min(440, parent.height() - 120)
        left, top = (parent.width() - width) // 2, 72
        self._open_at(parent.mapToGlobal(QPoint(left, top)), width, height)
        self.field.setFocus()

    @Slot(str)
    def _filter(self, text: str) -> None:
        self.model.filter(text)
        self._show_list(bool(self.model.rows))
        self._move_to(0, 1)

    def _move_to(self, row: int, step: int) -> None:
        count = len(self.model.rows)
        for _ in range(count):
            row %= count
            if self.model.rows[row].enabled:
                self.list.setCurrentIndex(self.model.index(row))
                return
            row += step

    def _step(self, step: int) -> None:
        """One row on comes round at the end; a page stops there."""
        target = self.list.currentIndex().row() + step
        if abs(step) > 1:
            target = max(0, min(len(self.model.rows) - 1, target))
        self._move_to(target, 1 if step > 0 else -1)

    @Slot(QModelIndex)
    def _take(self, index: QModelIndex) -> None:
        if not index.isValid():
            return
        command: PaletteCommand = index.data(Qt.ItemDataRole.UserRole)
        if command.enabled:
            self.accept()
            command.run()
