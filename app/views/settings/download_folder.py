"""Settings, Folders: where downloads and exported models go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PySide6.QtCore import Qt, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.core.errors import WeftError
from app.viewmodels.library_roots import LibraryRoots
from app.viewmodels.units import short_path
from app.views.dialogs import choose_paths
from app.views.widgets import ElidedLabel, button, label, row


class DownloadFolder(QWidget):
    """The folder, and a button to take another one.

    Signals:
        failed(WeftError): the folder cannot be used.
    """

    failed = Signal(object)

    def __init__(self, roots: LibraryRoots, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._roots = roots
        self.where = ElidedLabel(mode=Qt.TextElideMode.ElideMiddle)
        self.change = button("Change…", self._choose)
        self.change.setAccessibleName("Change where downloads go")
        self.reset = button("Weft's own", self._own, kind="link")
        self.reset.setAccessibleName("Let downloads go to Weft's own folder")
        line = row(label("Downloads go to"), self.where, self.reset, self.change, spacing=12, parent=self)
        line.setStretch(1, 1)
        roots.changed.connect(self.show_now)
        self.show_now()

    @Slot()
    def show_now(self) -> None:
        folder = self._roots.downloads()
        self.where.setText(short_path(str(folder), str(Path.home())))
        self.where.setAccessibleName(f"Downloads go to {folder}")
        self.reset.setVisible(not self._roots.is_own_downloads())

    def take(self, folder: Path | None) -> None:
        """Let downloads go here; None: to Weft's own folder."""
        try:
            self._roots.set_downloads(folder)
        except WeftError as error:
            self.failed.emit(error)

    @Slot()
    def _choose(self) -> None:
        start = self._roots.downloads()
        choose_paths(self, "Where downloads go", self._chosen, start=start if start.is_dir() else None)

    @Slot(list)
    def _chosen(self, names: Sequence[str]) -> None:
        if names:
            self.take(Path(names[0]))

    @Slot()
    def _own(self) -> None:
        self.take(None)
