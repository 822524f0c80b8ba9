"""A popup with a field and a list below it: Up and Down choose, Enter takes, Esc closes; the field keeps the focus."""

from __future__ import annotations

from abc import abstractmethod

from PySide6.QtCore import QAbstractItemModel, QEvent, QModelIndex, QObject, QPoint, Qt
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QDialog, QFrame, QLineEdit, QListView, QStyledItemDelegate, QVBoxLayout, QWidget

from app.views.widgets import column, cut_corners, label


class ListPopup(QDialog):
    """What is marked abstract is a popup's own.

    Args:
        name: for screen readers. field: what is typed in. listed: what the list shows, in rows of `row` pixels.

    Attributes:
        card: lays out the field, the list and what follows.
    """

    def __init__(
        self,
        name: str,
        field: QLineEdit,
        listed: QAbstractItemModel,
        cell: QStyledItemDelegate,
        row: int,
        parent: QWidget,
    ) -> None:
        super().__init__(parent, Qt.WindowType.Popup | Qt.WindowType.FramelessWindowHint)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setAttribute(Qt.WidgetAttribute.WA_TranslucentBackground)
        self.setAccessibleName(name)
        self._row = row
        card = QFrame()
        card.setObjectName("popup")
        self.field = field
        self.field.installEventFilter(self)
        self.list = QListView()
        cell.setParent(self.list)
        self.list.setModel(listed)
        self.list.setItemDelegate(cell)
        self.list.setUniformItemSizes(True)
        self.list.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.clicked.connect(self._take)
        self._none = label(tone="muted", wrap=True)
        self._none.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.card: QVBoxLayout = column(self.field, self.list, self._none, margins=(8, 8, 8, 8), parent=card)
        column(card, parent=self)
        self.field.textChanged.connect(self._filter)

    @abstractmethod
    def _filter(self, text: str) -> None:
        """Show what has this text."""

    @abstractmethod
    def _step(self, step: int) -> None:
        """Choose another row, `step` further down."""

    @abstractmethod
    def _take(self, index: QModelIndex) -> None:
        """This one is it."""

    def _open_at(self, place: QPoint, width: int, height: int) -> None:
        """Show it with its upper left corner there, in pixels of the screen."""
        self.setFixedSize(width, height)
        cut_corners(self)
        self.move(place)

    def _show_list(self, shown: bool) -> None:
        """The list, or the sentence that stands for it."""
        self.list.setVisible(shown)
        self._none.setVisible(not shown)

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if watched is not self.field or not isinstance(event, QKeyEvent) or event.type() != QEvent.Type.KeyPress:
            return False
        page = max(1, self.list.height() // self._row - 1)
        steps = {Qt.Key.Key_Down: 1, Qt.Key.Key_Up: -1, Qt.Key.Key_PageDown: page, Qt.Key.Key_PageUp: -page}
        key = Qt.Key(event.key())
        if key in steps and self.list.model().rowCount():
            self._step(steps[key])
            return True
        if key in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
            self._take(self.list.currentIndex())
            return True
        return False
