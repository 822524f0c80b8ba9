"""Dialogs that help: what failed, what to do next, and the details for whoever can use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import Qt, QUrl
from PySide6.QtGui import QDesktopServices, QFontDatabase, QGuiApplication, QShowEvent
from PySide6.QtWidgets import QDialog, QFileDialog, QPlainTextEdit, QPushButton, QWidget

from app.core.errors import ErrorKind, WeftError
from app.views.widgets import Fold, IconLabel, button, column, label, row, title

_HEADINGS = {
    ErrorKind.BAD_INPUT: "That value does not work",
    ErrorKind.NOT_FOUND: "Not found",
    ErrorKind.CORRUPT: "This file is damaged",
    ErrorKind.HOSTILE: "Refused for your safety",
    ErrorKind.UNSUPPORTED: "Not supported",
    ErrorKind.ENVIRONMENT: "The engine is not ready",
    ErrorKind.OUT_OF_MEMORY: "Not enough memory",
    ErrorKind.DISK_FULL: "The disk is full",
    ErrorKind.PERMISSION: "No permission",
    ErrorKind.BUSY: "Already in use",
    ErrorKind.CRASHED: "The engine crashed",
    ErrorKind.UNRESPONSIVE: "The engine does not answer",
    ErrorKind.CANCELLED: "Cancelled",
    ErrorKind.NETWORK: "The network failed",
    ErrorKind.PROTOCOL: "The engine and the window disagree",
    ErrorKind.INTERNAL: "Something went wrong inside Weft",
}
LOG_TAIL_BYTES = 64 * 1024
QUESTION_WIDTH = 440  # at least: a line that reads well, and three buttons


def read_tail(path: Path, limit: int = LOG_TAIL_BYTES) -> str:
    """The last `limit` bytes of a log, as text; what is not UTF-8 is shown as replacement characters. "" when unreadable."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError:
        return ""
    text = data.decode("utf-8", "replace")
    return text.partition("\n")[2] if size > limit and "\n" in text else text


def open_locally(path: Path) -> bool:
    """Open a file or folder with what the desktop has for it."""
    return QDesktopServices.openUrl(QUrl.fromLocalFile(str(path)))


def reveal(path: Path) -> bool:
    """Show a file or folder in the desktop's file manager (its parent folder is opened)."""
    return open_locally(path.parent if path.parent.is_dir() else path)


def choose_paths(
    parent: QWidget, heading: str, taken: Callable[[list[str]], object], *, kinds: str = "", start: Path | None = None
) -> QFileDialog:
    """Ask for existing files of these kinds ("Models (*.gguf)"), or (with none) for a folder. `taken` hears of them."""
    dialog = QFileDialog(parent.window(), heading, str(start or Path.home()), kinds)
    dialog.setFileMode(QFileDialog.FileMode.ExistingFiles if kinds else QFileDialog.FileMode.Directory)
    dialog.setOption(QFileDialog.Option.ShowDirsOnly, not kinds)
    dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
    dialog.filesSelected.connect(taken)
    dialog.open()
    return dialog


def scroll_to_end(box: QPlainTextEdit) -> None:
    """Show the last lines from their beginning; moving the cursor there would scroll sideways too."""
    box.verticalScrollBar().setValue(box.verticalScrollBar().maximum())
    box.horizontalScrollBar().setValue(0)


def text_box(
    text: str = "", *, mono: bool = True, name: str = "Details", parent: QWidget | None = None
) -> QPlainTextEdit:
    """A read-only box for logs and the like."""
    box = QPlainTextEdit(parent)
    box.setReadOnly(True)
    box.setUndoRedoEnabled(False)
    box.setAccessibleName(name)
    box.setTabChangesFocus(True)
    if mono:
        box.setFont(QFontDatabase.systemFont(QFontDatabase.SystemFont.FixedFont))
        box.setLineWrapMode(QPlainTextEdit.LineWrapMode.NoWrap)
    box.setPlainText(text)
    return box


class _Sheet(QDialog):
    """Icon, heading, sentences, whatever is between, and buttons at the lower right."""

    def __init__(
        self, parent: QWidget | None, mark: str, role: str, heading: str, sentences: Sequence[tuple[str, str]]
    ) -> None:
        super().__init__(parent)
        self.setWindowTitle("Weft")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setMinimumWidth(520)
        head = title(heading)
        head.setWordWrap(True)
        self.body = column(head, spacing=8)
        for text, tone in sentences:
            if text:
                self.body.addWidget(label(text, tone=tone, wrap=True, selectable=True))
        self.buttons = row(1)
        top = row(spacing=16)
        top.addWidget(IconLabel(mark, 32, role), 0, Qt.AlignmentFlag.AlignTop)
        top.addLayout(self.body, 1)
        outer = column(parent=self, spacing=16, margins=(24, 24, 24, 16))
        outer.addLayout(top, 1)
        outer.addLayout(self.buttons)
        self.setAccessibleName(heading)

    def add_button(self, text: str, run: Callable[[], object], *, kind: str = "", closes: bool = True) -> QPushButton:
        def act() -> None:
            if closes:
                self.accept()
            run()

        made = button(text, act, kind=kind)
        self.buttons.addWidget(made)
        return made

    def add_close(self, text: str = "Close") -> QPushButton:
        made = button(text, self.reject)
        self.buttons.addWidget(made)
        return made


