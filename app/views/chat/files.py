"""Import and export of conversations: asks for files, and has the work done beside the window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from PySide6.QtCore import QObject, Qt, Signal, Slot
from PySide6.QtWidgets import QFileDialog, QWidget

from app.core.errors import WeftError
from app.core.transcripts import SUFFIXES, TranscriptFormat
from app.store.chats import ChatStore
from app.views.page import Notice
from app.workers.transcript_worker import TranscriptWorker


class TranscriptFiles(QObject):
    """What goes in and out of the conversations.

    Signals:
        notice, failed: as a page's. imported: ids of the new conversations.
    """

    notice = Signal(object)
    failed = Signal(object)
    imported = Signal(list)

    def __init__(self, store: ChatStore, parent: QWidget) -> None:
        super().__init__(parent)
        self._store, self._page = store, parent
        self._workers: dict[TranscriptWorker, Callable[[list[int]], object]] = {}

    @Slot(list, str)
    def ask_export(self, conversations: list[int], form: str) -> None:
        """Ask where to, then write."""
        kind = cast("TranscriptFormat", form)
        name = "chats"
        if len(conversations) == 1:
            try:
                name = _file_name(self._store.get(conversations[0]).title)
            except WeftError as error:
                self.failed.emit(error)
                return
        dialog = QFileDialog(self._page, "Export", f"{name}{SUFFIXES[kind]}")
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.setAcceptMode(QFileDialog.AcceptMode.AcceptSave)
        dialog.setDefaultSuffix(SUFFIXES[kind][1:])
        dialog.fileSelected.connect(lambda path: self.export(conversations, kind, Path(path)))
        dialog.open()

    def export(self, conversations: list[int], form: TranscriptFormat, path: Path) -> None:
        """Write conversations to a file."""
        worker = TranscriptWorker(self._store, write=path, conversations=conversations, form=form, parent=self)
        self._run(worker, lambda ids: self._tell(f"{_chats(len(ids))} exported to {path.name}."))

    @Slot()
    def ask_import(self) -> None:
        """Ask which files, then read."""
        dialog = QFileDialog(self._page, "Import chats")
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.setFileMode(QFileDialog.FileMode.ExistingFiles)
        dialog.setNameFilters(["Chats (*.json *.jsonl *.md *.markdown)", "All files (*)"])
        dialog.filesSelected.connect(lambda paths: self.import_([Path(path) for path in paths]))
        dialog.open()

    def import_(self, paths: list[Path]) -> None:
        """Read conversations from files: from all of them, or none."""
        self._run(TranscriptWorker(self._store, read=paths, parent=self), self._imported)

    def wait(self) -> None:
        """Until everything is written or read."""
        for worker in list(self._workers):
            worker.wait()

    def _imported(self, ids: list[int]) -> None:
        self._tell(f"{_chats(len(ids))} imported.")
        self.imported.emit(ids)

    def _tell(self, text: str) -> None:
        self.notice.emit(Notice(text=text, tone="positive"))

    def _run(self, worker: TranscriptWorker, done: Callable[[list[int]], object]) -> None:
        # Through slots of this object: a plain function would run in the worker's thread.
        self._workers[worker] = done
        worker.done.connect(self._done)
        worker.failed.connect(self.failed)
        worker.finished.connect(self._ended)
        worker.start()

    @Slot(list)
    def _done(self, ids: list[int]) -> None:
        worker = self.sender()
        assert isinstance(worker, TranscriptWorker)
        self._workers[worker](ids)

    @Slot()
    def _ended(self) -> None:
        worker = self.sender()
        assert isinstance(worker, TranscriptWorker)
        self._workers.pop(worker, None)
        worker.deleteLater()


def _chats(count: int) -> str:
    return f"{count:,} chat{'s' if count != 1 else ''}"


def _file_name(title: str) -> str:
    """A title as a file name that every system takes."""
    kept = "".join(c if c.isalnum() or c in " -_.,()" else " " for c in title)
    return " ".join(kept.split()).strip(" .")[:80] or "chat"
