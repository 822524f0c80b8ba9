"""Ctrl+K: everything by name. Pages, actions, models and conversations; type a part, Enter does it."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QAbstractListModel, QEvent, QModelIndex, QObject, QPersistentModelIndex, QRect, QSize, Qt
from PySide6.QtGui import QKeyEvent, QPainter
from PySide6.QtWidgets import (
    QDialog,
    QFrame,
    QLineEdit,
    QListView,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QWidget,
)

from app.views.icons import icon
from app.views.page import PaletteCommand
from app.views.theme import theme
from app.views.widgets import column, cut_corners, label

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
    def __init__(self, commands: Sequence[PaletteCommand], parent: QObject) -> None:
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
        return QSize(200, 36)

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


class CommandPalette(QDialog):
    """A field and a list over the window. Up and down choose, Enter runs, Esc closes."""

    def __init__(self, commands: Sequence[PaletteCommand], parent: QWidget) -> None:
        super().__init__(parent, Qt.WindowType.Popup | Qt.WindowType.FramelessWindowHint)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setAttribute(Qt.WidgetAttribute.WA_TranslucentBackground)
        self.setAccessibleName("Command palette")
        card = QFrame()
        card.setObjectName("popup")
        self.field = QLineEdit()
        self.field.setPlaceholderText("Type a command, a page, a model or a conversation")
        self.field.setAccessibleName("Command")
        self.field.installEventFilter(self)
        self.model = _Commands(commands, self)
        self.list = QListView()
        self.list.setModel(self.model)
        self.list.setItemDelegate(_Delegate(self.list))
        self.list.setUniformItemSizes(True)
        self.list.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.list.setAccessibleName("Commands")
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.activated.connect(self._run)
        self.list.clicked.connect(self._run)
        self._none = label("Nothing has that name.", tone="muted")
        self._none.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._none.setMinimumHeight(72)
        column(self.field, self.list, self._none, margins=(8, 8, 8, 8), parent=card)
        column(card, parent=self)
        self.field.textChanged.connect(self._filter)
        self._filter("")
        self._place(parent)
        self.field.setFocus()

    def _place(self, parent: QWidget) -> None:
        width = min(640, parent.width() - 64)
        height = min(440, parent.height() - 120)
        self.setFixedSize(width, height)
        cut_corners(self)
        self.move(
            parent.mapToGlobal(parent.rect().topLeft()).x() + (parent.width() - width) // 2,
            parent.mapToGlobal(parent.rect().topLeft()).y() + 72,
        )

    def _filter(self, text: str) -> None:
        self.model.filter(text)
        self.list.setVisible(bool(self.model.rows))
        self._none.setVisible(not self.model.rows)
        self._move_to(0, 1)

    def _move_to(self, row: int, step: int) -> None:
        count = len(self.model.rows)
        for _ in range(count):
            row %= count
            if self.model.rows[row].enabled:
                self.list.setCurrentIndex(self.model.index(row))
                return
            row += step

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if watched is self.field and isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            row = self.list.currentIndex().row()
            page = max(1, self.list.height() // 36 - 1)
            steps = {Qt.Key.Key_Down: 1, Qt.Key.Key_Up: -1, Qt.Key.Key_PageDown: page, Qt.Key.Key_PageUp: -page}
            key = Qt.Key(event.key())
            if key in steps and self.model.rows:
                step = steps[key]
                target = row + step
                if abs(step) > 1:
                    target = max(0, min(len(self.model.rows) - 1, target))
                self._move_to(target, 1 if step > 0 else -1)
                return True
            if key in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
                self._run(self.list.currentIndex())
                return True
        return False

    def _run(self, index: QModelIndex) -> None:
        if not index.isValid():
            return
        command: PaletteCommand = index.data(Qt.ItemDataRole.UserRole)
        if command.enabled:
            self.accept()
            command.run()
