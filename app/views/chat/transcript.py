"""The scrolling list of messages. Widgets exist only for what is in view and near it, so length costs nothing.

It follows an answer that is being written, until the user scrolls up; then it stays where it is, whatever grows above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import msgspec
from PySide6.QtCore import Qt, QTimer, Signal, Slot
from PySide6.QtGui import QKeyEvent, QPalette, QResizeEvent
from PySide6.QtWidgets import QAbstractScrollArea, QFrame, QToolButton, QWidget

from app.core.conversation import StoredMessage
from app.core.errors import WeftError
from app.views.chat.heights import Heights
from app.views.chat.style import GRID, INSET, ChatStyle, chat_style
from app.views.icons import icon

if TYPE_CHECKING:
    from app.views.chat.message_view import MessageView

TOP = 3 * GRID
BOTTOM = 2 * GRID
SIDE = GRID
GAP = GRID // 2
KEPT = 24  # widgets kept around, beyond those in view


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One message as the transcript shows it."""

    message: StoredMessage
    text: str
    writing: bool = False
    error: WeftError | None = None
    branches: tuple[int, int] = (1, 1)
    marker: bool = False  # "The model no longer sees the messages above"


class Transcript(QAbstractScrollArea):
    """Shows entries one below the other.

    Signals:
        requested, edited, link_activated: of the messages; see MessageView.
    """

    requested = Signal(int, str)
    edited = Signal(int, str)
    link_activated = Signal(str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setAccessibleName("Messages")
        self.viewport().setAutoFillBackground(True)
        self.viewport().setBackgroundRole(QPalette.ColorRole.Base)
        self._style = chat_style()
        self._entries: list[Entry] = []
        self._index: dict[int, int] = {}
        self._heights = Heights(GAP)
        self._views: dict[int, MessageView] = {}  # by message id, the most recently used last
        self._follow = True
        self._covered = 0
        self._enabled = True
        self._arranging = False
        self._pending = QTimer(self)
        self._pending.setSingleShot(True)
        self._pending.setInterval(0)
        self._pending.timeout.connect(self._arrange)
        self.verticalScrollBar().setSingleStep(3 * GRID)
        self.verticalScrollBar().actionTriggered.connect(self._user_scrolled)
        self._latest = QToolButton(self)
        self._latest.setIcon(icon("chevron-down"))
        self._latest.setText("Jump to latest")
        self._latest.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self._latest.setObjectName("jump")
        self._latest.setAccessibleName("Jump to the latest message")
        self._latest.setToolTip("Jump to the latest message (End)")
        self._latest.clicked.connect(self.jump_to_latest)
        self._latest.hide()

    # -- content ----------------------------------------------------------------------------------

    @property
    def style_in_use(self) -> ChatStyle:
        return self._style

    def set_entries(self, entries: Sequence[Entry], *, enabled: bool, jump: bool) -> None:
        """Show these messages. `jump` goes to the end (another conversation); else the place is kept."""
        width = self._column()
        anchor = self._anchor()
        self._entries = list(entries)
        self._enabled = enabled
        self._index = {entry.message.id: i for i, entry in enumerate(self._entries)}
        self._heights.replace(list(self._index), lambda index: self._guess(self._entries[index], width))
        for gone in [id for id in self._views if id not in self._index]:
            self._discard(gone)
        for id, view in self._views.items():
            self._fill(view, self._index[id])
        if jump:
            self._follow = True
        self._arrange(None if jump else anchor)

    def update_entry(self, entry: Entry) -> None:
        """One message has changed."""
        index = self._index.get(entry.message.id)
        if index is not None:
            self._entries[index] = entry
            if (view := self._views.get(entry.message.id)) is not None:
                self._fill(view, index)
            else:
                self._heights.forget(index)

    def feed(self, message: int, text: str) -> None:
        """Text came for the message that is being written."""
        if (view := self._views.get(message)) is not None:
            view.feed(text)

    def set_activity(self, message: int, text: str) -> None:
        """What happens while nothing is written yet."""
        if (view := self._views.get(message)) is not None:
            view.set_activity(text)

    def set_enabled(self, enabled: bool) -> None:
        """Whether messages can be changed now."""
        if enabled != self._enabled:
            self._enabled = enabled
            for id, view in self._views.items():
                self._place_in(view, self._index[id])

    def view_of(self, message: int) -> MessageView | None:
        """The widget of a message, if there is one now."""
        return self._views.get(message)

    @property
    def views(self) -> list[MessageView]:
        return list(self._views.values())

    # -- views ------------------------------------------------------------------------------------

    def _view(self, index: int) -> MessageView:
        entry = self._entries[index]
        view = self._views.pop(entry.message.id, None)
        if view is None:
            from app.views.chat.message_view import MessageView  # not before there is a message: it takes a while

            view = MessageView(entry.message, self._style, self.viewport())
            view.requested.connect(self.requested)
            view.edited.connect(self.edited)
            view.link_activated.connect(self.link_activated)
            view.height_changed.connect(self._view_resized)
            view.view.selectionChanged.connect(self._selection_changed)
            # The width first: text laid out twice costs twice.
            view.view.height_for(self._column() - 2 * INSET)
            self._fill(view, index)
        self._views[entry.message.id] = view
        return view

    def _fill(self, view: MessageView, index: int) -> None:
        entry = self._entries[index]
        view.set_message(entry.message, entry.text, writing=entry.writing, error=entry.error)
        self._place_in(view, index)
        self._heights.forget(index)

    def _place_in(self, view: MessageView, index: int) -> None:
        entry = self._entries[index]
        view.set_place(
            leaf=index == len(self._entries) - 1, branches=entry.branches, enabled=self._enabled, marker=entry.marker
        )

    def _discard(self, id: int) -> None:
        view = self._views.pop(id)
        view.hide()
        view.deleteLater()

    def _prune(self, first: int, last: int) -> None:
        """Let go of widgets that are far away, unless somebody works in them."""
        spare = len(self._views) - (last - first + 1) - KEPT
        for id in list(self._views):
            if spare <= 0:
                break
            index, view = self._index[id], self._views[id]
            busy = (
                view.editing
                or view.has_selection
                or view.isAncestorOf(self.focusWidget() or self)
                or self._entries[index].writing
            )
            if not first <= index <= last and not busy:
                self._discard(id)
                spare -= 1

    @Slot()
    def _selection_changed(self) -> None:
        sender = self.sender()
        for view in self._views.values():
            if view.view is not sender and view.has_selection and view.view.hasFocus() is False:
                view.clear_selection()

    # -- geometry ---------------------------------------------------------------------------------

    def _column(self) -> int:
        return max(200, min(self._style.column + 2 * INSET, self.viewport().width() - 2 * SIDE))

    def _guess(self, entry: Entry, width: int) -> int:
        """About how tall a message is that was never laid out."""
        line = self._style.column / 80
        per_line = max(20, width / line)
        text = entry.text
        lines = text.count("\n", 0, 20_000) + 1 + min(len(text), 96_000) / per_line
        return round(lines * line * 2.7) + 48

    def _anchor(self) -> tuple[int, int] | None:
        """The first message in view and where its top is, so that it can stay there."""
        tops = self._heights.tops
        if not self._entries or not tops:
            return None
        value = self.verticalScrollBar().value()
        index = self._heights.at(value)
        return self._entries[min(index, len(self._entries) - 1)].message.id, tops[index] - value

    @Slot()
    def _view_resized(self) -> None:
        view = cast("MessageView", self.sender())
        if (index := self._index.get(view.message.id)) is not None:
            self._heights.forget(index)
        if not self._arranging:
            self._pending.start()

    @Slot()
    def _arrange(self, anchor: tuple[int, int] | None = None) -> None:
        """Measure what is in view, place it, and keep the end or the anchor where it was."""
        if self._arranging:
            return
        self._arranging = True
        try:
            anchor = anchor or self._anchor()
            width, tall = self._column(), self.viewport().height()
            bar = self.verticalScrollBar()
            first = last = 0
            for _ in range(6):
                total = self._heights.stack(TOP + self._covered) + BOTTOM
                bar.setPageStep(tall)
                bar.setRange(0, max(0, total - tall))
                if self._follow:
                    bar.setValue(bar.maximum())
                elif anchor is not None and anchor[0] in self._index:
                    bar.setValue(self._heights.tops[self._index[anchor[0]]] - anchor[1])
                # What is in view, and a little beyond.
                first, last = self._heights.between(bar.value() - tall // 4, bar.value() + tall + tall // 4)
                if not self._measure(first, last, width):
                    break
            self._place(first, last, width, bar.value())
            self._prune(first, last)
        finally:
            self._arranging = False
        self._latest.setVisible(not self._follow and bar.maximum() - bar.value() > tall // 3)
        self._place_button()

    def _measure(self, first: int, last: int, width: int) -> bool:
        changed = False
        for index in range(first, last + 1):
            view = self._view(index)
            if not self._heights.is_measured(index) and self._heights.set(index, view.height_for(width)):
                changed = True
        return changed

    def _place(self, first: int, last: int, width: int, value: int) -> None:
        x = max(SIDE, (self.viewport().width() - width) // 2)
        shown = set[int]()
        for index in range(first, last + 1):
            view = self._views[self._entries[index].message.id]
            view.setGeometry(x, self._heights.tops[index] - value, width, self._heights[index])
            view.show()
            shown.add(self._entries[index].message.id)
        for id, view in self._views.items():
            if id not in shown:
                view.hide()

    def scrollContentsBy(self, dx: int, dy: int) -> None:
        if not self._arranging:
            bar = self.verticalScrollBar()
            self._follow = bar.value() >= bar.maximum() - 2
            self._arrange()

    @Slot(int)
    def _user_scrolled(self, action: int) -> None:
        # Before the bar moves: a step up ends the following at once, even while text pours in.
        bar = self.verticalScrollBar()
        self._follow = bar.sliderPosition() >= bar.maximum() - 2

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        if event.size().width() != event.oldSize().width():
            self._heights.forget_all()
        self._arrange()

    def _place_button(self) -> None:
        size = self._latest.sizeHint()
        self._latest.setGeometry(
            (self.viewport().width() - size.width()) // 2,
            self.viewport().height() - size.height() - 2 * GRID,
            size.width(),
            size.height(),
        )
        self._latest.raise_()

    @property
    def covered(self) -> int:
        """Pixels at the top that something lies over: what is shown stands below, the very first message too."""
        return self._covered

    def set_covered(self, pixels: int) -> None:
        if pixels != self._covered:
            self._covered, anchor = pixels, self._anchor()
            self._arrange(anchor)

    # -- going places -----------------------------------------------------------------------------

    @property
    def following(self) -> bool:
        """Whether it stays at the end while text comes."""
        return self._follow

    @Slot()
    def jump_to_latest(self) -> None:
        """Go to the end, and stay there."""
        self._follow = True
        self._arrange()

    def show_message(self, message: int, offset: int = 0, height: int = 0) -> None:
        """Bring a message, or the part of it at `offset`, into view."""
        index = self._index.get(message)
        if index is None:
            return
        tall, bar = self.viewport().height(), self.verticalScrollBar()
        for _ in range(3):  # heights around it become known on the way
            top = self._heights.tops[index] + offset
            extent = height or min(self._heights[index], tall // 2)
            if top < bar.value() + self._covered + GRID or top + extent > bar.value() + tall - GRID:
                self._follow = False
                bar.setValue(max(0, top - max(tall // 4, self._covered + GRID)))
        self._arrange()

    def neighbour(self, message: int, step: int) -> int:
        """Id of the message before or after one; 0 where there is none."""
        at = self._index.get(message, -1) + step if message in self._index else len(self._entries) - 1
        return self._entries[at].message.id if 0 <= at < len(self._entries) else 0

    def focus_message(self, message: int) -> None:
        """Put the keyboard on a message."""
        self.show_message(message)
        if (view := self._views.get(message)) is not None:
            view.setFocus(Qt.FocusReason.TabFocusReason)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        bar = self.verticalScrollBar()
        if event.key() == Qt.Key.Key_Home:
            self._follow = False
            bar.setValue(0)
        elif event.key() == Qt.Key.Key_End:
            self.jump_to_latest()
        else:
            super().keyPressEvent(event)

    # -- look -------------------------------------------------------------------------------------

    def restyle(self) -> None:
        """The palette or the font changed: build what is in view anew."""
        self._style = chat_style()
        if any(view.editing for view in self._views.values()):
            return  # an open editor is worth more than fresh colours
        for id in list(self._views):
            self._discard(id)
        self._heights.forget_all()
        self._arrange()
