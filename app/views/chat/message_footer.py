"""Below a message: its branch, what can be done with it, and the numbers of the answer."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QHBoxLayout, QLabel, QToolButton, QWidget

from app.core.conversation import AnswerStatistics
from app.views.chat.style import ChatStyle
from app.views.widgets import ElidedLabel, icon_button

HEIGHT = 30
_INTERRUPTED = "Interrupted \N{EM DASH} what was received is kept"
_REASONS = {
    "cancelled": "Stopped",
    "length": "Cut at the length limit",
    "crashed": "The engine crashed \N{EM DASH} what was received is kept",
    "failed": "Broken off",
}


def describe_statistics(statistics: AnswerStatistics | None, *, complete: bool) -> str:
    """The small line under an answer."""
    if statistics is None:
        return "" if complete else _INTERRUPTED
    parts = [statistics.model]
    if statistics.model and statistics.stack:
        parts.append(statistics.stack)
    if statistics.tokens:
        parts.append(f"{statistics.tokens:,} token{'s' if statistics.tokens != 1 else ''}")
    if statistics.tokens_per_second:
        rate = statistics.tokens_per_second
        parts.append(f"{rate:.0f} tokens/s" if rate >= 100 else f"{rate:.1f} tokens/s")
    if statistics.seconds_to_first_token:
        parts.append(f"first token {_seconds(statistics.seconds_to_first_token)}")
    reason = _REASONS.get(statistics.finish_reason, "")
    if not reason and not complete:
        reason = _INTERRUPTED
    if reason:  # first: the middle of a narrow line is cut, and this may be all that is said
        parts.insert(0, reason)
    return " · ".join(part for part in parts if part)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


class MessageFooter(QWidget):
    """The row of statistics and actions.

    Signals:
        requested: an action's name (`copy`, `edit`, `regenerate`, `continue`, `delete`, `previous`, `next`).
    """

    requested = Signal(str)

    def __init__(self, style: ChatStyle, *, user: bool, parent: QWidget) -> None:
        super().__init__(parent)
        self._user = user
        self._shown_branch = self._shown_actions = self._stay = False
        self._branch = QWidget(self)
        branch = QHBoxLayout(self._branch)
        branch.setContentsMargins(0, 0, 4, 0)
        branch.setSpacing(0)
        self._previous = self._button("chevron-left", "Previous version", "previous")
        self._next = self._button("chevron-right", "Next version", "next")
        self._count = QLabel(self._branch)
        for widget in (self._previous, self._count, self._next):
            branch.addWidget(widget)
        self._branch.hide()
        self._buttons: dict[str, QToolButton] = {
            "continue": self._button("continue", "Continue this answer", "continue"),
            "copy": self._button("copy", "Copy message", "copy"),
            "edit": self._button("edit", "Edit message (as another version)", "edit"),
            "regenerate": self._button(
                "reload", "Answer again" if not user else "Answer this message again", "regenerate"
            ),
            "delete": self._button("trash", "Delete from here", "delete"),
        }
        # In the middle: long names of models and adapters would else push the numbers out.
        self._statistics = ElidedLabel("", Qt.TextElideMode.ElideMiddle, parent=self)
        font = self._statistics.font()
        font.setPointSizeF(font.pointSizeF() * 0.9)
        self._statistics.setFont(font)
        self._count.setFont(font)
        for made in (self._statistics, self._count):
            made.setProperty("tone", "muted")
        self._actions = QWidget(self)
        actions = QHBoxLayout(self._actions)
        actions.setContentsMargins(0, 0, 0, 0)
        actions.setSpacing(0)
        for button in self._buttons.values():
            actions.addWidget(button)
        if user:
            self._statistics.hide()
        self._buttons["continue"].hide()

    def _button(self, icon: str, title: str, action: str) -> QToolButton:
        made = icon_button(icon, title)
        made.setFixedSize(28, 28)
        made.setProperty("request", action)
        made.clicked.connect(self._clicked)
        return made

    def _clicked(self) -> None:
        sender = self.sender()
        assert sender is not None
        self.requested.emit(str(sender.property("request")))

    def height_for(self, width: int) -> int:
        """Places everything at this width and returns the height that it takes.

        Where numbers and buttons do not fit beside each other, the buttons get a row of their own if they are
        there to stay; those that only come with the mouse cover the end of the numbers.
        """
        branch = self._branch.sizeHint().width() if self._shown_branch else 0
        actions = self._actions.sizeHint().width() if self._shown_actions else 0
        if self._user:
            self._actions.setGeometry(0, 0, actions, HEIGHT)
            self._branch.setGeometry(actions, 0, branch, HEIGHT)
            return HEIGHT
        wanted = self._statistics.fontMetrics().horizontalAdvance(self._statistics.text()) + 8
        rows = 2 if branch + wanted + (actions if self._stay else 0) > width and (branch or self._stay) else 1
        self._branch.setGeometry(0, (rows - 1) * HEIGHT, branch, HEIGHT)
        left = branch if rows == 1 else 0
        room = width - left - (actions if rows == 1 else 0)
        self._statistics.setGeometry(left, 0, room, HEIGHT - (4 if rows == 2 else 0))
        self._actions.setGeometry(
            width - actions if rows == 1 else branch - (0 if branch else 6), (rows - 1) * (HEIGHT - 4), actions, HEIGHT
        )
        self._branch.move(0, (rows - 1) * (HEIGHT - 4))
        return HEIGHT if rows == 1 else 2 * HEIGHT - 4

    @property
    def compact_width(self) -> int:
        """What the buttons need when they stand beside the text."""
        branch = self._branch.sizeHint().width() if self._shown_branch else 0
        return self._actions.sizeHint().width() + branch

    def set_branches(self, at: int, count: int) -> None:
        """Which of how many versions is shown."""
        self._shown_branch = count > 1
        self._branch.setVisible(count > 1)
        self._count.setText(f"{at}/{count}")
        self._count.setAccessibleName(f"Version {at} of {count}")
        self._previous.setEnabled(at > 1)
        self._next.setEnabled(at < count)

    def set_statistics(self, text: str) -> None:
        if text != self._statistics.text():
            self._statistics.setText(text)

    @property
    def statistics(self) -> str:
        return self._statistics.text()

    def set_actions(self, *, shown: bool, stay: bool, enabled: bool, can_continue: bool) -> None:
        """Whether the buttons are seen, and always so; whether those that change the conversation work; whether to continue is one."""
        self._shown_actions, self._stay = shown, stay
        self._actions.setVisible(shown)
        for name, button in self._buttons.items():
            button.setEnabled(enabled or name == "copy")
        self._buttons["continue"].setVisible(can_continue)
        self.height_for(self.width())
