"""The rail: the pages of the window, on the left."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QRectF, QSize, Qt, Signal
from PySide6.QtGui import QKeyEvent, QPainter, QPaintEvent
from PySide6.QtWidgets import QButtonGroup, QFrame, QToolButton, QWidget

from app.views.icons import icon
from app.views.page import PageSpec
from app.views.theme import theme
from app.views.widgets import column

WIDTH = 88


class RailButton(QToolButton):
    """One page. A badge shows how much of its work is done (0 to 1), or that there is some (-1)."""

    def __init__(self, spec: PageSpec, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.spec = spec
        self._badge: float | None = None
        self.setText(spec.title)
        self.setIcon(icon(spec.icon, "muted", "accent"))
        self.setIconSize(QSize(24, 24))
        self.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextUnderIcon)
        self.setCheckable(True)
        self.setFixedSize(WIDTH - 16, 56)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setAccessibleName(spec.title)

    def set_badge(self, value: float | None) -> None:
        if value != self._badge:
            self._badge = value
            self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        super().paintEvent(event)
        if self._badge is None:
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        box = QRectF(self.width() - 23.0, 5.0, 12.0, 12.0)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(theme().color("accent"))
        if self._badge < 0:
            painter.drawEllipse(box.adjusted(2, 2, -2, -2))
            return
        painter.setBrush(theme().color("border"))
        painter.drawEllipse(box)
        painter.setBrush(theme().color("accent"))
        painter.drawPie(box, 90 * 16, -round(360 * 16 * self._badge))


class Rail(QFrame):
    """Buttons for every page; arrow keys move within it."""

    chosen = Signal(str)

    def __init__(self, specs: Sequence[PageSpec], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("rail")
        self.setFixedWidth(WIDTH)
        self.setAccessibleName("Pages")
        self._group = QButtonGroup(self)
        self._shown = ""
        self._buttons: dict[str, RailButton] = {}
        layout = column(parent=self, spacing=4, margins=(8, 8, 7, 8))
        for bottom in (False, True):
            for spec in specs:
                if spec.bottom == bottom:
                    made = RailButton(spec)
                    self._group.addButton(made)
                    self._buttons[spec.name] = made
                    layout.addWidget(made, 0, Qt.AlignmentFlag.AlignHCenter)
            if not bottom:
                layout.addStretch(1)
        for number, made in enumerate(self._buttons.values(), 1):
            made.setToolTip(f"{made.spec.title} (Ctrl+{number})" if number < 10 else made.spec.title)
        self._group.buttonClicked.connect(self._clicked)

    @property
    def names(self) -> list[str]:
        """Page names, from top to bottom."""
        return list(self._buttons)

    def show_page(self, name: str) -> None:
        self._shown = name
        self._buttons[name].setChecked(True)

    def set_badge(self, name: str, value: float | None) -> None:
        if name in self._buttons:
            self._buttons[name].set_badge(value)

    def _clicked(self, pressed: QToolButton) -> None:
        if isinstance(pressed, RailButton):
            if pressed.spec.window:  # the page in front stays the one that is shown
                self._buttons.get(self._shown, pressed).setChecked(True)
            self.chosen.emit(pressed.spec.name)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        step = {Qt.Key.Key_Up: -1, Qt.Key.Key_Down: 1}.get(Qt.Key(event.key()))
        buttons = list(self._buttons.values())
        focused = next((i for i, made in enumerate(buttons) if made.hasFocus()), None)
        if step is None or focused is None:
            super().keyPressEvent(event)
            return
        buttons[(focused + step) % len(buttons)].setFocus(Qt.FocusReason.TabFocusReason)
