"""The side bar: all conversations, searched through their whole text."""

from __future__ import annotations

from PySide6.QtCore import QModelIndex, QPersistentModelIndex, QPoint, QRect, QSize, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QFont, QKeyEvent, QPainter
from PySide6.QtWidgets import (
    QAbstractItemView,
    QFrame,
    QLineEdit,
    QListView,
    QMenu,
    QSizePolicy,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QWidget,
)

from app.viewmodels.chat_list import ConversationList, ListRole
from app.views.chat.style import GRID
from app.views.icons import icon, pixmap
from app.views.search_field import SearchField
from app.views.theme import theme
from app.views.widgets import button, column, icon_button, label, row

ROW = 34
SEARCH_MS = 150
FORMATS = (("markdown", "Markdown"), ("json", "JSON, with all versions"), ("sharegpt", "ShareGPT"))


class _Delegate(QStyledItemDelegate):
    """Paints a title, a heading, a pin or the mark of an answer being written."""

    def sizeHint(self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex) -> QSize:
        return QSize(80, ROW)

    def paint(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        colors = theme()
        rect: QRect = option.rect  # type: ignore[attr-defined]
        text = str(index.data(Qt.ItemDataRole.DisplayRole))
        font: QFont = QFont(option.font)  # type: ignore[attr-defined]
        painter.save()
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        if index.data(ListRole.HEADING):
            font.setPointSizeF(font.pointSizeF() * 0.88)
            font.setWeight(QFont.Weight.DemiBold)
            painter.setFont(font)
            painter.setPen(colors.color("muted"))
            painter.drawText(rect.adjusted(2 * GRID, 6, -GRID, -2), Qt.AlignmentFlag.AlignVCenter, text)
            painter.restore()
            return
        state = option.state  # type: ignore[attr-defined]

        box = rect.adjusted(GRID, 1, -GRID, -1)
        selected = bool(state & QStyle.StateFlag.State_Selected)
        if selected or state & QStyle.StateFlag.State_MouseOver:
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(colors.color("selection" if selected else "hover"))
            painter.drawRoundedRect(box, 6, 6)
        if state & QStyle.StateFlag.State_HasFocus and selected:
            painter.setPen(colors.color("focus"))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRoundedRect(box.adjusted(0, 0, -1, -1), 6, 6)
        inner = box.adjusted(GRID, 0, -GRID, 0)
        mark = "pin" if index.data(ListRole.PINNED) else ""
        if index.data(ListRole.WRITING):
            mark = "continue"
        if mark:
            ratio = painter.device().devicePixelRatioF()
            place = QPoint(inner.right() - 14, inner.center().y() - 7)
            painter.drawPixmap(place, pixmap(mark, 16, ratio, "accent" if mark == "continue" else "muted"))
            inner.setRight(inner.right() - 20)
        painter.setFont(font)
        painter.setPen(colors.color("on_selection" if selected else "text"))
        title = painter.fontMetrics().elidedText(" ".join(text.split()), Qt.TextElideMode.ElideRight, inner.width())
        painter.drawText(inner, Qt.AlignmentFlag.AlignVCenter, title)
        painter.restore()

    def createEditor(
        self, parent: QWidget, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> QWidget:
        editor = QLineEdit(parent)
        editor.setAccessibleName("Title")
        editor.setMaxLength(200)
        return editor

    def updateEditorGeometry(
        self, editor: QWidget, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        editor.setGeometry(option.rect.adjusted(GRID, 1, -GRID, -1))  # type: ignore[attr-defined]


class _List(QListView):
    pressed_delete = Signal()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() == Qt.Key.Key_Delete:
            self.pressed_delete.emit()
        else:
            super().keyPressEvent(event)


class ConversationPanel(QFrame):
    """New chat, search, and the list.

    Signals:
        chosen: a conversation to open. new_wanted: begin a chat.
        pin_wanted: a conversation, and whether it is to be pinned. delete_wanted: put it into the bin.
        export_wanted: conversations and a format. import_wanted: choose files.
    """

    chosen = Signal(int)
    new_wanted = Signal()
    pin_wanted = Signal(int, bool)
    delete_wanted = Signal(int)
    export_wanted = Signal(list, str)
    import_wanted = Signal()

    def __init__(self, model: ConversationList, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("sideList")
        self.model = model
        new = button("New chat", icon_name="plus", tip="New chat (Ctrl+N)")
        new.clicked.connect(self.new_wanted)
        more = icon_button("more", "Import and export")
        more.clicked.connect(self._more)
        self._more_button = more
        self.field = SearchField("Search all chats")
        self.list = _List()
        self.list.setModel(model)
        self.list.setItemDelegate(_Delegate(self.list))
        self.list.setUniformItemSizes(True)
        self.list.setMouseTracking(True)
        self.list.setAccessibleName("Chats")
        self.list.setFrameShape(QFrame.Shape.NoFrame)
        self.list.setObjectName("chatList")
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.list.verticalScrollBar().setSingleStep(ROW)
        self.list.setEditTriggers(QAbstractItemView.EditTrigger.EditKeyPressed)
        self.list.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.list.customContextMenuRequested.connect(self._menu)
        self.list.clicked.connect(self._clicked)
        self.list.activated.connect(self._clicked)
        self.list.pressed_delete.connect(self._delete_current)
        self.empty = label("", tone="muted", wrap=True)
        self.empty.setAlignment(Qt.AlignmentFlag.AlignHCenter)
        self.empty.setAlignment(Qt.AlignmentFlag.AlignHCenter | Qt.AlignmentFlag.AlignTop)
        self.empty.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Expanding)
        self.empty.setContentsMargins(2 * GRID, 3 * GRID, 2 * GRID, GRID)
        top = QWidget()
        column(_holder(new, more), self.field, spacing=GRID, margins=(12, 12, 12, 8), parent=top)
        top.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        layout = column(top, self.empty, self.list, spacing=0, parent=self)
        layout.setStretch(2, 1)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(SEARCH_MS)
        self._timer.timeout.connect(self._search)
        self.field.textChanged.connect(self._typed)
        self.field.returnPressed.connect(self._take_first)
        model.modelReset.connect(self._show_empty)
        self._show_empty()

    def set_current(self, conversation: int) -> None:
        """Mark the conversation in view; 0 marks none."""
        at = self.model.row_of(conversation)
        if at < 0:
            self.list.clearSelection()
            self.list.setCurrentIndex(QModelIndex())
        elif self.list.currentIndex().row() != at:
            self.list.setCurrentIndex(self.model.index(at))

    def rename(self, conversation: int) -> None:
        """Edit its title in place."""
        at = self.model.row_of(conversation)
        if at >= 0:
            self.list.setCurrentIndex(self.model.index(at))
            self.list.edit(self.model.index(at))

    def _id(self, index: QModelIndex) -> int:
        conversation = self.model.conversation(index.row()) if index.isValid() else None
        return conversation.id if conversation is not None else 0

    @Slot(QModelIndex)
    def _clicked(self, index: QModelIndex) -> None:
        if id := self._id(index):
            self.chosen.emit(id)

    @Slot()
    def _delete_current(self) -> None:
        if id := self._id(self.list.currentIndex()):
            self.delete_wanted.emit(id)

    @Slot(str)
    def _typed(self) -> None:
        self._timer.start()

    @Slot()
    def _search(self) -> None:
        self.model.search(self.field.text().strip())
        self._show_empty()

    @Slot()
    def _take_first(self) -> None:
        self._timer.stop()
        self._search()
        if self.model.conversations:
            self.chosen.emit(self.model.conversations[0].id)

    @Slot()
    def _show_empty(self) -> None:
        none = self.model.rowCount() == 0
        self.empty.setVisible(none)
        self.list.setVisible(not none)
        self.empty.setText("Nothing found in any chat." if self.model.text else "Your chats will stand here.")

    @Slot(QPoint)
    def _menu(self, position: QPoint) -> None:
        index = self.list.indexAt(position)
        conversation = self.model.conversation(index.row()) if index.isValid() else None
        if conversation is None:
            return
        id = conversation.id
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.addAction(icon("edit"), "Rename\tF2", lambda: self.rename(id))
        pinned = conversation.pinned
        menu.addAction(icon("pin"), "Unpin" if pinned else "Pin", lambda: self.pin_wanted.emit(id, not pinned))
        export = menu.addMenu(icon("export"), "Export")
        for form, title in FORMATS:
            export.addAction(f"{title}\N{HORIZONTAL ELLIPSIS}", lambda form=form: self.export_wanted.emit([id], form))
        menu.addSeparator()
        menu.addAction(icon("trash"), "Delete\tDel", lambda: self.delete_wanted.emit(id))
        menu.popup(self.list.viewport().mapToGlobal(position))

    @Slot()
    def _more(self) -> None:
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.addAction(icon("import"), "Import chats\N{HORIZONTAL ELLIPSIS}", self.import_wanted.emit)
        shown = [conversation.id for conversation in self.model.conversations]
        what = "found chats" if self.model.text else "all chats"
        export = menu.addMenu(icon("export"), f"Export {what}")
        export.setEnabled(bool(shown))
        for form, title in FORMATS:
            export.addAction(f"{title}\N{HORIZONTAL ELLIPSIS}", lambda form=form: self.export_wanted.emit(shown, form))
        menu.popup(self._more_button.mapToGlobal(QPoint(0, self._more_button.height())))


def _holder(*widgets: QWidget) -> QWidget:
    holder = QWidget()
    layout = row(*widgets, parent=holder)
    layout.setStretch(0, 1)
    return holder
