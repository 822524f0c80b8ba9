"""Adding files and folders to the library where they lie, and saying what came of it."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QObject, Signal, Slot

from app.core.errors import WeftError
from app.viewmodels.background import Background
from app.viewmodels.library_roots import Added, LibraryRoots, damage
from app.views.page import Notice


class Adding(QObject):
    """Adds roots, and looks into what was added off the window's thread.

    Signals:
        notice(Notice), failed(WeftError)
    """

    notice = Signal(object)
    failed = Signal(object)

    def __init__(self, roots: LibraryRoots, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._roots = roots
        self._background = Background(self)
        self._background.done.connect(self._looked)

    def take(self, paths: list[Path]) -> None:
        """Add these."""
        try:
            added = self._roots.add(paths)
        except WeftError as error:
            self.failed.emit(error)
            return
        self._background.run(added, lambda: damage(paths))

    def close(self) -> None:
        self._background.close()

    @Slot(object, object, object)
    def _looked(self, added: object, wrong: object, error: object) -> None:
        assert isinstance(added, Added)
        self.notice.emit(_notice(added, wrong, error))


def _notice(added: Added, wrong: object, error: object) -> Notice:
    """What adding to the library did, and what is wrong with the files that were added (`wrong` a sentence, "" for nothing).

    An error means that there is nothing in them to list: they are taken off again.
    """
    if error is not None:
        if added.undo is not None:
            added.undo()
        return Notice(text=str(error), tone="warning")
    text = " ".join(part for part in (str(wrong or ""), added.text) if part)
    return Notice(
        text=text, tone="warning" if wrong else "positive", action="Undo" if added.undo else "", run=added.undo
    )
