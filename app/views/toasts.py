"""Toasts: short messages at the lower left, beside the rail, that go away by themselves, newest below."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import QEvent, QObject, QTimer, Slot
from PySide6.QtWidgets import QFrame, QWidget

from app.views.page import Notice
from app.views.widgets import IconLabel, button, icon_button, label, row

SHOWN_MS = 6000
ACTION_MS = 10_000  # with a button: time to read, decide and reach it
AT_MOST = 4


class Toast(QFrame):
    """One message. Stays while the mouse is over it or its button has the focus."""

    def __init__(self, notice: Notice, parent: QWidget) -> None:
        super().__init__(parent)
        self.setObjectName("toast")
        self.notice = notice
        mark = {"info": "info", "positive": "done", "warning": "warning", "negative": "error"}[notice.tone]
        text = label(notice.text, wrap=True)
        text.setMinimumWidth(160)
        text.setMaximumWidth(360)
        self.setAccessibleName(notice.text)
        layout = row(IconLabel(mark, 20, "on_tooltip"), text, margins=(12, 8, 8, 8), spacing=8, parent=self)
        if notice.action and notice.run is not None:
            self.button = button(notice.action, self._act)
            layout.addWidget(self.button)
        layout.addWidget(icon_button("close", "Dismiss", self.close, role="on_tooltip"))
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval((ACTION_MS if notice.action else SHOWN_MS) + 60 * len(notice.text))
        self._timer.timeout.connect(self._expire)
        self._timer.start()

    def _act(self) -> None:
        self.close()
        if self.notice.run is not None:
            self.notice.run()

    @Slot()
    def _expire(self) -> None:
        focus = self.focusWidget()
        if self.underMouse() or (focus is not None and focus.hasFocus()):
            self._timer.start()
        else:
            self.close()


class Toasts(QObject):
    """Stacks toasts at the lower left of a widget.

    Args:
        left, below: how wide what stands at the left is, and how high what stands below: they do not cover it.
    """

    def __init__(
        self, parent: QWidget, left: Callable[[], int] = lambda: 0, below: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__(parent)
        self._host = parent
        self._left, self._below = left, below
        self._shown: list[Toast] = []
        parent.installEventFilter(self)

    @property
    def shown(self) -> list[Toast]:
        return list(self._shown)

    def show(self, notice: Notice) -> None:
        if any(toast.notice.text == notice.text for toast in self._shown):
            return
        toast = Toast(notice, self._host)
        toast.installEventFilter(self)
        self._shown.append(toast)
        while len(self._shown) > AT_MOST:
            self._shown[0].close()
        toast.adjustSize()
        toast.show()
        toast.raise_()
        self.place()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if watched is self._host and event.type() == QEvent.Type.Resize:
            self.place()
        elif isinstance(watched, Toast) and event.type() == QEvent.Type.Close and watched in self._shown:
            self._shown.remove(watched)
            watched.deleteLater()
            self.place()
        return False

    def place(self) -> None:
        """Put them where they belong now: another page is in front."""
        # Not at the right: there are details with their buttons, and below them what is being typed.
        bottom = self._host.height() - self._below() - 16
        for toast in reversed(self._shown):
            toast.adjustSize()
            toast.move(self._left() + 16, bottom - toast.height())
            bottom -= toast.height() + 8
