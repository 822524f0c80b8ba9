"""What became of what was dropped or made: a line for each, above the table, until it is dismissed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QFrame, QProgressBar, QScrollArea, QSizePolicy, QWidget

from app.core.jobs import Progress
from app.viewmodels.jobs import progress_text
from app.views.widgets import ElidedLabel, IconLabel, button, column, icon_button, label, row

MAX_LINES = 200
_MARKS = {
    "info": ("info", "muted"),
    "positive": ("done", "positive"),
    "warning": ("warning", "warning"),
    "negative": ("error", "negative"),
}


class Line(msgspec.Struct, kw_only=True):
    """One result. action: a button's text, and what it does. source: a later line of the same takes its place."""

    name: str
    text: str
    tone: str = "info"
    action: str = ""
    run: Callable[[], object] | None = None
    source: str = ""


class _LineWidget(QWidget):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self.setAccessibleName(f"{line.name}: {line.text}")
        name = ElidedLabel(line.name, mode=Qt.TextElideMode.ElideMiddle)
        name.setFixedWidth(200)
        said = label(line.text, tone="muted", wrap=True, selectable=True)
        layout = row(IconLabel(*_marks(line.tone)), name, said, spacing=8, margins=(0, 2, 0, 2), parent=self)
        layout.setStretch(2, 1)
        if line.action and line.run is not None:
            run = line.run
            made = button(line.action, lambda: run(), kind="link")  # without the button's own argument
            made.setAccessibleName(f"{line.action}: {line.name}")
            layout.addWidget(made)


def _marks(tone: str) -> tuple[str, int, str]:
    name, role = _MARKS[tone]
    return name, 16, role


class Results(QFrame):
    """Progress while something is imported, then the lines.

    Signals:
        cancelled: the import is to stop.
    """

    cancelled = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("panel")
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        self.lines: list[Line] = []
        self._doing = ElidedLabel()
        self._bar = QProgressBar()
        self._bar.setTextVisible(False)
        self._bar.setFixedWidth(160)
        self._bar.setAccessibleName("Import")
        self._cancel = button("Cancel", self.cancelled.emit)
        self._progress = QWidget()
        made = row(self._doing, self._bar, self._cancel, parent=self._progress)
        made.setStretch(0, 1)
        self._heading = ElidedLabel()
        self._close = icon_button("close", "Dismiss", self.dismiss)
        self._head = QWidget()
        row(self._heading, self._close, parent=self._head)
        self._inside = QWidget()
        self._column = column(spacing=0, parent=self._inside)
        self._column.addStretch(1)
        self._scroll = QScrollArea()
        self._scroll.setWidgetResizable(True)
        self._scroll.setFrameShape(QFrame.Shape.NoFrame)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._scroll.setWidget(self._inside)
        column(self._progress, self._head, self._scroll, spacing=4, margins=(16, 8, 8, 8), parent=self)
        self.show_progress(None)

    def show_progress(self, progress: Progress | None) -> None:
        """What is being imported now; None when nothing is."""
        self._progress.setVisible(progress is not None)
        if progress is not None:
            self._doing.setText(progress_text(progress))
            fraction = progress.fraction
            self._bar.setRange(0, 0 if fraction is None else 1000)
            if fraction is not None:
                self._bar.setValue(round(1000 * fraction))
        self._place()

    def add(self, heading: str, lines: list[Line]) -> None:
        """More lines, newest first."""
        self._heading.setText(heading)
        again = {line.source for line in lines if line.source}
        self.lines = [*lines, *(line for line in self.lines if line.source not in again)][:MAX_LINES]
        while self._column.count() > 1:
            item = self._column.takeAt(0)
            if item is not None and (widget := item.widget()) is not None:
                widget.hide()
                widget.deleteLater()
        for place, line in enumerate(self.lines):
            self._column.insertWidget(place, _LineWidget(line))
        self._place()

    def dismiss(self) -> None:
        """Clear the lines."""
        self.lines = []
        self.add("", [])

    def _place(self) -> None:
        count = len(self.lines)
        self._head.setVisible(count > 0)
        self._scroll.setVisible(count > 0)
        shown = [item.widget() for place in range(min(count, 5)) if (item := self._column.itemAt(place)) is not None]
        room = max(200, self._scroll.viewport().width())
        height = sum(max(30, widget.heightForWidth(room)) for widget in shown if widget is not None)
        self._scroll.setFixedHeight(min(168, height))
        self.setVisible(count > 0 or not self._progress.isHidden())
