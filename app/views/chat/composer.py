"""Where a message is written: grows with its text, keeps drafts, says why nothing can be sent and how to help that."""

from __future__ import annotations

import html

from PySide6.QtCore import QMimeData, QSize, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QFocusEvent, QKeyEvent, QResizeEvent, QTextCursor
from PySide6.QtWidgets import QFrame, QHBoxLayout, QPlainTextEdit, QSizePolicy, QVBoxLayout, QWidget

from app.views.chat.style import GRID
from app.views.icons import icon
from app.views.theme import set_property
from app.views.widgets import button, icon_button, label

MOST_LINES = 10
DRAFT_MS = 400
MAX_PASTE = 8 * 1024 * 1024


class PromptEdit(QPlainTextEdit):
    """Enter sends, Shift+Enter breaks the line. Plain text only.

    Signals:
        submitted: Enter was pressed. focused: the keyboard came or went.
    """

    submitted = Signal()
    focused = Signal(bool)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("prompt")
        self.setPlaceholderText("Message\N{HORIZONTAL ELLIPSIS}")
        self.setAccessibleName("Message")
        self.setAccessibleDescription("Enter sends, Shift+Enter breaks the line")
        self.setTabChangesFocus(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.document().setDocumentMargin(4)
        self.document().documentLayout().documentSizeChanged.connect(self._fit)
        self._fit()

    @Slot()
    def _fit(self) -> None:
        # The layout of a QPlainTextEdit counts lines, not pixels.
        lines = max(1, round(self.document().size().height()))
        height = min(lines, MOST_LINES) * self.fontMetrics().lineSpacing() + 10
        if height != self.height():
            self.setFixedHeight(height)
        wanted = Qt.ScrollBarPolicy.ScrollBarAsNeeded if lines > MOST_LINES else Qt.ScrollBarPolicy.ScrollBarAlwaysOff
        self.setVerticalScrollBarPolicy(wanted)

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        if event.size().width() != event.oldSize().width():
            QTimer.singleShot(0, self, self._fit)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if (
            event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
            and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier
        ):
            self.submitted.emit()
        else:
            super().keyPressEvent(event)

    def focusInEvent(self, event: QFocusEvent) -> None:
        super().focusInEvent(event)
        self.focused.emit(True)

    def focusOutEvent(self, event: QFocusEvent) -> None:
        super().focusOutEvent(event)
        self.focused.emit(False)

    def canInsertFromMimeData(self, source: QMimeData) -> bool:
        return source.hasText() and not (source.hasUrls() and any(url.isLocalFile() for url in source.urls()))

    def insertFromMimeData(self, source: QMimeData) -> None:
        text = source.text()
        # A pasted megabyte without a line break would take the layout seconds.
        self.insertPlainText(_broken(text[:MAX_PASTE]))


def _broken(text: str, longest: int = 20_000) -> str:
    if len(text) <= longest:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        while len(line) > longest:
            cut = line.rfind(" ", longest // 2, longest)
            cut = cut + 1 if cut > 0 else longest
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return "\n".join(lines)


class Composer(QFrame):
    """The prompt with its button.

    Signals:
        sent: the text to send. The field keeps it until `clear` is called.
        stopped: the answer is to be stopped.
        draft_changed: what is typed now, a moment after the last key.
        help_wanted: the button beside the reason was pressed.
    """

    sent = Signal(str)
    stopped = Signal()
    draft_changed = Signal(str)
    help_wanted = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._reason = ""
        self._writing = False
        self._quiet = False
        self.edit = PromptEdit(self)
        self.edit.submitted.connect(self._submit)
        self.edit.textChanged.connect(self._changed)
        self._send = icon_button("send", "Send", shortcut="Enter", role="on_accent")
        self._send.setObjectName("send")
        self._send.setIconSize(QSize(20, 20))
        self._send.setFixedSize(34, 34)
        self._send.clicked.connect(self._clicked)
        self._box = QFrame(self)
        self._box.setObjectName("composer")
        box = QHBoxLayout(self._box)
        box.setContentsMargins(GRID + 2, 5, 6, 5)
        box.setSpacing(GRID)
        box.addWidget(self.edit, 1, Qt.AlignmentFlag.AlignVCenter)
        box.addWidget(self._send, 0, Qt.AlignmentFlag.AlignBottom)
        self.edit.focused.connect(self._focused)
        self._why = label("", tone="muted")
        self._help = button("", kind="link")
        self._help.setAccessibleName("Help")
        self._help.clicked.connect(self.help_wanted)
        self._help.hide()
        row = QHBoxLayout()
        row.setContentsMargins(GRID + 4, 0, 4, 0)
        row.setSpacing(GRID)
        row.addWidget(self._why)
        row.addWidget(self._help)
        row.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(self._box)
        layout.addLayout(row)
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(DRAFT_MS)
        self._timer.timeout.connect(self._report_draft)
        self._update()

    @property
    def text(self) -> str:
        return self.edit.toPlainText()

    @property
    def reason(self) -> str:
        return self._reason

    def set_text(self, text: str) -> None:
        """Show a draft; not reported as a change."""
        if text == self.text:
            return
        self._quiet = True
        self.edit.setPlainText(text)
        self.edit.moveCursor(QTextCursor.MoveOperation.End)
        self._quiet = False
        self._timer.stop()
        self._update()

    def clear(self) -> None:
        """The message was sent. Ctrl+Z brings its text back."""
        cursor = QTextCursor(self.edit.document())
        cursor.select(QTextCursor.SelectionType.Document)
        self._quiet = True
        cursor.removeSelectedText()
        self._quiet = False
        self._timer.stop()
        self.draft_changed.emit("")
        self._update()

    def set_state(self, *, reason: str, help_text: str, writing: bool) -> None:
        """Why nothing can be sent ("" when it can), what would help, and whether an answer is being written here."""
        self._reason, self._writing = reason, writing
        self._why.setText(reason)
        self._help.setText(help_text)
        self._help.setAccessibleName(help_text or "Help")
        self._help.setVisible(bool(help_text))
        self._update()

    def flush(self) -> None:
        """Report a draft that waits."""
        if self._timer.isActive():
            self._timer.stop()
            self._report_draft()

    def _update(self) -> None:
        can_send = bool(self.text.strip()) and not self._reason
        name, title = ("stop", "Stop (Esc)") if self._writing else ("send", "Send (Enter)")
        self._send.setIcon(icon(name, "on_accent"))
        self._send.setToolTip(f"<qt>{html.escape(title if self._writing or not self._reason else self._reason)}</qt>")
        self._send.setAccessibleName(title.split(" ")[0])
        self._send.setEnabled(self._writing or can_send)
        set_property(self._send, "ready", self._writing or can_send)

    @Slot(bool)
    def _focused(self, focused: bool) -> None:
        set_property(self._box, "focused", focused)

    @Slot()
    def _changed(self) -> None:
        if not self._quiet:
            self._timer.start()
        self._update()

    @Slot()
    def _report_draft(self) -> None:
        self.draft_changed.emit(self.text)

    @Slot()
    def _clicked(self) -> None:
        if self._writing:
            self.stopped.emit()
        else:
            self._submit()

    @Slot()
    def _submit(self) -> None:
        if self.text.strip() and not self._reason and not self._writing:
            self.sent.emit(self.text)