Sheet = _Sheet


class ErrorDialog(_Sheet):
    """A WeftError, with its hint and, folded, its details."""

    def __init__(
        self, error: WeftError, parent: QWidget | None = None, *, details: str = "", log: Path | None = None
    ) -> None:
        mark = ("shield", "warning") if error.kind is ErrorKind.HOSTILE else ("error", "negative")
        super().__init__(parent, *mark, _HEADINGS[error.kind], [(error.message, ""), (error.hint, "muted")])
        self.error = error
        self._details = details
        if details:
            box = text_box(details, name="Details")
            box.setMinimumHeight(160)
            self.body.addWidget(Fold("Details", box), 1)
        self.buttons.insertWidget(
            0, button("Copy", self._copy, kind="link", icon_name="copy", tip="Copy everything shown here")
        )
        if log is not None:
            self.buttons.insertWidget(1, button("Open log", lambda: open_locally(log), kind="link", icon_name="log"))
        close = self.add_close()
        close.setDefault(True)
        close.setFocus()

    def _copy(self) -> None:
        parts = [self.error.message, self.error.hint, self._details]
        QGuiApplication.clipboard().setText("\n\n".join(part for part in parts if part))


class CrashDialog(_Sheet):
    """An engine died: what was going on, the end of its log, and starting it again."""

    def __init__(
        self,
        error: WeftError,
        log: Path | None,
        start_again: Callable[[], object] | None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(
            parent, "error", "negative", _HEADINGS[error.kind], [(error.message, ""), (error.hint, "muted")]
        )
        self.error = error
        self._log = log
        self._tail = read_tail(log) if log is not None else ""
        if self._tail:
            self.body.addWidget(label("The end of its log:", tone="muted"))
            box = text_box(self._tail, name="The end of the engine's log")
            box.setMinimumSize(560, 200)
            self._box = box
            self.body.addWidget(box, 1)
        self.buttons.insertWidget(
            0, button("Copy", self._copy, kind="link", icon_name="copy", tip="Copy everything shown here")
        )
        if log is not None:
            self.buttons.insertWidget(1, button("Open log", lambda: open_locally(log), kind="link", icon_name="log"))
        close = self.add_close()
        if start_again is not None:
            again = self.add_button("Start again", start_again, kind="primary")
            again.setDefault(True)
            again.setFocus()
        else:
            close.setDefault(True)

    _box: QPlainTextEdit | None = None

    def showEvent(self, event: QShowEvent) -> None:
        super().showEvent(event)
        if self._box is not None:
            scroll_to_end(self._box)

    def _copy(self) -> None:
        parts = (self.error.message, self.error.hint, self._tail)
        QGuiApplication.clipboard().setText("\n\n".join(part for part in parts if part))


class ConfirmDialog(_Sheet):
    """A question about something that cannot be undone, or that needs a decision. `confirm` runs on yes."""

    def __init__(
        self,
        heading: str,
        text: str,
        yes: str,
        confirm: Callable[[], object],
        parent: QWidget | None = None,
        *,
        danger: bool = False,
        hint: str = "",
        files: Sequence[Path] = (),
        no: str = "Cancel",
    ) -> None:
        super().__init__(parent, "shield" if files else "warning", "warning", heading, [(text, ""), (hint, "muted")])
        self._sentences_alone = not files
        if files:
            self._show_files(files)
        else:
            self.setMinimumWidth(QUESTION_WIDTH)
        self.no = self.add_close(no)
        self.yes = self.add_button(yes, confirm, kind="danger" if danger else "primary")
        self.no.setFocus()

    def showEvent(self, event: QShowEvent) -> None:
        # Qt asks for the height of sentences before it knows how wide they get: what is too much stands as gaps between them.
        layout = self.layout()
        if self._sentences_alone and layout is not None and layout.hasHeightForWidth():
            self.resize(self.width(), layout.totalHeightForWidth(self.width()))
        super().showEvent(event)

    def _show_files(self, files: Sequence[Path]) -> None:
        # The whole text of every file that would run, so that it can be read before saying yes.
        parts = [f"# {path}\n\n{read_tail(path, 1024 * 1024) or '(cannot be read)'}" for path in files]
        box = text_box("\n\n".join(parts), name="The files that would run")
        box.setMinimumSize(640, 320)
        self.body.addWidget(label(", ".join(path.name for path in files), tone="muted", wrap=True))
        self.body.addWidget(box, 1)
