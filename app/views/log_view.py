"""A log's end, followed while the file grows."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QTimer, Slot
from PySide6.QtWidgets import QCheckBox, QWidget

from app.views.dialogs import open_locally, read_tail, scroll_to_end, text_box
from app.views.widgets import ElidedLabel, button, column, row

FOLLOW_MS = 500
CHUNK = 256 * 1024
MAX_LINES = 5000


class LogView(QWidget):
    """Shows the last lines of a file; with Follow on, new ones as they come, unless you scrolled up."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._path: Path | None = None
        self._offset = 0
        self.box = text_box(name="Log")
        self.box.setMaximumBlockCount(MAX_LINES)
        self.box.setPlaceholderText("Nothing has been written yet.")
        self._name = ElidedLabel()
        self._name.setProperty("tone", "muted")
        self.follow = QCheckBox("Follow")
        self.follow.setChecked(True)
        self.follow.setToolTip("Show new lines as they are written")
        self._open = button("Open log", self._open_file, kind="link", icon_name="open")
        head = row(self._name, self.follow, self._open, spacing=8)
        outer = column(spacing=8, margins=(16, 12, 16, 16), parent=self)
        outer.addLayout(head)
        outer.addWidget(self.box, 1)
        self._timer = QTimer(self)
        self._timer.setInterval(FOLLOW_MS)
        self._timer.timeout.connect(self._grow)
        self.follow.toggled.connect(self._follow_toggled)

    def show_log(self, path: Path | None) -> None:
        """Show another log; None shows none."""
        if path == self._path:
            return
        self._path = path
        self.box.clear()
        self._name.setText(str(path) if path is not None else "")
        self._open.setEnabled(path is not None)
        self._offset = 0
        if path is not None:
            try:
                self._offset = path.stat().st_size
            except OSError:
                self._offset = 0
            self.box.setPlainText(read_tail(path).rstrip("\n"))
            scroll_to_end(self.box)

    def showEvent(self, event: object) -> None:
        if self.follow.isChecked():
            self._timer.start()

    def hideEvent(self, event: object) -> None:
        self._timer.stop()

    @Slot(bool)
    def _follow_toggled(self, follow: bool) -> None:
        if follow:
            self._timer.start()
            self._grow()
            scroll_to_end(self.box)
        else:
            self._timer.stop()

    @Slot()
    def _grow(self) -> None:
        if self._path is None:
            return
        try:
            size = self._path.stat().st_size
            if size < self._offset:  # begun anew
                self._offset = 0
                self.box.clear()
            if size == self._offset:
                return
            with self._path.open("rb") as file:
                file.seek(max(self._offset, size - CHUNK))
                data = file.read(CHUNK)
        except OSError:
            return  # not written yet, or gone: it is looked at again
        self._offset = size
        bar = self.box.verticalScrollBar()
        at_end = bar.value() >= bar.maximum() - 4
        self.box.appendPlainText(data.decode("utf-8", "replace").rstrip("\n"))
        if at_end:
            bar.setValue(bar.maximum())

    def _open_file(self) -> None:
        if self._path is not None:
            open_locally(self._path)
