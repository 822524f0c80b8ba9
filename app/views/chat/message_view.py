"""One message of the transcript: its text, its reasoning, its numbers and what can be done with it."""

from __future__ import annotations

from PySide6.QtCore import QEvent, QPoint, QRect, QRectF, Qt, Signal, Slot
from PySide6.QtGui import (
    QContextMenuEvent,
    QEnterEvent,
    QFocusEvent,
    QKeyEvent,
    QKeySequence,
    QPainter,
    QPaintEvent,
    QPen,
    QTextCursor,
)
from PySide6.QtWidgets import QApplication, QPushButton, QWidget

from app.core.conversation import StoredMessage
from app.core.errors import WeftError
from app.viewmodels.chat_reasoning import Split, split_reasoning
from app.views.chat.markdown_view import MarkdownView
from app.views.chat.message_editor import MessageEditor
from app.views.chat.message_footer import MessageFooter, describe_statistics
from app.views.chat.message_menu import message_menu
from app.views.chat.reasoning_fold import ReasoningFold
from app.views.chat.seen_marker import MARKER, SeenMarker
from app.views.chat.style import GRID, INSET, ChatStyle
from app.views.dialogs import open_locally
from app.views.widgets import Banner, button

PADDING = 12  # inside a user's bubble


class MessageView(QWidget):
    """Shows one stored message.

    Signals:
        requested: what the user wants done with it: the message's id and an action's name.
        edited: the message's id and its new text.
        height_changed: it needs another height at its present width.
        link_activated: a link was clicked.
    """

    requested = Signal(int, str)
    edited = Signal(int, str)
    height_changed = Signal()
    link_activated = Signal(str)

    def __init__(self, message: StoredMessage, style: ChatStyle, parent: QWidget) -> None:
        super().__init__(parent)
        self.message = message
        self._style = style
        self._user = message.role != "assistant"
        self._text = ""
        self._split = Split()
        self._shown_answer = ""
        self._writing = False
        self._enabled = True
        self._leaf = False
        self._bubble = QRect()
        self._editor: MessageEditor | None = None
        self._reasoning: ReasoningFold | None = None
        self._banner: Banner | None = None
        self._marker: SeenMarker | None = None
        self._more: QPushButton | None = None
        self._activity = ""
        self.setFocusPolicy(Qt.FocusPolicy.TabFocus)
        self.view = MarkdownView(style, markup=not self._user, parent=self)
        self.view.height_changed.connect(self._height_changed)
        self.view.link_activated.connect(self.link_activated)
        self.footer = MessageFooter(style, user=self._user, parent=self)
        self.footer.requested.connect(self._request)
        self._update_actions()

    # -- content ----------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        return self._text

    @property
    def split(self) -> Split:
        return self._split

    @property
    def reasoning(self) -> ReasoningFold | None:
        return self._reasoning

    @property
    def banner(self) -> Banner | None:
        return self._banner

    def set_message(self, message: StoredMessage, text: str, *, writing: bool, error: WeftError | None) -> None:
        """Show a message as it stands."""
        began, ended = writing and not self._writing, self._writing and not writing
        self.message, self._writing = message, writing
        if text != self._text or began or ended or not self._text:
            self._show_text(text, whole=not ended)
        statistics = message.statistics
        self.footer.set_statistics(
            self._activity
            if writing
            else ""
            if self._user
            else describe_statistics(statistics, complete=message.complete)
        )
        self._show_error(error)
        who = "You" if self._user else "Assistant"
        self.setAccessibleName(f"{who}: {' '.join(self._split.answer[:200].split())}")
        self._update_actions()
        self.height_changed.emit()

    def feed(self, text: str) -> None:
        """The next piece of the answer that is being written."""
        self._show_text(self._text + text, whole=False)

    def set_activity(self, text: str) -> None:
        """What happens while nothing is written yet."""
        self._activity = text
        if self._writing:
            self.footer.set_statistics(text)

    def _show_text(self, text: str, *, whole: bool) -> None:
        self._text = text
        self._show_answer(text, whole)
        self._offer_more()

    def _offer_more(self) -> None:
        """A very long message is shown in parts."""
        hidden = len(self.view.hidden)
        if hidden and self._more is None:
            self._more = button("", self._show_more, kind="link", parent=self)
            self._more.show()
        if self._more is not None:
            self._more.setVisible(bool(hidden))
            self._more.setText(f"Show more ({hidden:,} characters)")
            self._more.setAccessibleName(self._more.text())

    def _show_more(self) -> None:
        self.view.show_more()
        self._offer_more()
        self.height_changed.emit()

    def _show_answer(self, text: str, whole: bool) -> None:
        if self._user:
            self._split = Split(answer=text)
            self.view.set_markdown(text)
            return
        self._split = split_reasoning(text, streaming=self._writing)
        self._show_reasoning()
        answer = self._split.answer
        if self._writing and (whole or not answer.startswith(self._shown_answer)):
            self.view.begin_stream(answer)
        elif self._writing:
            self.view.feed(answer[len(self._shown_answer) :])
        elif not whole and answer.startswith(self._shown_answer):
            self.view.feed(answer[len(self._shown_answer) :])
            self.view.finish()
        else:
            self.view.set_markdown(answer)
        self._shown_answer = answer

    def _show_reasoning(self) -> None:
        if not self._split.reasoning and not self._split.thinking:
            return
        if self._reasoning is None:
            self._reasoning = ReasoningFold(self._style, self)
            self._reasoning.height_changed.connect(self._height_changed)
            self._reasoning.link_activated.connect(self.link_activated)
            self._reasoning.show()
        statistics = self.message.statistics
        seconds = statistics.reasoning_seconds if statistics else 0.0
        self._reasoning.set_reasoning(
            self._split.reasoning, thinking=self._split.thinking and self._writing, seconds=seconds
        )

    def _show_error(self, error: WeftError | None) -> None:
        if error is None:
            if self._banner is not None:
                self._banner.deleteLater()
                self._banner = None
            return
        if self._banner is None:
            self._banner = Banner("negative", parent=self)
            retry = button("Try again", kind="", parent=self._banner)
            retry.clicked.connect(self._retry)
            self._banner.add(retry)
            log = getattr(error, "log", None)
            if log is not None:
                self._banner.add(button("Open log", lambda: open_locally(log), kind="link", parent=self._banner))
            self._banner.show()
        self._banner.text.setText(str(error))
        self._banner.setAccessibleName(str(error))

    @Slot()
    def _retry(self) -> None:
        self.requested.emit(self.message.id, "continue" if self._text else "regenerate")

    def set_place(self, *, leaf: bool, branches: tuple[int, int], enabled: bool, marker: bool) -> None:
        """Where it stands: at the end of the branch; which of how many versions; below the line of what the model sees."""
        self._leaf, self._enabled = leaf, enabled
        self.footer.set_branches(*branches)
        if marker and self._marker is None:
            self._marker = SeenMarker(self._style, self)
            self._marker.show()
            self.height_changed.emit()
        elif not marker and self._marker is not None:
            self._marker.deleteLater()
            self._marker = None
            self.height_changed.emit()
        self._update_actions()

    # -- editing ----------------------------------------------------------------------------------

    @property
    def editing(self) -> bool:
        return self._editor is not None

    @property
    def editor(self) -> MessageEditor | None:
        return self._editor

    def edit(self, text: str | None = None) -> None:
        """Put an editor in place of the text, with another text to begin with if one is given."""
        if self._editor is None:
            self._editor = MessageEditor(self._text if text is None else text, user=self._user, parent=self)
            self._editor.finished.connect(self._edit_finished)
            self._editor.height_changed.connect(self._height_changed)
            self.view.hide()
            self.footer.hide()
            self._editor.show()
            self._editor.focus()
            self.height_changed.emit()

    @Slot(bool)
    def _edit_finished(self, accepted: bool) -> None:
        editor = self._editor
        assert editor is not None
        text = editor.text
        self._editor = None
        editor.deleteLater()
        self.view.show()
        self.footer.show()
        self.setFocus()
        self.height_changed.emit()
        if accepted and text != self._text:
            self.edited.emit(self.message.id, text)

    # -- geometry ---------------------------------------------------------------------------------

    @Slot()
    def _height_changed(self) -> None:
        self.height_changed.emit()

    def height_for(self, width: int) -> int:
        """Places everything at this width and returns the height that it takes."""
        y, inner = 0, width - 2 * INSET
        if self._marker is not None:
            self._marker.setGeometry(2, 0, width - 4, MARKER - GRID)  # inside the frame of the focus
            y += MARKER
        if self._editor is not None:
            height = self._editor.height_for(inner)
            self._editor.setGeometry(INSET, y, inner, height)
            self._bubble = QRect()
            return y + height + 2 * GRID
        if self._user:
            return self._place_user(inner, y) + GRID
        y = self._place_answer(inner, y)
        height = self.footer.height_for(inner)
        self.footer.setGeometry(INSET, y, inner, height)
        return y + height + GRID

    def _place_user(self, width: int, y: int) -> int:
        """A bubble at the right; its buttons stand at its left, where there is always room for them."""
        buttons = self.footer.compact_width
        widest = max(width // 2, width - buttons - GRID // 2) - 2 * PADDING
        height = self.view.height_for(widest)
        inner = min(widest, max(24, round(self.view.document().idealWidth()) + 2))
        if self.view.has_code:
            inner = widest  # a code block takes the whole width
        height = self.view.height_for(inner)
        self._bubble = QRect(INSET + width - inner - 2 * PADDING, y, inner + 2 * PADDING, height + 2 * PADDING - 11)
        self.view.setGeometry(self._bubble.x() + PADDING, y + PADDING - 4, inner, height)
        tall = self.footer.height_for(buttons)
        self.footer.setGeometry(self._bubble.x() - buttons - 4, self._bubble.bottom() - tall, buttons, tall)
        return self._place_more(self._bubble.x(), self._bubble.bottom() + 1)

    def _place_more(self, x: int, y: int) -> int:
        if self._more is None or self._more.isHidden():
            return y
        size = self._more.sizeHint()
        self._more.setGeometry(x, y + 4, size.width(), size.height())
        return y + size.height() + 4

    def _place_answer(self, width: int, y: int) -> int:
        if self._reasoning is not None:
            height = self._reasoning.height_for(width + INSET)
            self._reasoning.setGeometry(0, y, width + INSET, height)
            y += height
        height = self.view.height_for(width) if self._shown_answer else 0
        self.view.setGeometry(INSET, y, width, height)
        y = self._place_more(INSET, y + height)
        if self._banner is not None:
            tall = max(48, self._banner.heightForWidth(width) if self._banner.hasHeightForWidth() else 0)
            self._banner.setGeometry(INSET, y + 4, width, tall)
            y += tall + GRID
        return y

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        style = self._style
        if not self._bubble.isEmpty():
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(style.bubble)
            painter.drawRoundedRect(QRectF(self._bubble), 10, 10)
        if self.hasFocus():
            painter.setPen(QPen(style.accent, 2))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            rect = QRectF(self._bubble) if not self._bubble.isEmpty() else QRectF(self.rect()).adjusted(1, 1, -1, -1)
            painter.drawRoundedRect(rect, 8, 8)

    # -- actions ----------------------------------------------------------------------------------

    def _update_actions(self) -> None:
        focus = QApplication.focusWidget()
        near = self.underMouse() or (focus is not None and (focus is self or self.isAncestorOf(focus)))
        statistics = self.message.statistics
        unfinished = not self.message.complete or (
            statistics is not None and statistics.finish_reason in ("length", "cancelled", "crashed")
        )
        self.footer.set_actions(
            shown=(self._leaf or near) and not self._writing,
            stay=self._leaf,
            enabled=self._enabled,
            can_continue=self._leaf and not self._user and not self._writing and bool(self._text) and unfinished,
        )

    @Slot(str)
    def _request(self, action: str) -> None:
        if action == "edit":
            self.edit()
        else:
            self.requested.emit(self.message.id, action)

    def enterEvent(self, event: QEnterEvent) -> None:
        self._update_actions()

    def leaveEvent(self, event: QEvent) -> None:
        self._update_actions()

    def focusInEvent(self, event: QFocusEvent) -> None:
        super().focusInEvent(event)
        self._update_actions()
        self.update()
        if event.reason() in (Qt.FocusReason.TabFocusReason, Qt.FocusReason.BacktabFocusReason):
            self.requested.emit(self.message.id, "show")

    def focusOutEvent(self, event: QFocusEvent) -> None:
        super().focusOutEvent(event)
        self._update_actions()
        self.update()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        plain = event.modifiers() == Qt.KeyboardModifier.NoModifier
        actions = {
            Qt.Key.Key_Left: "previous",
            Qt.Key.Key_Right: "next",
            Qt.Key.Key_Delete: "delete",
            Qt.Key.Key_F2: "edit",
        }
        if plain and event.key() in actions and self._enabled:
            self._request(actions[Qt.Key(event.key())])
        elif event.matches(QKeySequence.StandardKey.Copy):
            self._request("copy")
        else:
            super().keyPressEvent(event)

    def contextMenuEvent(self, event: QContextMenuEvent) -> None:
        self.open_menu(event.globalPos())

    def open_menu(self, position: QPoint) -> None:
        """The same actions, as a menu."""
        menu = message_menu(
            self.view,
            self._request,
            editing=self.editing,
            enabled=self._enabled,
            can_continue=self._leaf and not self._user,
            parent=self,
        )
        menu.popup(position)

    def clear_selection(self) -> None:
        cursor = self.view.textCursor()
        if cursor.hasSelection():
            cursor.clearSelection()
            self.view.setTextCursor(QTextCursor(cursor))

    @property
    def has_selection(self) -> bool:
        return self.view.textCursor().hasSelection()
