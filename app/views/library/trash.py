"""Moving what the library holds to the trash, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PySide6.QtCore import QObject, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.core.errors import WeftError
from app.viewmodels.background import Background
from app.viewmodels.units import readable_bytes
from app.views.dialogs import ConfirmDialog
from app.views.page import Notice

LISTED = 10  # files that are named before anything goes


class Trash(QObject):
    """Moves files off the window's thread, and offers the way back.

    Signals:
        notice(Notice), failed(WeftError): what came of it. moved: the disk holds something else now.
    """

    notice = Signal(object)
    failed = Signal(object)
    moved = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._background = Background(self)
        self._background.done.connect(self._ended)

    def take(self, name: str, move: Callable[[], Callable[[], None] | None]) -> None:
        """Move something that is called `name`. `move` runs in another thread, and returns what takes it back (None: nothing does)."""
        self._background.run(name, move)

    def close(self) -> None:
        self._background.close()

    @Slot(object, object, object)
    def _ended(self, name: object, undo: object, error: object) -> None:
        if isinstance(error, WeftError):
            self.failed.emit(error)
        else:
            run = (lambda: self._undo(undo)) if callable(undo) else None
            self.notice.emit(Notice(text=f"{name} moved to the trash.", action="Undo" if run else "", run=run))
        self.moved.emit()

    def _undo(self, undo: Callable[..., object]) -> None:
        try:
            undo()
        except WeftError as error:
            self.failed.emit(error)
        except OSError as error:
            text = f"It could not be restored: {error}. Take it out of the trash by hand."
            self.notice.emit(Notice(text=text, tone="negative"))
        self.moved.emit()


def trash_question(
    name: str, files: Sequence[Path], size: int, parent: QWidget, yes: Callable[[], object], *, partly_own: bool
) -> ConfirmDialog:
    """Ask before files go that do not all lie in Weft's own folders: other programs may need them.

    Args:
        size: of all, in bytes. partly_own: some do lie there.
    """
    listed = "\n".join(str(path) for path in files[:LISTED])
    more = f"\n… and {len(files) - LISTED} more" if len(files) > LISTED else ""
    where = "Not all of it lies" if partly_own else "It does not lie"
    dialog = ConfirmDialog(
        f"Move {name} to the trash?",
        f"{listed}{more}\n{readable_bytes(size)}",
        "Move to trash",
        yes,
        parent,
        danger=True,
        hint=f"{where} in Weft's own folder: another program may use it too.",
    )
    dialog.no.setDefault(True)
    return dialog
